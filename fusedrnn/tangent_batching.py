"""The batching rules of tangents.py's ops, as batching.py's: members are folded into the batch.

Where weights, or their tangents, differ between members, both come stacked.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fusedrnn import batching, calls, node, ops, tangents
from fusedrnn.batching import Dims

_DIRECTION = 4  # arguments: tangents of x, hx, cx and the weights


class _Fold(batching._Fold):
    """Folds the `arguments` of a call. `dims` and `of_direction`: the batched dimensions of these
    and of their tangents.
    """

    def __init__(self, arguments: Any, dims: Dims, of_direction: Dims, members: int) -> None:
        call = calls.Call.of(*arguments)
        of_weights = any(d is not None for d in of_direction[3] or ())
        super().__init__(call, calls.Call.of(*dims).tensors, members, of_weights)
        self.of_results, self.of_states = call.result_row_dims(), call.row_dims()[:3]
        self.config, self.folded = calls.Config(*call.constants[1:]), self.call()

    def all_rows(self, tensors: Any, dims: Dims, rows: Any) -> list[Tensor | None]:
        return [self.rows(*each) for each in zip(tensors, dims, rows, strict=True)]

    def direction(self, arguments: Any, dims: Dims) -> tuple:
        *states, dweights = arguments
        if self.differ:
            of_weights = dims[3] or [None] * len(dweights)
            pairs = zip(dweights, of_weights, strict=True)
            dweights = [self._weight(t, d) if t.numel() else t for t, d in pairs]
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


def _forward_tangent(info: Any, dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    members, first = info.batch_size, _DIRECTION + calls.MADE + 1  # after the direction and `save`
    fold = _Fold(arguments[first:], dims[first:], dims[:_DIRECTION], members)
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
    members, grads = info.batch_size, 2 * calls.RESULTS
    made = grads + _DIRECTION
    of_made = made + calls.MADE  # the tangents of it
    end = of_made + calls.MADE
    needs, before = arguments[end : end + 2]
    first = end + 2
    fold = _Fold(arguments[first:], dims[first:], dims[grads:made], members)
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
        node.register(name, kernel, "FuncTorchBatched")
