"""Derivatives of the ops through the plain PyTorch implementation, any number of times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fusedrnn import reference
from fusedrnn.recomputed import each_chunk, fresh, gradients_of

if TYPE_CHECKING:
    from fusedrnn.calls import Call
    from fusedrnn.tangents import TangentCall


def asked_for(ctx: Any, needs: Sequence[bool], tensors: Sequence[Tensor | None]) -> list[bool]:
    """Which of the gradients that a node's tensors need this pass of autograd asks for.

    torch.autograd.grad may ask for those of the input alone, though the weights require them too.
    """

    def asked(node: Any) -> bool:
        try:
            return torch._C._will_engine_execute_node(node)
        except RuntimeError:  # a leaf that is asked for, or a backward that no engine runs
            return True

    nodes = (node for node, _ in ctx.next_functions)  # of every tensor
    of_tensors = [None if t is None else next(nodes) for t in tensors]
    return [n and asked(node) for n, node in zip(needs, of_tensors, strict=True)]


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
        outputs = reference.forward(
            *call.with_differentiable(tuple(sources)).arguments(), loop=each_chunk
        )
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
            fresh(t) if t is not None and t.requires_grad else t
            for t in (*grads_out, *call.tensors)
        ]
        here = call._replace(tensors=tuple(sources[results:]))
        outputs = reference.forward(*here.arguments(), loop=each_chunk)
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
    requires = [t is not None and t.requires_grad for t in sources]
    return gradients_of(first, [gg for _, gg in wanted], sources, requires, create_graph)


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
        return _rows_of(t, dim, m, members)

    with torch.enable_grad():
        sources = [
            fresh(t) if t is not None and t.requires_grad else t
            for t in (*grads_out, *call.tensors)
        ]
    parts = []
    for m in range(members):
        with torch.enable_grad():
            given = [of(m, t, d) for t, d in zip(sources, dims, strict=True)]
        tensors = given[len(grads_out) :]
        if stacked:
            tensors[-of_weights:] = [w[m % stacked] for w in tensors[-of_weights:]]  # type: ignore[index]
        here = _with_rows(call, tensors, members)
        own = [of(m, gg, d) for gg, d in zip(grad_grads, grad_dims, strict=True)]
        own[3:] = [None if gg is None else gg[m] for gg in own[3:]]
        parts.append(
            second_derivatives(
                tuple(given[: len(grads_out)]),
                here,
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


def _rows_of(t: Tensor | None, dim: int | None, member: int, members: int) -> Tensor | None:
    if t is None or dim is None or t.dim() <= dim:
        return t
    return t[(slice(None),) * dim + (slice(member, None, members),)]


def _with_rows(call: Call, tensors: list[Tensor | None], members: int) -> Call:
    """The call of one member, which has these tensors."""
    if call.batch_sizes is not None:
        tensors = [*tensors[:3], call.batch_sizes // members, *tensors[4:]]
    return call._replace(tensors=tuple(tensors))


def _joined(parts: tuple[Tensor | None, ...], dim: int | None) -> Tensor | None:
    """The gradient of a tensor from those of its members' rows, or of what they share."""
    found = [p for p in parts if p is not None]
    if not found:
        return None
    if dim is None:
        return torch.stack(found).sum(0)
    return torch.stack(found, dim + 1).flatten(dim, dim + 1)


def leaf_of(t: Tensor) -> Tensor:
    """The same as a node of its own that requires a gradient, with its tangent."""
    leaf = fresh(t)
    return leaf if t.requires_grad else _with_tangent_of(t, leaf)


def plain_tangents(given: TangentCall) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """What tangents.py's ops compute, by the reference, any number of times.

    Returns F'(v), the tangents of forward's results, and of what is needed B'(v, u) + B(du).
    """
    if given.members:
        return (), _tangents_of_members(given)
    call, needs = given.call, given.needs or [False] * len(given.direction)
    with torch.enable_grad():
        leaves = tuple(
            leaf_of(t) if t is not None and t.is_floating_point() else t
            for t in call.differentiable()
        )
        outputs = reference.forward(*call.with_differentiable(leaves).arguments(), loop=each_chunk)
        made = [o for o in outputs if o.requires_grad]  # cn, hs and cs may be empty
        pairs = [(o, u) for o, u in zip(outputs, given.u, strict=True) if o.requires_grad]
        forms = [leaf_of(torch.zeros_like(o) if u is None else u) for o, u in pairs]
        wanted = [t for t, n in zip(leaves, needs, strict=True) if n]
        along = [(t, v) for t, v in zip(leaves, given.direction, strict=True) if v is not None]
        found = [torch.zeros_like(t) for t in (*forms, *wanted) if t is not None]
        if along:
            first = _gradients(made, [t for t, _ in along], forms)
            found = _gradients(first, [*forms, *wanted], [v for _, v in along])
        if any(du is not None for du in given.du):
            directions = zip(outputs, given.du, strict=True)
            both = [(o, du) for o, du in directions if du is not None and o.requires_grad]
            linear = _gradients([o for o, _ in both], wanted, [du for _, du in both])
            found[len(forms) :] = [a + b for a, b in zip(found[len(forms) :], linear, strict=True)]
    of_outputs, of_wanted = iter(found[: len(forms)]), iter(found[len(forms) :])
    return (
        tuple(next(of_outputs) if o.requires_grad else o for o in outputs),
        tuple(next(of_wanted) if n else None for n in needs),
    )


def _gradients(outputs: Any, leaves: Any, forms: Any) -> list[Tensor]:
    """Differentiable, and zeros where there is no dependence."""
    live = [(o, f) for o, f in zip(outputs, forms, strict=True) if o.requires_grad]
    if not live or not leaves:
        return [torch.zeros_like(t) for t in leaves]
    return list(
        torch.autograd.grad(
            [o for o, _ in live],
            leaves,
            [f for _, f in live],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _tangents_of_members(given: TangentCall) -> tuple[Tensor | None, ...]:
    """Of backward_tangent with `members`, one after the other."""
    call, members = given.call, given.members
    of_results, of_tensors = call.result_row_dims(), call.row_dims()
    of_weights = len(given.direction) - 3
    of_direction = (*of_tensors[:3], *[None] * of_weights)
    stacked = len(call.tensors[-1]) if call.stacked else 0  # type: ignore[arg-type]

    def of(m: int, tensors: tuple, dims: tuple, weighted: bool = False) -> list[Tensor | None]:
        own = [_rows_of(t, dim, m, members) for t, dim in zip(tensors, dims, strict=True)]
        if weighted and stacked:
            own[-of_weights:] = [None if w is None else w[m % stacked] for w in own[-of_weights:]]
        return own

    parts = []
    for m in range(members):
        with torch.enable_grad():
            own = given._replace(
                u=tuple(of(m, given.u, of_results)),
                du=tuple(of(m, given.du, of_results)),
                direction=tuple(of(m, given.direction, of_direction, True)),
                members=0,
                call=_with_rows(call, of(m, call.tensors, of_tensors, True), members),
            )
        parts.append(plain_tangents(own)[1])
    with torch.enable_grad():
        return tuple(
            None
            if each[0] is None
            else torch.stack(each)
            if dim is None
            else torch.stack(each, dim + 1).flatten(dim, dim + 1)
            for each, dim in zip(zip(*parts, strict=True), of_direction, strict=True)
        )
