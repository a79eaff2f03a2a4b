"""The batching rules of the ops: what torch.vmap makes of them.

Members that share their weights are folded into the batch, and the op runs once: row b of member m
becomes row b * members + m. So a tensor of rows or tokens has its members right behind these, for
padded and packed input alike, and nested rules fold again. The gradients of shared weights are sums
over each member's rows, by the argument `members` of the backward op. Where weights differ, the op
runs once for each member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedrnn import ops

# The batched dimension of each argument, None where it has none; a list of those of `weights`.
Dims = Any


def _fold(t: Any, dim: int | None, row: int, members: int) -> Any:
    """Puts the members into dimension `row`, that of rows or tokens in one member's tensor."""
    if t is None:
        return None
    if dim is None:
        sizes = [-1] * (row + 1) + [members] + [-1] * (t.dim() - row - 1)
        t = t.unsqueeze(row + 1).expand(sizes)
    else:
        t = t.movedim(dim, row + 1)
    return t.flatten(row, row + 1)


def _unfold(t: Tensor, row: int, members: int) -> tuple[Tensor, int | None]:
    """The inverse: a tensor and the dimension of its members; what is empty has none."""
    if t.dim() == 1:  # left out of the results
        return t, None
    return t.unflatten(row, (t.shape[row] // members, members)), row + 1


def _fold_call(call: ops.Call, dims: Dims, members: int) -> ops.Call:
    """`dims`: of call.tensors."""
    tensors = [
        t if row is None else _fold(t, dim, row, members)
        for t, dim, row in zip(call.tensors, dims, call.row_dims(), strict=True)
    ]
    if call.batch_sizes is not None:
        tensors[ops.BATCH_SIZES] = call.batch_sizes * members
    return call._replace(tensors=tuple(tensors))


def _has_members(dims: Dims) -> bool:
    """Whether weights differ between members; `dims`: of Call.tensors."""
    return any(d is not None for d in dims[3 + ops.NON_DIFFERENTIABLE :])


def _each(op: Callable, members: int, dims: Dims, arguments: Sequence[Any]) -> tuple[Any, Any]:
    """Runs `op` for every member, and stacks the results."""

    def of(member: int, t: Any, dim: Any) -> Any:
        if isinstance(t, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [of(member, one, d) for one, d in zip(t, dim, strict=True)]
        return t if dim is None else t.select(dim, member)

    results = [op(*map(of, [m] * len(dims), arguments, dims)) for m in range(members)]

    def stacked(parts: tuple) -> tuple[Any, Any]:
        if parts[0] is None:
            return None, None
        if isinstance(parts[0], Tensor):
            return torch.stack(parts), 0
        pairs = [stacked(each) for each in zip(*parts, strict=True)]
        return [t for t, _ in pairs], [d for _, d in pairs]

    pairs = [stacked(each) for each in zip(*results, strict=True)]
    return tuple(t for t, _ in pairs), tuple(d for _, d in pairs)


def _forward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    members, save = info.batch_size, arguments[-1]
    call, dims = ops.Call.of(*arguments[:-1]), ops.Call.of(*in_dims[:-1]).tensors
    if _has_members(dims):
        return _each(ops.forward, members, in_dims, arguments)
    folded = _fold_call(call, dims, members)
    y, hn, cn, reserve, hs, cs = ops.forward(*folded.arguments(), save)
    of_y, of_hn, of_cn, of_hs, of_cs = call.result_row_dims()
    rows = (of_y, of_hn, of_cn, 0, of_hs, of_cs)
    pairs = [
        _unfold(t, row, members) for t, row in zip((y, hn, cn, reserve, hs, cs), rows, strict=True)
    ]
    return tuple(t for t, _ in pairs), tuple(d for _, d in pairs)


def _infer(info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    call = ops.plain_call(*arguments, save=False)
    dims = (*in_dims[:4], *[None] * (len(call) - 4))
    (y, hn, cn, *_), (of_y, of_hn, of_cn, *_) = _forward(info, dims, *call)
    if arguments[4] != "LSTM":
        cn = of_cn = None
    return (y, hn, cn), (of_y, of_hn, of_cn)


def _backward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    given = ops.BackwardCall.of(*arguments)
    dims: Any = ops.BackwardCall.of(*in_dims)
    members, call = info.batch_size, given.call
    if _has_members(dims.call.tensors):
        return _each(ops.backward, members, in_dims, arguments)
    folded, rows = _fold_call(call, dims.call.tensors, members).arguments(), call.result_row_dims()
    grads = [
        _fold(g, d, row, members) for g, d, row in zip(given.grads, dims.grads, rows, strict=True)
    ]
    if dims.made[1] is None:
        # Only gradients are batched: forward ran on one member's rows, and so is its reserve.
        y, _, _, reserve, hs, cs = ops.forward(*folded, True)
        made = [y, reserve, hs, cs]
    else:
        of_made = zip(given.made, dims.made, (rows[0], 0, rows[3], rows[4]), strict=True)
        # The results of several calls, stacked, lie otherwise than the op makes them.
        made = [t if d is None else _fold(t, d, row, members).contiguous() for t, d, row in of_made]
    groups = max(given.members, 1) * members
    *states, dweights = ops.backward(*grads, *made, given.needs, groups, *folded)
    pairs = [_unfold(t, row, members) for t, row in zip(states, (rows[0], 1, 1), strict=True)]

    def of_members(gradient: Tensor, needed: bool) -> tuple[Tensor, int | None]:
        if not needed:
            return gradient, None
        if not given.members:
            return gradient, 0
        return gradient.unflatten(0, (given.members, members)), 1

    weights = [of_members(g, n) for g, n in zip(dweights, given.needs[3:], strict=True)]
    return (
        (*(t for t, _ in pairs), [t for t, _ in weights]),
        (*(d for _, d in pairs), [d for _, d in weights]),
    )


def register() -> None:
    torch.library.register_vmap("fusedrnn::forward", _forward)
    torch.library.register_vmap("fusedrnn::infer", _infer)
    torch.library.register_vmap("fusedrnn::backward", _backward)
