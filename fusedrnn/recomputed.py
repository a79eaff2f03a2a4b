"""The steps of the plain implementation in chunks whose graphs are made again when they are needed.

A graph of all T steps holds every operator's results, and its derivatives hold several times as
much. Here the graph has a node for each chunk of about sqrt(T) steps. A node holds the tensors that
its chunk is computed from; its derivative is a node too, which computes the chunk and goes back
through it. So derivatives of any order hold the operators' results of one chunk at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from fusedrnn import batched_gradients
from fusedrnn.reference import Advance, Constants, OfInput, State, Steps, each_step

LEAST_STEPS = 16  # of a chunk

Function = Callable[..., "tuple[Tensor | None, ...]"]


def fresh(t: Tensor) -> Tensor:
    """A tensor that requires a gradient and is a node of its own."""
    source = t.view_as(t)
    if source.requires_grad:
        return source
    # A tensor of a transform that has ended, as in jacrev of jacrev: operators see what it wrapped.
    before = _functorch.get_inplace_requires_grad_allowed()
    _functorch.set_inplace_requires_grad_allowed(True)
    try:
        return source.detach().requires_grad_()
    finally:
        _functorch.set_inplace_requires_grad_allowed(before)


def gradients_of(
    results: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    sources: Sequence[Tensor | None],
    wanted: Sequence[bool],
    create_graph: bool,
) -> tuple[Tensor | None, ...]:
    """torch.autograd.grad where any of the tensors may be None; None for what is not wanted."""
    pairs = [
        (r, g)
        for r, g in zip(results, grads, strict=True)
        if r is not None and g is not None and r.requires_grad
    ]
    leaves = [t for t, w in zip(sources, wanted, strict=True) if t is not None and w]
    found: Any = [None] * len(leaves)
    if pairs:
        found = torch.autograd.grad(
            [r for r, _ in pairs],
            leaves,
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    rest = iter(found)
    return tuple(
        next(rest) if t is not None and w else None for t, w in zip(sources, wanted, strict=True)
    )


def _vjp(function: Function, wanted: Sequence[bool]) -> Function:
    """A function of its tensors and of the gradients of its results: the gradients of `wanted`."""

    def gradients(*given: Tensor | None) -> tuple[Tensor | None, ...]:
        create_graph = torch.is_grad_enabled()
        tensors, grads = given[: len(wanted)], given[len(wanted) :]
        with torch.enable_grad():
            sources = [
                fresh(t) if t is not None and w else t for t, w in zip(tensors, wanted, strict=True)
            ]
            results = function(*sources)
        return gradients_of(results, grads, sources, wanted, create_graph)

    return gradients


class _Recomputed(torch.autograd.Function):
    """function(*tensors), whose graph is made in each derivative and dropped at its end."""

    @staticmethod
    def forward(ctx: Any, function: Function, *tensors: Tensor | None):  # type: ignore[no-untyped-def]
        ctx.function = function
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        seen: set[int] = set()
        results = []
        for r in function(*tensors):
            # A tensor may be the gradient of two others: a node's results are tensors of their own.
            results.append(r.clone() if r is not None and id(r) in seen else r)
            seen.add(id(r))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = _vjp(ctx.function, ctx.needs_input_grad[1:])
        return (None, *_Recomputed.apply(gradients, *ctx.saved_tensors, *grads))


def _records_one_graph(tensors: Sequence[Tensor | None]) -> bool:
    """Whether autograd alone differentiates what is computed from these."""
    return (
        torch.is_grad_enabled()
        and any(t is not None and t.requires_grad for t in tensors)
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and not torch.compiler.is_compiling()
        and not batched_gradients.are_batched(tuple(tensors))
    )


def each_chunk(
    advance: Advance,
    of_input: OfInput,
    constants: Constants,
    state: State,
    steps: Steps,
    reverse: bool,
) -> tuple[State, State]:
    """reference.each_step, in chunks."""
    count = len(steps.x)
    length = max(LEAST_STEPS, math.isqrt(count))
    chunks = -(-count // length)
    given = tree_flatten((of_input, constants, state, steps))[0]
    if chunks <= 1 or not _records_one_graph(given):
        return each_step(advance, of_input, constants, state, steps, reverse)
    # Not slices, whose derivatives have the size of all steps.
    parts: Any = [[None] * chunks if s is None else s.split(length) for s in steps]
    outputs: list[Any] = [None] * chunks
    for i in reversed(range(chunks)) if reverse else range(chunks):
        chunk = Steps(*[of[i] for of in parts])
        tensors, form = tree_flatten((of_input, constants, state, chunk))
        function = partial(_run, partial(each_step, advance, reverse=reverse), form)
        h, c, *outputs[i] = _Recomputed.apply(function, *tensors)
        state = h, c
    ys, cells = zip(*outputs, strict=True)
    return state, (torch.cat(ys), None if state[1] is None else torch.cat(cells))


def _run(loop: Any, form: TreeSpec, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """each_step with what was flattened to these tensors."""
    given: Any = tree_unflatten(tensors, form)
    (h, c), (y, cs) = loop(*given)
    return h, c, y, cs
