"""The batching rules of tangents.py's ops, as batching.py's: members are folded into the batch.

Where weights, or their tangents, differ between members, the op runs once for each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fusedrnn import batching, ops, tangents
from fusedrnn.batching import Dims

_DIRECTION = 4  # arguments: tangents of x, hx, cx and the weights
_CALL = 4 + ops.NON_DIFFERENTIABLE + 1 + len(ops.Config._fields)  # arguments of ops.Call.of


def _each(op: Callable, members: int, dims: Dims, arguments: Any, made: int) -> tuple[Any, Any]:
    """Runs `op` for every member, and stacks the results. y and the reserve are at `made`."""

    def of(m: int, t: Any, dim: Any) -> Any:
        if isinstance(dim, list):
            return [of(m, one, d) for one, d in zip(t, dim, strict=True)]
        return t if dim is None else t.select(dim, m)

    def result(m: int) -> Any:
        own = [of(m, t, dim) for t, dim in zip(arguments, dims, strict=True)]
        if dims[made + 1] is not None:
            # No part of the reserve that forward made of all members is that of one.
            own[made], _, _, own[made + 1], *_ = ops.forward(*own[-_CALL:], True)
        return op(*own)

    results = [result(m) for m in range(members)]

    def stacked(parts: tuple) -> Any:
        if isinstance(parts[0], Tensor):
            return torch.stack(parts)
        return [stacked(each) for each in zip(*parts, strict=True)]

    found = tuple(stacked(each) for each in zip(*results, strict=True))
    return found, tuple([0] * len(t) if isinstance(t, list) else 0 for t in found)


class _Fold(batching._Fold):
    """Folds `arguments` of a call, of which `dims` says what is batched."""

    def __init__(self, arguments: Any, dims: Dims, members: int) -> None:
        call = ops.Call.of(*arguments)
        super().__init__(call, ops.Call.of(*dims).tensors, members)
        self.of_results, self.of_states = call.result_row_dims()[:3], call.row_dims()[:3]
        self.config, self.folded = ops.Config(*call.constants[1:]), self.call()

    def all_rows(self, tensors: Any, dims: Dims, rows: Any) -> list[Tensor | None]:
        return [self.rows(*each) for each in zip(tensors, dims, rows, strict=True)]

    def direction(self, arguments: Any, dims: Dims) -> tuple:
        *states, dweights = arguments
        return (*self.all_rows(states, dims[:3], self.of_states), dweights)

    def made(self, tensors: Any, dims: Dims) -> tuple[Tensor, Tensor] | None:
        """y and the reserve as the op lays them out, or their tangents; None where an outer rule's
        members are not apart in them.
        """
        y, reserve = tensors
        if dims[0] is not None and dims[1] is not None:
            y = self.rows(y, dims[0], self.of_results[0])
            reserve = self.rows(reserve, dims[1], 0)
            return y.contiguous(), reserve.contiguous()
        if batching._is_batched(reserve) or dims[0] is not None or dims[1] is not None:
            return None
        none = y.new_empty(0)
        repeated = self.repeated(
            (y, reserve, none, none), (self.of_results[0], *[0] * 4), self.config
        )
        return repeated[0], repeated[1]

    def of_forward(self, tensors: Any, dims: Dims) -> tuple[Tensor, Tensor]:
        made = self.made(tensors, dims)
        if made is None:
            y, _, _, reserve, *_ = ops.forward(*self.folded.arguments(), True)
            return y, reserve
        return made

    def unfolded_all(self, results: Any, rows: Any) -> tuple[list, list]:
        pairs = [self.unfolded(t, row) for t, row in zip(results, rows, strict=True)]
        return [t for t, _ in pairs], [d for _, d in pairs]


def _weights_differ(call_dims: Dims, direction_dims: Dims) -> bool:
    of_weights = ops.Call.of(*call_dims).tensors[ops.FIRST_WEIGHT :]
    return any(d is not None for d in (*of_weights, *(direction_dims[3] or ())))


def _forward_tangent(info: Any, dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    members, first = info.batch_size, _DIRECTION + 3  # after the direction y, reserve, save
    if _weights_differ(dims[first:], dims[:_DIRECTION]):
        return _each(tangents.forward_tangent, members, dims, arguments, _DIRECTION)
    fold = _Fold(arguments[first:], dims[first:], members)
    made, of_made = arguments[_DIRECTION : first - 1], dims[_DIRECTION : first - 1]
    results = tangents.forward_tangent(
        *fold.direction(arguments[:_DIRECTION], dims),
        *fold.of_forward(made, of_made),
        arguments[first - 1],
        *fold.folded.arguments(),
    )
    found, of_found = fold.unfolded_all(results, (*fold.of_results, 0))
    return tuple(found), tuple(of_found)


def _backward_tangent(info: Any, dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    members, grads = info.batch_size, 2 * tangents.STATES
    made = grads + _DIRECTION  # y, reserve, and the tangents of both
    needs, before = arguments[made + 4 : made + 6]
    first = made + 6
    if _weights_differ(dims[first:], dims[grads:made]):
        return _each(tangents.backward_tangent, members, dims, arguments, made)
    fold = _Fold(arguments[first:], dims[first:], members)
    call = fold.folded.arguments()
    direction = fold.direction(arguments[grads:made], dims[grads:made])
    values = fold.of_forward(arguments[made : made + 2], dims[made : made + 2])
    of_values = fold.made(arguments[made + 2 : made + 4], dims[made + 2 : made + 4])
    if of_values is None:
        dy, _, _, dreserve = tangents.forward_tangent(*direction, *values, True, *call)
        of_values = dy, dreserve
    given = fold.all_rows(arguments[:grads], dims[:grads], 2 * fold.of_results)
    *states, dweights = tangents.backward_tangent(
        *given, *direction, *values, *of_values, needs, fold.groups(before), *call
    )
    found, of_found = fold.unfolded_all(states, fold.of_states)
    pairs = [fold.gradient(g, n, before) for g, n in zip(dweights, needs[3:], strict=True)]
    return (*found, [g for g, _ in pairs]), (*of_found, [d for _, d in pairs])


def register() -> None:
    rules = (
        (tangents.forward_tangent, _forward_tangent),
        (tangents.backward_tangent, _backward_tangent),
    )
    for op, rule in rules:
        name = op.name().removesuffix(".default")
        kernel = batching._at_level(op, rule)
        batching._library.impl(name, kernel, "FuncTorchBatched", with_keyset=True)
