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
    """Runs `op` for every member, and stacks the results. What forward made is at `made`."""

    def of(m: int, t: Any, dim: Any) -> Any:
        if isinstance(dim, list):
            return [of(m, one, d) for one, d in zip(t, dim, strict=True)]
        return t if dim is None else t.select(dim, m)

    def result(m: int) -> Any:
        own = [of(m, t, dim) for t, dim in zip(arguments, dims, strict=True)]
        if dims[made + 1] is not None:
            # No part of the reserve that forward made of all members is that of one.
            own[made], _, _, *own[made + 1 : made + ops.MADE] = ops.forward(*own[-_CALL:], True)
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
        self.of_results, self.of_states = call.result_row_dims(), call.row_dims()[:3]
        self.config, self.folded = ops.Config(*call.constants[1:]), self.call()

    def all_rows(self, tensors: Any, dims: Dims, rows: Any) -> list[Tensor | None]:
        return [self.rows(*each) for each in zip(tensors, dims, rows, strict=True)]

    def direction(self, arguments: Any, dims: Dims) -> tuple:
        *states, dweights = arguments
        return (*self.all_rows(states, dims[:3], self.of_states), dweights)

    def made(self, tensors: Any, dims: Dims) -> tuple | None:
        """y, the reserve, hs and cs as the op lays them out, or their tangents; None where an outer
        rule's members are not apart in them.
        """
        of_y, _, _, of_hs, of_cs = self.of_results
        if dims[0] is not None and dims[1] is not None:
            each = zip(tensors, dims, (of_y, 0, of_hs, of_cs), strict=True)
            return tuple(
                t if d is None else self.rows(t, d, row).contiguous() for t, d, row in each
            )
        if batching._is_batched(tensors[1]) or any(d is not None for d in dims):
            return None
        return self.repeated(tensors, self.of_results, self.config)

    def of_forward(self, tensors: Any, dims: Dims) -> tuple:
        made = self.made(tensors, dims)
        if made is None:
            y, _, _, *kept = ops.forward(*self.folded.arguments(), True)
            return (y, *kept)
        return made

    def unfolded_all(self, results: Any, rows: Any) -> tuple[list, list]:
        pairs = [self.unfolded(t, row) for t, row in zip(results, rows, strict=True)]
        return [t for t, _ in pairs], [d for _, d in pairs]


def _weights_differ(call_dims: Dims, direction_dims: Dims) -> bool:
    of_weights = ops.Call.of(*call_dims).tensors[ops.FIRST_WEIGHT :]
    return any(d is not None for d in (*of_weights, *(direction_dims[3] or ())))


def _forward_tangent(info: Any, dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    members, first = info.batch_size, _DIRECTION + ops.MADE + 1  # after the direction and `save`
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
    of_y, of_hn, of_cn, of_hs, of_cs = fold.of_results
    found, of_found = fold.unfolded_all(results, (of_y, of_hn, of_cn, 0, of_hs, of_cs))
    return tuple(found), tuple(of_found)


def _backward_tangent(info: Any, dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    members, grads = info.batch_size, 2 * ops.RESULTS
    made = grads + _DIRECTION
    of_made = made + ops.MADE  # the tangents of it
    end = of_made + ops.MADE
    needs, before = arguments[end : end + 2]
    first = end + 2
    if _weights_differ(dims[first:], dims[grads:made]):
        return _each(tangents.backward_tangent, members, dims, arguments, made)
    fold = _Fold(arguments[first:], dims[first:], members)
    call = fold.folded.arguments()
    direction = fold.direction(arguments[grads:made], dims[grads:made])
    values = fold.of_forward(arguments[made:of_made], dims[made:of_made])
    of_values = fold.made(arguments[of_made:end], dims[of_made:end])
    if of_values is None:
        dy, _, _, *kept = tangents.forward_tangent(*direction, *values, True, *call)
        of_values = (dy, *kept)
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
