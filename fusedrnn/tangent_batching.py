"""The batching rules of tangents.py's ops, as batching.py's: members are folded into the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedrnn import ops, tangents
from fusedrnn.batching import Dims, _each, _fold, _fold_call, _has_members, _unfold


class _Folding:
    """Of all members' calls into one, where weights, and tangents of these, are shared."""

    def __init__(self, members: int, call: ops.Call, dims: Dims) -> None:
        self.members = members
        self.results = call.result_row_dims()[:3]
        self.states = call.row_dims()[:3]
        self.call = _fold_call(call, dims, members)

    def rows(self, tensors: Any, dims: Dims, rows: Any) -> list[Tensor | None]:
        each = zip(tensors, dims, rows, strict=True)
        return [_fold(t, dim, row, self.members) for t, dim, row in each]

    def made(self, tensors: Any, dims: Dims) -> list[Any]:
        """y and the reserve, or their tangents, as the ops lay them out; `dims`: not None."""
        return [
            t.contiguous() for t in self.rows(tensors, dims, (self.results[0], 0)) if t is not None
        ]

    def of_forward(self, tensors: Any, dims: Dims) -> list[Tensor]:
        """y and the reserve of the folded call."""
        if None not in dims:
            return self.made(tensors, dims)
        # A reserve of one member's rows is no part of that of all rows.
        y, _, _, reserve, *_ = ops.forward(*self.call.arguments(), True)
        return [y, reserve]

    def unfolded(self, results: Any, rows: Any) -> tuple[list, list]:
        pairs = [_unfold(t, row, self.members) for t, row in zip(results, rows, strict=True)]
        return [t for t, _ in pairs], [d for _, d in pairs]


def _forward_tangent(info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    members = info.batch_size
    (*states, dweights, y, reserve, save), call = arguments[:7], ops.Call.of(*arguments[7:])
    (*state_dims, weight_dims, of_y, of_reserve, _) = in_dims[:7]
    dims = ops.Call.of(*in_dims[7:]).tensors
    if _has_members(dims) or any(d is not None for d in weight_dims):
        return _each(tangents.forward_tangent, members, in_dims, arguments)
    fold = _Folding(members, call, dims)
    results = tangents.forward_tangent(
        *fold.rows(states, state_dims, fold.states),
        dweights,
        *fold.of_forward((y, reserve), (of_y, of_reserve)),
        save,
        *fold.call.arguments(),
    )
    found, of_found = fold.unfolded(results, (*fold.results, 0))
    return tuple(found), tuple(of_found)


def _backward_tangent(info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    members, grads = info.batch_size, 2 * tangents.STATES
    (*states, dweights), made = arguments[grads : grads + 4], arguments[grads + 4 : grads + 8]
    needs, before = arguments[grads + 8 : grads + 10]
    call, dims = ops.Call.of(*arguments[grads + 10 :]), ops.Call.of(*in_dims[grads + 10 :]).tensors
    (*state_dims, weight_dims), made_dims = in_dims[grads : grads + 4], in_dims[grads + 4 :]
    if _has_members(dims) or any(d is not None for d in weight_dims):
        return _each(tangents.backward_tangent, members, in_dims, arguments)
    fold = _Folding(members, call, dims)
    direction = (*fold.rows(states, state_dims, fold.states), dweights)
    values, call_arguments = fold.of_forward(made[:2], made_dims[:2]), fold.call.arguments()
    if None in made_dims[2:4]:
        dy, _, _, dreserve = tangents.forward_tangent(*direction, *values, True, *call_arguments)
    else:
        dy, dreserve = fold.made(made[2:], made_dims[2:4])
    *gradients, of_weights = tangents.backward_tangent(
        *fold.rows(arguments[:grads], in_dims[:grads], 2 * fold.results),
        *direction,
        *values,
        dy,
        dreserve,
        needs,
        max(before, 1) * members,
        *call_arguments,
    )
    found, of_found = fold.unfolded(gradients, fold.states)
    weights, of_each = [], []
    for gradient, needed in zip(of_weights, needs[3:], strict=True):
        weights.append(gradient.unflatten(0, (before, members)) if needed and before else gradient)
        of_each.append((1 if before else 0) if needed else None)
    return (*found, weights), (*of_found, of_each)


def register() -> None:
    torch.library.register_vmap("fusedrnn::forward_tangent", _forward_tangent)
    torch.library.register_vmap("fusedrnn::backward_tangent", _backward_tangent)
