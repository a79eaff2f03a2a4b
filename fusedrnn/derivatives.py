"""Derivatives of the ops through the plain PyTorch implementation, any number of times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

from fusedrnn import reference

if TYPE_CHECKING:
    from fusedrnn.ops import Call


def plain_gradients(
    call: Call, needs: list[bool], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of call.differentiable() by the reference; None where not required."""
    with torch.enable_grad():
        leaves = [
            t if t is None else t.detach().requires_grad_(need)
            for t, need in zip(call.differentiable(), needs, strict=True)
        ]
        sources = [
            leaf if leaf is None else _with_tangent_of(t, leaf)
            for t, leaf in zip(call.differentiable(), leaves, strict=True)
        ]
        tensors = (*sources[:3], *call.non_differentiable(), *sources[3:])
        outputs = reference.forward(*call._replace(tensors=tensors).arguments())
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            [t for t in leaves if t is not None and t.requires_grad],
            [g for _, g in pairs],
            allow_unused=True,
        )
    )
    return tuple(next(found) if need else None for need in needs)


def _with_tangent_of(t: Any, leaf: Tensor) -> Tensor:
    if forward_ad._current_level < 0:
        return leaf
    tangent = forward_ad.unpack_dual(t).tangent
    return leaf if tangent is None else forward_ad.make_dual(leaf, tangent)


def _fresh(t: Tensor) -> Tensor:
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


def second_derivatives(
    grads_out: tuple[Tensor | None, ...],
    call: Call,
    needs: list[bool],
    grad_grads: tuple[Tensor | None, ...],
    create_graph: bool,
) -> tuple:
    """Differentiates the backward op, any number of times.

    Returns the gradients of grads_out and of call.tensors.
    """
    with torch.enable_grad():
        results = len(grads_out)
        # Fresh nodes: the graph that made the arguments is not differentiated here.
        sources = [
            _fresh(t) if t is not None and t.requires_grad else t
            for t in (*grads_out, *call.tensors)
        ]
        here = call._replace(tensors=tuple(sources[results:]))
        outputs = reference.forward(*here.arguments())
        pairs = [(o, g) for o, g in zip(outputs, sources[:results], strict=True) if g is not None]
        wanted = [
            (t, gg)
            for t, need, gg in zip(here.differentiable(), needs, grad_grads, strict=True)
            if need and gg is not None
        ]
        if not pairs or not wanted:
            return (None,) * len(sources)
        first = torch.autograd.grad(
            [o for o, _ in pairs],
            [t for t, _ in wanted if t is not None],
            [g for _, g in pairs],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        live = [(g, gg) for g, (_, gg) in zip(first, wanted, strict=True) if g.requires_grad]
        leaves = [t for t in sources if t is not None and t.requires_grad]
        second: Any = [None] * len(leaves)
        if live:
            second = torch.autograd.grad(
                [g for g, _ in live],
                leaves,
                [gg for _, gg in live],
                create_graph=create_graph,
                allow_unused=True,
            )
    found = iter(second)
    return tuple(next(found) if t is not None and t.requires_grad else None for t in sources)


def of_members(
    members: int,
    grads_out: tuple[Tensor | None, ...],
    call: Call,
    needs: list[bool],
    grad_grads: tuple[Tensor | None, ...],
    create_graph: bool,
) -> tuple:
    """second_derivatives of the backward op with `members`, one member after the other."""
    if not members:
        return second_derivatives(grads_out, call, needs, grad_grads, create_graph)
    dims = (*call.result_row_dims(), *call.row_dims())
    of_weights = len(call.differentiable()) - 3
    stacked = len(call.tensors[-1]) if call.stacked else 0  # type: ignore[arg-type]
    grad_dims = (*call.row_dims()[:3], *[None] * of_weights)

    def of(m: int, t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None or dim is None or t.dim() <= dim:
            return t
        return t[(slice(None),) * dim + (slice(m, None, members),)]

    with torch.enable_grad():
        sources = [
            _fresh(t) if t is not None and t.requires_grad else t
            for t in (*grads_out, *call.tensors)
        ]
    parts = []
    for m in range(members):
        with torch.enable_grad():
            given = [of(m, t, d) for t, d in zip(sources, dims, strict=True)]
        tensors = tuple(given[len(grads_out) :])
        if stacked:
            own_weights = tuple(w[m % stacked] for w in tensors[-of_weights:])  # type: ignore[index]
            tensors = (*tensors[:-of_weights], *own_weights)
        if call.batch_sizes is not None:
            tensors = (*tensors[:3], call.batch_sizes // members, *tensors[4:])
        own = [of(m, gg, d) for gg, d in zip(grad_grads, grad_dims, strict=True)]
        own[3:] = [None if gg is None else gg[m] for gg in own[3:]]
        parts.append(
            second_derivatives(
                tuple(given[: len(grads_out)]),
                call._replace(tensors=tensors),
                needs,
                tuple(own),
                create_graph,
            )
        )
    found = list(zip(*parts, strict=True))
    grads = [_joined(of_all, dim) for of_all, dim in zip(found, dims, strict=True)]
    for i in range(len(found) - of_weights, len(found)):
        if stacked and grads[i] is not None:
            each: Any = [_joined(found[i][m::stacked], None) for m in range(stacked)]
            grads[i] = torch.stack(each)
    return tuple(grads)


def _joined(parts: tuple[Tensor | None, ...], dim: int | None) -> Tensor | None:
    """The gradient of a tensor from those of its members' rows, or of what they share."""
    found = [p for p in parts if p is not None]
    if not found:
        return None
    if dim is None:
        return torch.stack(found).sum(0)
    return torch.stack(found, dim + 1).flatten(dim, dim + 1)
