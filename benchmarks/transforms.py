"""``python -m benchmarks.transforms``: torch.func's transforms, against a loop and the plain path.

Each job is what a user would write without them, a Python loop over torch.nn's layers, and the same
by `vmap` of fusedrnn's layer and of its plain PyTorch implementation. Results are compared with the
loop's in float64 before they are timed; peers take turns.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jvp, stack_module_state, vmap

import fusedrnn
from benchmarks import compact, machine, measure, report
from benchmarks.measure import Budget, Summary
from benchmarks.tables import Table
from fusedrnn import reference
from fusedrnn.demo.options import positive, positive_number

Call = Callable[[], list[Tensor]]
TOLERANCE = 2e-3  # relative to the largest value: float32 sums in other orders
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Job:
    """`peers` makes the calls of each implementation, the loop over torch.nn's layers first."""

    name: str
    shape: str
    peers: Callable[[torch.dtype], dict[str, Call]]


@dataclass(frozen=True)
class Line:
    job: Job
    peer: str
    seconds: Summary
    speedup: Summary  # over the job's first peer
    peak_bytes: int | None


def plain_forward(self: Any, input: Any, hx: Any = None, **kwargs: Any) -> Any:
    hx = (*hx, None)[:2] if isinstance(hx, tuple) else (hx, None)
    call = (input, *hx, self._weights(), *[None] * 7, 0.0, *self._config())
    y, hn, cn, *_ = reference.forward(*call)
    return y, (hn, cn) if self.mode == "LSTM" else hn


# The plain PyTorch implementation as layers.
PLAIN = {
    cell: type(f"Plain{cell}", (getattr(fusedrnn, cell),), {"forward": plain_forward})
    for cell in ("RNN", "GRU", "LSTM")
}


def loss_of(layer: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(layer, parameters, (x,))[0].square().sum()


def gradients(layer: nn.Module, xs: Tensor) -> list[Tensor]:
    """Of each of `xs` in a loop, stacked."""
    parameters = list(layer.parameters())
    found = [torch.autograd.grad(layer(x)[0].square().sum(), parameters) for x in xs]
    return [torch.stack(each) for each in zip(*found, strict=True)]


def joined(members: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(each) for each in zip(*members, strict=True)]


def twins(
    dtype: torch.dtype, seed: int = 0, cell: str = "LSTM", sizes: tuple[int, int] = (64, 128)
) -> tuple[Any, Any, Any]:
    """torch.nn's layer, fusedrnn's and the plain implementation with the same weights."""
    torch.manual_seed(seed)
    layer = getattr(nn, cell)(*sizes).to(dtype)
    found = [kind(*sizes).to(dtype) for kind in (getattr(fusedrnn, cell), PLAIN[cell])]
    for other in found:
        other.load_state_dict(layer.state_dict())
    return layer, found[0], found[1]


def per_sample(dtype: torch.dtype) -> dict[str, Call]:
    layer, fused, plain = twins(dtype=dtype)
    xs = torch.randn(32, 50, 1, 64).to(dtype)  # samples, T, B, features

    def by_vmap(module: nn.Module) -> Call:
        parameters = {name: p.detach() for name, p in module.named_parameters()}
        each = vmap(grad(lambda p, x: loss_of(module, p, x)), (None, 0))
        return lambda: list(each(parameters, xs).values())

    calls = {
        "loop, torch.nn": lambda: gradients(layer, xs),
        "loop, fusedrnn": lambda: gradients(fused, xs),
        "vmap, plain PyTorch": by_vmap(plain),
        "vmap, fusedrnn": by_vmap(fused),
    }
    if importlib.util.find_spec("opacus"):
        calls["Opacus DPLSTM"] = opacus_gradients(layer, xs)
    return calls


def opacus_gradients(layer: nn.LSTM, xs: Tensor) -> Call:
    from opacus import GradSampleModule
    from opacus.layers import DPLSTM

    made = DPLSTM(layer.input_size, layer.hidden_size).to(xs.dtype)
    made.load_state_dict(layer.state_dict())
    sampled = GradSampleModule(made, loss_reduction="sum", batch_first=False)
    batch = xs.squeeze(2).transpose(0, 1).contiguous()

    def call() -> list[Tensor]:
        sampled.zero_grad()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the batch needs no gradient, which torch remarks on
            sampled(batch)[0].square().sum().backward()
        found = {name.removeprefix("_module."): p for name, p in sampled.named_parameters()}
        return [found[name].grad_sample for name, _ in layer.named_parameters()]

    return call


@dataclass(frozen=True)
class Ensemble:
    members: int
    cell: str
    sizes: tuple[int, int]
    steps: int
    batch: int

    def __str__(self) -> str:
        layers = f"{self.members} {self.cell}s {self.sizes[0]}->{self.sizes[1]}"
        return f"{layers}, T={self.steps}, B={self.batch}"


def ensemble(case: Ensemble, training: bool, dtype: torch.dtype) -> dict[str, Call]:
    groups = [twins(dtype, seed, case.cell, case.sizes) for seed in range(case.members)]
    layers, fused, plain = (list(of_kind) for of_kind in zip(*groups, strict=True))
    x = torch.randn(case.steps, case.batch, case.sizes[0]).to(dtype)

    def loop(members: list[Any]) -> Call:
        if training:
            return lambda: joined([gradients(member, x[None]) for member in members])
        return torch.no_grad()(lambda: [torch.stack([m(x)[0] for m in members])])

    def by_vmap(members: list[Any]) -> Call:
        stacked, _ = stack_module_state(members)
        stacked = {name: p.detach() for name, p in stacked.items()}
        skeleton = copy.deepcopy(members[0]).to("meta")
        if training:
            each = vmap(grad(lambda p: loss_of(skeleton, p, x)))
            return lambda: list(each(stacked).values())
        forward = vmap(lambda p: functional_call(skeleton, p, (x,))[0])
        return torch.no_grad()(lambda: [forward(stacked)])

    return {
        "loop, torch.nn": loop(layers),
        "loop, fusedrnn": loop(fused),
        "vmap, plain PyTorch": by_vmap(plain),
        "vmap, fusedrnn": by_vmap(fused),
    }


def cells(dtype: torch.dtype) -> dict[str, Call]:
    torch.manual_seed(0)
    plain, fused = (kind(64, 128).to(dtype) for kind in (nn.LSTMCell, fusedrnn.LSTMCell))
    fused.load_state_dict(plain.state_dict())
    xs = torch.randn(32, 64).to(dtype)
    each = vmap(lambda x: fused(x)[0])
    return {
        "loop, torch.nn": torch.no_grad()(lambda: [torch.stack([plain(x)[0] for x in xs])]),
        "vmap, fusedrnn": torch.no_grad()(lambda: [each(xs)]),
    }


def batched_gradients(dtype: torch.dtype) -> dict[str, Call]:
    """16 rows of the Jacobian of the last output by the input."""
    made = dict(zip(("torch.nn", "plain PyTorch", "fusedrnn"), _by_input(dtype), strict=True))

    def loop(name: str) -> Call:
        y, x, forms = made[name]
        return lambda: [
            torch.stack([torch.autograd.grad(y, x, f, retain_graph=True)[0] for f in forms])
        ]

    def batched(name: str) -> Call:
        y, x, forms = made[name]
        return lambda: [
            torch.autograd.grad(y, x, forms, is_grads_batched=True, retain_graph=True)[0]
        ]

    return {
        "loop, torch.nn": loop("torch.nn"),
        "loop, fusedrnn": loop("fusedrnn"),
        "is_grads_batched, plain PyTorch": batched("plain PyTorch"),
        "is_grads_batched, fusedrnn": batched("fusedrnn"),
    }


def _by_input(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """A graph of each implementation, its input, and what it is differentiated along."""
    layer, fused, plain = twins(dtype)
    data = torch.randn(50, 4, 64).to(dtype)
    forms = torch.eye(16, 128).to(dtype)[:, None].expand(16, 4, 128)
    for module in (layer, plain, fused):
        x = data.clone().requires_grad_()
        yield module(x)[0][-1], x, forms


ENSEMBLES = (
    Ensemble(8, "LSTM", (28, 64), 35, 8),
    Ensemble(8, "GRU", (64, 256), 35, 32),
    Ensemble(32, "RNN", (8, 16), 35, 1),
)


SIZES = 28, 256  # of the second derivatives: the book's LSTM, 35 steps of 32


def named(calls: list[Call]) -> dict[str, Call]:
    return dict(zip(("torch.nn", "plain PyTorch", "fusedrnn"), calls, strict=True))


def training_forward(dtype: torch.dtype) -> dict[str, Call]:
    layer, fused, plain = twins(dtype, sizes=SIZES)
    x = torch.randn(35, 32, SIZES[0]).to(dtype)
    return named([partial(lambda m: [m(x)[0]], m) for m in (layer, plain, fused)])


def directional(dtype: torch.dtype) -> dict[str, Call]:
    """jvp by input and weights; torch.nn's LSTM has none in float32: two reverse passes give it."""
    layer, fused, plain = twins(dtype, sizes=SIZES)
    x, v = torch.randn(2, 35, 32, SIZES[0]).to(dtype)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    along = {name: torch.randn(p.shape).to(dtype) for name, p in parameters.items()}

    def forward_mode(module: nn.Module) -> Call:
        def of(p: Any, x: Tensor) -> Tensor:
            return functional_call(module, p, (x,))[0]

        return lambda: [jvp(of, (parameters, x), (along, v))[1]]

    def twice_reverse() -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        y = layer(leaves[0])[0]
        form = torch.zeros_like(y, requires_grad=True)
        first = torch.autograd.grad(y, leaves, form, create_graph=True)
        return list(torch.autograd.grad(first, form, [v, *along.values()]))

    return named([twice_reverse, forward_mode(plain), forward_mode(fused)])


def gradient_penalty(dtype: torch.dtype) -> dict[str, Call]:
    layer, fused, plain = twins(dtype, sizes=SIZES)
    x = torch.randn(35, 32, SIZES[0]).to(dtype)

    def penalise(module: nn.Module) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(module(leaf)[0].sum(), leaf, create_graph=True)
        penalty = (dx.norm(dim=(0, 2)) - 1).square().sum()
        return list(torch.autograd.grad(penalty, [leaf, *module.parameters()]))

    return named([partial(penalise, m) for m in (layer, plain, fused)])


STATE = "GRU", (28, 64)  # differentiated by its first state, 35 steps of one row


def last_of(module: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return module(x, h)[1].flatten()


def loss_at(module: nn.Module, x: Tensor, h: Tensor) -> Tensor:
    return module(x, h)[0].square().sum()


def rows(values: Tensor, leaf: Tensor) -> list[Tensor]:
    """The gradients of each of `values` in a loop, as a matrix."""
    each = [torch.autograd.grad(v, leaf, retain_graph=True)[0] for v in values.flatten()]
    return [torch.stack(each).flatten(1)]


def state_jacobian(dtype: torch.dtype) -> dict[str, Call]:
    """Of the last state by the initial one."""
    layer, fused, plain = twins(dtype, 0, *STATE)
    x, h = torch.randn(35, 1, STATE[1][0]).to(dtype), torch.zeros(1, 1, STATE[1][1], dtype=dtype)

    def backward(module: nn.Module) -> list[Tensor]:
        leaf = h.clone().requires_grad_()
        return rows(last_of(module, x, leaf), leaf)

    def columns(module: nn.Module) -> list[Tensor]:
        of = partial(last_of, module, x)
        units = torch.eye(h.numel(), dtype=dtype).unflatten(1, h.shape)
        return [torch.stack([jvp(of, (h,), (unit,))[1] for unit in units], 1)]

    def at_once(module: nn.Module) -> list[Tensor]:
        return [jacfwd(partial(last_of, module, x))(h).flatten(1)]

    return {
        "loop, torch.nn": partial(backward, layer),
        "loop, fusedrnn": partial(backward, fused),
        "loop of jvp, fusedrnn": partial(columns, fused),
        "jacfwd, plain PyTorch": partial(at_once, plain),
        "jacfwd, fusedrnn": partial(at_once, fused),
    }


def state_hessian(dtype: torch.dtype) -> dict[str, Call]:
    layer, fused, plain = twins(dtype, 0, *STATE)
    x, h = torch.randn(35, 1, STATE[1][0]).to(dtype), torch.zeros(1, 1, STATE[1][1], dtype=dtype)

    def loop(module: nn.Module) -> list[Tensor]:
        leaf = h.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss_at(module, x, leaf), leaf, create_graph=True)
        return rows(first, leaf)

    def at_once(module: nn.Module) -> list[Tensor]:
        found = hessian(partial(loss_at, module, x))(h)
        return [found.reshape(h.numel(), h.numel())]

    return {
        "loop, torch.nn": partial(loop, layer),
        "loop, fusedrnn": partial(loop, fused),
        "hessian, plain PyTorch": partial(at_once, plain),
        "hessian, fusedrnn": partial(at_once, fused),
    }


JOBS = (
    Job("gradients of each sample", "LSTM 64->128, T=50, 32 samples", per_sample),
    *(
        Job(f"{case.members} {case.cell}s, {name}", str(case), partial(ensemble, case, training))
        for case in ENSEMBLES
        for name, training in (("inference", False), ("gradients", True))
    ),
    Job("batched gradients", "LSTM 64->128, T=50, B=4, 16 gradients", batched_gradients),
    Job("cell", "LSTMCell 64->128, 32 inputs", cells),
    Job("forward in training", "LSTM 28->256, T=35, B=32", training_forward),
    Job("forward mode", "the same, by input and weights", directional),
    Job("gradient penalty", "the same", gradient_penalty),
    Job("jacobian", "GRU 28->64, T=35, B=1, last state by the first", state_jacobian),
    Job("Hessian", "the same, of a loss by the first state", state_hessian),
)


def check(job: Job, calls: dict[str, Call]) -> None:
    """Raises AssertionError where a result is not that of the loop in float64."""
    expected = next(iter(job.peers(torch.float64).values()))()
    for name, call in calls.items():
        for found, right in zip(call(), expected, strict=True):
            off = (found.double() - right).abs().max() / right.abs().max()
            assert off < TOLERANCE, f"{job.name}, {name}: off by {off:.1e}"


def lines(job: Job, budget: Budget) -> Iterator[Line]:
    calls = job.peers(torch.float32)
    check(job, calls)
    works = [
        lambda repeats, call=call: measure.seconds_of(call, CPU, repeats) for call in calls.values()
    ]
    times = measure.interleave(works, budget)
    for (name, call), seconds in zip(calls.items(), times, strict=True):
        yield Line(
            job,
            name,
            Summary.of(seconds),
            measure.speedup(times[0], seconds),
            machine.peak_bytes(call, CPU),
        )


def table(found: Sequence[Line], threads: int) -> Table:
    def cells_of(line: Line) -> list[str]:
        ratio = line.speedup
        peak = "" if line.peak_bytes is None else f"{line.peak_bytes / 1e6:.0f}"
        return [
            line.job.name,
            line.peer,
            f"{1e3 * line.seconds.median:.2f}",
            f"{ratio.median:.2f} ({ratio.lower:.2f}..{ratio.upper:.2f})",
            peak,
        ]

    header = ["job", "implementation", "ms", "speed", "MB"]
    title = f"float32, {threads} CPU threads; speed as a multiple of a job's first line, peak MB"
    return Table(title, header, [cells_of(line) for line in found])


def saved(found: Sequence[Line], threads: int) -> dict[str, Any]:
    """The lines as JSON has them."""
    lines = [
        {
            "job": line.job.name,
            "shape": line.job.shape,
            "implementation": line.peer,
            "seconds": asdict(line.seconds),
            "speedup": asdict(line.speedup),
            "peak_bytes": line.peak_bytes,
        }
        for line in found
    ]
    return {"threads": threads, "environment": machine.environment(CPU), "lines": lines}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transforms", description=__doc__)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--seconds", type=positive_number, default=Budget().seconds)
    parser.add_argument("--job", action="append", help="only jobs whose name begins so")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="save the results")
    options = parser.parse_args(arguments)
    console, before = Console(), torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        budget = Budget(seconds=options.seconds)
        jobs = [job for job in JOBS if job.name.startswith(tuple(options.job or [""]))]
        found = [line for job in jobs for line in lines(job, budget)]
    finally:
        torch.set_num_threads(before)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(compact.dumps(saved(found, options.threads), 2))
    console.print(table(found, options.threads).rich(console.width))
    for job in jobs:
        console.print(f"{job.name}: {job.shape}", style="dim", markup=False, highlight=False)
    console.print(report.caption(machine.environment(CPU)), markup=False, highlight=False)


if __name__ == "__main__":
    main()
