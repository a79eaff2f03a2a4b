"""Times and their uncertainty.

Other processes, the clock rate and the caches change from second to second. Everything that is
compared therefore takes turns in one process in alternating order, and the result is the median
over the rounds of the ratio within a round.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from benchmarks.cases import Data

Work = Callable[[int], float]  # repeats its work n times; returns the seconds of one repetition


@dataclass(frozen=True)
class Budget:
    """Limits of a measurement."""

    seconds: float = 4.0  # minimal duration
    rounds: int = 6  # minimal number of rounds
    longest: float = 10.0  # times ``seconds``: after that three rounds suffice
    turn: float = 0.02  # seconds of a turn, in which short work is repeated

    def spent(self, rounds: int, seconds: float) -> bool:
        """Whether to stop after ``rounds`` rounds and ``seconds`` seconds."""
        late = seconds > self.longest * self.seconds
        enough = min(self.rounds, 3) if late else self.rounds
        return rounds >= enough and seconds >= self.seconds


QUICK = Budget(seconds=0.25, rounds=5, turn=0.003)


@dataclass(frozen=True)
class Summary:
    """Median and quartiles; of fewer than five values, the extremes instead of quartiles."""

    median: float
    lower: float
    upper: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        if len(values) < 5:
            return cls(statistics.median(values), min(values), max(values), len(values))
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper, len(values))

    @property
    def spread(self) -> float:
        """The ratio of the quartiles, at least 1."""
        return self.upper / self.lower


def speedup(reference: Sequence[float], other: Sequence[float]) -> Summary:
    """Speed as a multiple of the reference's: ratios of times of the same round."""
    return Summary.of([a / b for a, b in zip(reference, other, strict=True)])


def verdict(ratio: Summary, noise: Summary) -> str:
    """ "faster" or "slower"; "tie" where the ratio is within the noise."""
    if noise.lower <= ratio.median <= noise.upper or ratio.lower <= 1 <= ratio.upper:
        return "tie"
    return "faster" if ratio.median > 1 else "slower"


def interleave(works: Sequence[Work], budget: Budget) -> list[list[float]]:
    """Seconds of each of ``works`` in each round; the order is reversed from round to round.

    On several threads, a pause of ``rest`` seconds follows the turn of work that has this attribute
    (see Peer).
    """
    repeats = []
    for work in works:
        once = work(1)  # the first call allocates, starts threads, fills caches
        if once < 10 * budget.turn:
            once = work(1)
        repeats.append(max(1, math.ceil(budget.turn / max(once, 1e-9))))
    rests = [getattr(work, "rest", 0.0) for work in works]
    seconds: list[list[float]] = [[] for _ in works]
    order = list(range(len(works)))
    start = time.perf_counter()
    while True:
        for i in order:
            seconds[i].append(works[i](repeats[i]))
            if torch.get_num_threads() > 1:
                time.sleep(rests[i])
        order.reverse()
        if budget.spent(len(seconds[0]), time.perf_counter() - start):
            return seconds


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def lost(device: torch.device) -> bool:
    """Whether this process can no longer use the device."""
    try:
        synchronize(device)
    except Exception:
        return True
    return False


def seconds_of(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Mean seconds of ``repeats`` calls: by CUDA events on a GPU, else by the wall clock."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    total = 0.0
    for _ in range(repeats):
        start_time = time.perf_counter()
        kept = call()
        total += time.perf_counter() - start_time
        del kept  # not timed
    return total / repeats


Setting = Callable[[], AbstractContextManager[Any]]  # a context for everything that is timed


@contextlib.contextmanager
def tf32(permitted: bool) -> Iterator[None]:
    """Permits or forbids TF32 in float32 recurrent layers and matrix products.

    torch's default permits it in the former only. It has no effect on a CPU.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32, matmul.allow_tf32 = permitted, permitted
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


def no_tf32() -> AbstractContextManager[None]:
    return tf32(False)


class Unit:
    """One repetition of a case by one module: checked by its results, timed as work.

    Training is forward, and backward from a given gradient of the output. Forward is the forward
    pass of training. Inference is forward in eval mode without autograd.
    """

    def __init__(
        self,
        module: nn.Module,
        data: Data,
        mode: str,
        input_grad: bool,
        setting: Setting = contextlib.nullcontext,
        rest: float = 0.0,
    ) -> None:
        self.device = data.output_grad.device
        self.mode, self.setting, self.rest = mode, setting, rest
        self._module = module.train(mode != "inference")
        self._output_grad = data.output_grad
        self._leaves: dict[str, Tensor] = dict(module.named_parameters())
        given = data.input
        x = given.data if isinstance(given, PackedSequence) else given
        if mode != "inference" and input_grad:
            x = x.clone().requires_grad_()
            self._leaves["x"] = x
        self._input = given._replace(data=x) if isinstance(given, PackedSequence) else x
        self._wanted = {name: t for name, t in self._leaves.items() if t.requires_grad}

    def __call__(self, repeats: int) -> float:
        with self.setting():
            return seconds_of(self.run, self.device, repeats)

    def results(self) -> dict[str, Tensor]:
        """All results of a repetition, by name."""
        with self.setting():
            found = self.run()
        if self.mode == "training":
            for name, leaf in self._leaves.items():
                # A missing gradient is incorrect: NaN fails the check.
                if name not in self._wanted:
                    found[f"grad {name}"] = torch.full_like(leaf, math.nan)
        return {name: t.detach() for name, t in found.items()}

    def run(self) -> dict[str, Tensor]:
        """One repetition, without waiting for the device."""
        with torch.set_grad_enabled(self.mode != "inference"):
            output, state = self._module(self._input)
        values = output.data if isinstance(output, PackedSequence) else output
        found = {"output": values}
        found.update(zip(("h_n", "c_n"), state if isinstance(state, tuple) else (state,)))  # noqa: B905
        if self.mode == "training":
            grads = torch.autograd.grad(values, list(self._wanted.values()), self._output_grad)
            found.update((f"grad {name}", g) for name, g in zip(self._wanted, grads, strict=True))
        return found

    def saved_bytes(self) -> int:
        """Bytes that forward saves for backward besides its input, its output and the weights."""
        theirs = {_storage(leaf) for leaf in self._leaves.values()}
        x = self._input.data if isinstance(self._input, PackedSequence) else self._input
        theirs.add(_storage(x))
        saved: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            saved[_storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with self.setting(), hooks:
            output, _ = self._module(self._input)
        theirs.add(_storage(output.data if isinstance(output, PackedSequence) else output))
        return sum(size for where, size in saved.items() if where not in theirs)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Replay:
    """A unit's repetition as a CUDA graph: the kernels without their launches."""

    def __init__(self, unit: Unit) -> None:
        self.device = unit.device
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), unit.setting():
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):  # one-time choices and allocations must not be captured
                    unit.run()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._kept = unit.run()

    def __call__(self, repeats: int) -> float:
        return seconds_of(self._graph.replay, self.device, repeats)

    def results(self) -> dict[str, Tensor]:
        for t in self._kept.values():
            t.detach().fill_(math.nan)  # detects what a replay does not write
        self._graph.replay()
        synchronize(self.device)
        return {name: t.detach() for name, t in self._kept.items()}
