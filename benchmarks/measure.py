"""How long it takes, and how sure that is.

Other processes, the clock rate and the caches change from second to second, and hit whatever runs
just then. So everything that is to be compared takes turns in one process, the order of the turns
alternates, and what is reported is the median over the rounds of the ratio within a round.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from benchmarks.cases import Data

MATMUL_SIZE = 1024
MATMUL_FLOPS = 2 * MATMUL_SIZE**3

Work = Callable[[], float]  # does a piece of work and returns the seconds it took


@dataclass(frozen=True)
class Budget:
    """How much time a measurement may take."""

    seconds: float = 4.0  # go on until so much has passed
    rounds: int = 6  # but never fewer than these
    turn: float = 0.02  # short work is repeated for about so long within its turn


QUICK = Budget(seconds=0.25, rounds=2, turn=0.005)


@dataclass(frozen=True)
class Summary:
    """The median and the quartiles of some values."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))


def speedup(reference: Sequence[float], other: Sequence[float]) -> Summary:
    """How many times as fast as ``reference`` the other is: ratios of times of the same round."""
    return Summary.of([a / b for a, b in zip(reference, other, strict=True)])


def interleave(works: Sequence[Work], budget: Budget) -> list[list[float]]:
    """Seconds of each of ``works``, round by round; the order turns about from round to round."""
    repeats = []
    for work in works:
        work()  # the first call allocates, starts threads, fills caches
        repeats.append(max(1, math.ceil(budget.turn / max(work(), 1e-9))))
    seconds: list[list[float]] = [[] for _ in works]
    order = list(range(len(works)))
    start = time.perf_counter()
    while len(seconds[0]) < budget.rounds or time.perf_counter() - start < budget.seconds:
        for i in order:
            seconds[i].append(sum(works[i]() for _ in range(repeats[i])) / repeats[i])
        order.reverse()
    return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Matmul:
    """A product of two square matrices: what torch gets out of this machine, as work."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        shape = (MATMUL_SIZE, MATMUL_SIZE)
        generator = torch.Generator().manual_seed(0)
        self._a = torch.randn(shape, generator=generator).to(device, dtype)
        self._out = torch.empty_like(self._a)

    def __call__(self) -> float:
        synchronize(self._a.device)
        start = time.perf_counter()
        torch.mm(self._a, self._a, out=self._out)
        synchronize(self._a.device)
        return time.perf_counter() - start


class Unit:
    """One repetition of a case by one module: what is checked, and, as work, what is timed.

    Training is forward and backward from a given gradient of the output; gradients of the
    repetition before are dropped outside of the time. Inference is forward without autograd.
    """

    def __init__(self, module: nn.Module, data: Data, training: bool, input_grad: bool) -> None:
        self._module = module.train(training)
        self._training = training
        self._output_grad = data.output_grad
        self._leaves: dict[str, Tensor] = dict(module.named_parameters())
        given = data.input
        x = given.data if isinstance(given, PackedSequence) else given
        if training and input_grad:
            x = x.clone().requires_grad_()
            self._leaves["x"] = x
        self._input = given._replace(data=x) if isinstance(given, PackedSequence) else x

    def __call__(self) -> float:
        device = self._output_grad.device
        self._drop_grads()
        synchronize(device)
        start = time.perf_counter()
        kept = self._run()
        synchronize(device)
        seconds = time.perf_counter() - start
        del kept  # freed outside of the time
        return seconds

    def results(self) -> dict[str, Tensor]:
        """Everything that a repetition computes, by name."""
        self._drop_grads()
        output, state = self._run()
        found = {"output": output}
        found |= dict(zip(("h_n", "c_n"), state, strict=False))
        if self._training:
            for name, leaf in self._leaves.items():
                # Not computed is as wrong as anything: a NaN says so.
                grad = torch.full_like(leaf, math.nan) if leaf.grad is None else leaf.grad
                found[f"grad {name}"] = grad
        return {name: t.detach() for name, t in found.items()}

    def _drop_grads(self) -> None:
        for leaf in self._leaves.values():
            leaf.grad = None

    def _run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        with torch.set_grad_enabled(self._training):
            output, state = self._module(self._input)
        values = output.data if isinstance(output, PackedSequence) else output
        if self._training:
            values.backward(self._output_grad)
        return values, state if isinstance(state, tuple) else (state,)
