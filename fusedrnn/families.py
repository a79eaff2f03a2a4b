"""Families of kernels, and a small case of each, compared with plain PyTorch in float64.

A family is what is launched, checked and struck out as one: CUDA kernels of one exchange between
blocks, arithmetic, cell and direction (csrc/plan/families.h); or CPU kernels of one instruction
set, dtype, cell and direction. The first use of a CUDA family on a device runs its case
(csrc/torch/cuda_standing.cpp calls `verify`); `python -m fusedrnn check` runs all of them. Kernels
take ensembles too, whose weights come stacked (see batching.py), so a family has a case of these.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn import _C, cuda, derivatives, reference, tangents
from fusedrnn.calls import Call, Config

MODES = tuple(reference.STEPS)
# The largest error of a result, as a part of its largest element, that rounding explains.
TOLERANCES = {
    "float64": 1e-10,
    "float32": 1e-5,
    "FFMA": 1e-5,
    "FFMA, 2 rows": 1e-5,
    "TF32 tensor cores": 1e-2,
    "bfloat16": 4e-2,
    "float16": 1e-2,
}


class Family(NamedTuple):
    """CUDA kernels that are checked as one."""

    number: int  # of csrc/plan/families.h
    exchange: str  # stepwise, block (teams of one), grid or cluster
    arithmetic: str
    mode: str
    backward: bool
    chained: bool  # several layers in a launch
    tangent: bool  # the derivative of that pass in one direction: see tangents.py
    name: str

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.arithmetic, torch.float32)  # FFMA and TF32 are float32's

    @property
    def backend(self) -> str:
        """The word of FUSEDRNN_PLAN."""
        return "grid" if self.exchange == "block" else self.exchange


class CpuFamily(NamedTuple):
    """CPU kernels that are checked as one."""

    variant: str  # the instruction set, as FUSEDRNN_CPU names it
    dtype: torch.dtype
    mode: str
    backward: bool

    @property
    def name(self) -> str:
        way = "backward" if self.backward else "forward"
        return f"{self.variant} {self.mode} {way}, {str(self.dtype).removeprefix('torch.')}"


@functools.cache
def cuda_families() -> tuple[Family, ...]:
    return tuple(Family(*fields) for fields in _C.cuda_families())


def cpu_families() -> tuple[CpuFamily, ...]:
    """Of all instruction sets that the binary has and this processor too."""
    return tuple(
        CpuFamily(variant, dtype, mode, backward)
        for variant, here in _C.cpu_variants()
        if here
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        for mode in MODES
        for backward in (False, True)
    )


class Case(NamedTuple):
    """A small call: sizes, and the plan that makes it run a family's kernels."""

    steps: int
    batch: int
    config: Config
    plan: str = ""  # of FUSEDRNN_PLAN
    tf32: bool = False
    members: int = 0  # with weights of their own, which come stacked; 0: none are stacked


INPUT = 3


def cases(family: Family) -> list[Case]:
    """Sizes that divide evenly by nothing; teams of three blocks, two or more of them. Then the
    same for an ensemble: as many teams for each of its members.
    """
    found = _cases(family)
    return [*found, *(case._replace(batch=2 * case.batch, members=2) for case in found)]


def _cases(family: Family) -> list[Case]:
    layers, half = 1 + family.chained, family.dtype.itemsize == 2
    alone = family.exchange in ("block", "stepwise")
    hidden = 5 if alone else 19
    config = Config(family.mode, hidden, 0, layers, True, False)
    if family.exchange == "stepwise":
        configs = [config]
        configs += [config._replace(proj_size=3)] if family.mode == "LSTM" else []
        if family.mode in ("GRU", "LSTM"):
            configs += [config._replace(layer_norm=True)]
        return [Case(4, 5, c, "stepwise") for c in configs]
    narrow = family.arithmetic == "FFMA, 2 rows"
    plan = f"{family.backend},units=8,rows={2 if narrow else 8},layers={layers}"
    tf32 = family.arithmetic.startswith("TF32")
    assert not half or hidden > 8 or alone
    return [Case(4, 3 if narrow else 9, config, plan, tf32)]


def runs_on(family: Family, spec: cuda.Spec) -> bool:
    """Whether a GPU has these kernels, and room for their small cases."""
    for case in cases(family):
        size = (case.config, family.dtype, case.steps, case.batch, family.backward)
        try:
            members = max(1, case.members)
            cuda.plan(*size, spec, forced=case.plan, tf32=case.tf32, members=members)
        except ValueError:
            return False
    return True


def _random(*shape: int, seed: list[int]) -> Tensor:
    seed[0] += 1
    generator = torch.Generator().manual_seed(seed[0])
    return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1


def _shapes(config: Config, width: int) -> list[tuple[int, ...]]:
    gates = {"GRU": 3, "LSTM": 4}.get(config.mode, 1) * config.hidden_size
    shapes: list[tuple[int, ...]] = []
    for layer in range(config.num_layers):
        inputs = width if layer == 0 else config.out_size * config.directions
        for _ in range(config.directions):
            shapes += [(gates, inputs), (gates, config.out_size), (gates,), (gates,)]
            shapes += [(config.out_size, config.hidden_size)] if config.proj_size else []
            if config.layer_norm:
                shapes += [(gates,), (gates,)]
                shapes += [(config.hidden_size,)] * 2 if config.mode == "LSTM" else []
    return shapes


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Matrices this small only make torch's threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Call:
    """The arguments of a case in a dtype, and what plain PyTorch makes of them in float64."""

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        config, seed = case.config, [0]
        self.members = case.members

        def rounded(*shape: int, scale: float = 1.0) -> Tensor:
            return (_random(*shape, seed=seed) * scale).to(dtype)

        states = config.num_layers * config.directions
        lstm = config.mode == "LSTM"
        self.x = rounded(case.steps, case.batch, INPUT)
        self.hx = rounded(states, case.batch, config.out_size)
        self.cx = rounded(states, case.batch, config.hidden_size) if lstm else None
        relu = config.mode == "RNN_RELU"
        scale = config.hidden_size**-0.5 / (2 if relu else 1)
        lead, shapes = [case.members] if case.members else [], _shapes(config, INPUT)
        self.weights = [rounded(*lead, *shape, scale=scale) for shape in shapes]
        for w, shape in zip(self.weights, shapes, strict=True):
            if relu and len(shape) == 1:  # biases: far from the jump of the slope, on both sides
                w[..., ::2] += 1
                w[..., 1::2] -= 1
        self.rest: tuple[Any, ...] = (*[None] * 7, 0.0, *config)
        width = config.directions * config.out_size
        sizes = [(case.steps, case.batch, width), (states, case.batch, config.out_size)]
        sizes += [(states, case.batch, config.hidden_size)] if lstm else []
        self.grads, self.grad_tangents = ([rounded(*size) for size in sizes] for _ in range(2))
        given = (self.x, self.hx, self.cx, *self.weights)
        self.direction = [None if t is None else rounded(*t.shape) for t in given]

    def by_member(self, compute: Callable[[_Call], list[Tensor]]) -> list[Tensor]:
        """What `compute` makes of each member's call, in the layout of one call of them all: row b
        is of member b % members, gradients of weights have a leading dimension.
        """
        if not self.members:
            return compute(self)

        def rows(t: Tensor | None, member: int) -> Any:
            return None if t is None else t[:, member :: self.members]

        results = []
        for m in range(self.members):
            own = copy.copy(self)
            own.members = 0
            own.x, own.hx, own.cx = (rows(t, m) for t in (self.x, self.hx, self.cx))
            own.weights = [w[m] for w in self.weights]
            own.grads, own.grad_tangents = (
                [rows(g, m) for g in grads] for grads in (self.grads, self.grad_tangents)
            )
            own.direction = [
                rows(t, m) if i < 3 or t is None else t[m] for i, t in enumerate(self.direction)
            ]
            results.append(compute(own))
        of_rows = 2 + (self.cx is not None)  # of y, hn and cn, or of the gradients of x, hx and cx
        return [
            torch.stack(each, 2).flatten(1, 2) if i < of_rows else torch.stack(each)
            for i, each in enumerate(zip(*results, strict=True))
        ]

    def exact(self, backward: bool) -> list[Tensor]:
        given = (self.x, self.hx, self.cx, *self.weights)
        with torch.enable_grad():
            leaves: list[Any] = [
                None if t is None else t.double().requires_grad_(backward) for t in given
            ]
            x, hx, cx, *weights = leaves
            outputs = [t for t in reference.forward(x, hx, cx, weights, *self.rest) if t.numel()]
            if not backward:
                return outputs
            wanted = [t for t in leaves if t is not None]
            grads = [g.double() for g in self.grads]
            return list(torch.autograd.grad(outputs, wanted, grads))

    def found(self, ops: Any, device: torch.device, backward: bool, plans: Any) -> list[Tensor]:
        """The same by the ops; `plans(backward)` is a context in which they run the family."""
        x, hx, cx, *weights = (
            None if t is None else t.to(device) for t in (self.x, self.hx, self.cx, *self.weights)
        )
        call = (x, hx, cx, weights, *self.rest)
        with torch.no_grad():
            with plans(False):
                y, hn, cn, *kept = ops.forward(*call, True)
            if not backward:
                return [t for t in (y, hn, cn) if t.numel()]
            grads = [*(g.to(device) for g in self.grads), None][:3]
            needs = [t is not None for t in (x, hx, cx, *weights)]
            with plans(True):
                *states, dweights = ops.backward(
                    *grads, None, None, y, *kept, needs, self.members, *call
                )
            return [g for g, need in zip((*states, *dweights), needs, strict=True) if need]

    def exact_tangents(self, backward: bool) -> list[Tensor]:
        """The derivatives of the same along `direction`."""

        def wide(tensors: Any) -> tuple[Any, ...]:
            return tuple(None if t is None else t.double() for t in (*tensors, None)[:3])

        weights = [w.double() for w in self.weights]
        call = Call.of(*wide((self.x, self.hx, self.cx)), weights, *self.rest)
        dweights = [t.double() for t in self.direction[3:] if t is not None]
        direction = (*wide(self.direction[:3]), *dweights)
        needs = [t is not None for t in call.differentiable()]
        u, du = ((*wide(g), None, None) for g in (self.grads, self.grad_tangents))
        given = tangents.TangentCall(u, du, direction, (), needs, 0, call)
        found = derivatives.plain_tangents(given)[backward]
        return [t.detach() for t in found if t is not None and t.numel()]

    def found_tangents(
        self, ops: Any, device: torch.device, backward: bool, plans: Any
    ) -> list[Tensor]:
        def moved(tensors: Any) -> list[Any]:
            return [None if t is None else t.to(device) for t in tensors]

        x, hx, cx, *weights = moved((self.x, self.hx, self.cx, *self.weights))
        dx, dhx, dcx, *dweights = moved(self.direction)
        call, direction = (x, hx, cx, weights, *self.rest), (dx, dhx, dcx, dweights)
        with torch.no_grad(), plans(backward):
            y, _, _, *kept = ops.forward(*call, True)
            dy, dhn, dcn, *dkept = ops.forward_tangent(*direction, y, *kept, True, *call)
            if not backward:
                return [t for t in (dy, dhn, dcn) if t.numel()]
            u, du = (moved((*g, None, None, None)[:5]) for g in (self.grads, self.grad_tangents))
            needs = [t is not None for t in (x, hx, cx, *weights)]
            *states, dweights = ops.backward_tangent(
                *u, *du, *direction, y, *kept, dy, *dkept, needs, self.members, *call
            )
            return [g for g, need in zip((*states, *dweights), needs, strict=True) if need]


def _problem(found: list[Tensor], exact: list[Tensor], tolerance: float) -> str | None:
    for ours, true in zip(found, exact, strict=True):
        ours = ours.cpu().double()
        error = ((ours - true).abs().max() / true.abs().max()).item()
        if not error <= tolerance:  # unlike >, true for NaN
            return f"has an error of {error:.2g} of its largest element, not {tolerance:.0e}"
    return None


def problem(family: Family, ops: Any, device: torch.device) -> str | None:
    """What is wrong with a family's results for its small case; None where they are right.

    `ops` is the namespace of torch.ops whose CUDA kernels run it.
    """

    @contextlib.contextmanager
    def planned(plan: str, tf32: bool) -> Iterator[None]:
        ops.trial(plan, tf32)
        try:
            yield
        finally:
            ops.trial("", False)

    for case in cases(family):
        call = _Call(case, family.dtype)

        def plans(backward: bool, case: Case = case) -> Any:
            # What backward reads is made stepwise: of a launch, one direction is in question.
            if backward == family.backward:
                return planned(case.plan, case.tf32)
            return planned("stepwise", case.tf32)

        exact, run = _Call.exact, call.found
        if family.tangent:
            exact, run = _Call.exact_tangents, call.found_tangents
        found = run(ops, device, family.backward, plans)
        # Normalisation magnifies rounding where a variance is small.
        tolerance = TOLERANCES[family.arithmetic] * (10 if case.config.layer_norm else 1)
        right = call.by_member(functools.partial(exact, backward=family.backward))
        wrong = _problem(found, right, tolerance)
        if wrong:
            return f"of an ensemble {wrong}" if case.members else wrong
    return None


def cpu_problem(family: CpuFamily) -> str | None:
    """The same of CPU kernels; FUSEDRNN_CPU has to name their variant."""
    config = Config(family.mode, 33, 0, 2, True, True)
    configs = [config]
    if family.mode == "LSTM":
        configs += [config._replace(proj_size=17)]
    if family.mode in ("GRU", "LSTM"):
        configs += [config._replace(layer_norm=True)]
    for config in configs:
        for steps, batch, members in ((5, 33, 0), (2, 1, 0), (5, 34, 2)):
            call = _Call(Case(steps, batch, config, members=members), family.dtype)
            plans = lambda backward: contextlib.nullcontext()  # noqa: E731
            found = call.found(torch.ops.fusedrnn, torch.device("cpu"), family.backward, plans)
            tolerance = TOLERANCES[str(family.dtype).removeprefix("torch.")]
            tolerance *= 10 if config.layer_norm else 1
            with _one_thread():
                exact = call.by_member(functools.partial(_Call.exact, backward=family.backward))
            wrong = _problem(found, exact, tolerance)
            if wrong:
                return f"of an ensemble {wrong}" if members else wrong
    return None


def by_number(number: int) -> Family:
    return next(f for f in cuda_families() if f.number == number)


def verify(number: int, namespace: str, device: str) -> str:
    """Why the kernels of a family must not run on a device; empty where they are right.

    A thread of its own computes the case, with none of the modes that surround the call: autograd
    off or in backward, autocast, inference mode, torch.func, default devices.
    """
    family, results = by_number(number), []

    def work() -> None:
        try:
            with _without_sync_debug():
                found = problem(family, getattr(torch.ops, namespace), torch.device(device))
        except Exception as error:
            found = f"failed: {type(error).__name__}: {error}"
        results.append(found or "")

    thread = threading.Thread(target=work, name="fusedrnn check")
    thread.start()
    thread.join()
    return results[0]


@contextlib.contextmanager
def _without_sync_debug() -> Iterator[None]:
    """Reading the results waits for the GPU, which a user may have forbidden."""
    if not torch.cuda.is_initialized():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(0)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
