"""The batching rules of the ops: what torch.vmap makes of them.

Members are folded into the batch, and the op runs once. Row b of member m becomes row
b * members + m, so a tensor of rows or tokens has its members right behind these, for padded and
packed input alike, and nested rules fold again. Weights that differ between members are stacked:
row b has weights b % ensemble, so members that share weights which an inner rule has stacked come
before those. Gradients of weights are sums over each member's rows, by the argument `members` of
the backward op.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

from fusedrnn import calls, node, ops

# The batched dimension of each argument, None where it has none; a list of those of `weights`.
Dims = Any
Batched = tuple[Tensor, int | None]


class _Fold:
    """Folds the members of a call and what belongs to it. `dims`: of call.tensors. Weights are
    stacked where they differ between members, or where `differ` says so.
    """

    def __init__(self, call: calls.Call, dims: Dims, members: int, differ: bool = False) -> None:
        self._given, self._dims, self.members = call, dims, members
        of_weights = dims[calls.FIRST_WEIGHT :]
        self.differ = differ or any(d is not None for d in of_weights)
        w_ih: Any = call.tensors[calls.FIRST_WEIGHT]
        shape = list(w_ih.shape)
        if of_weights[0] is not None:
            del shape[of_weights[0]]
        # How many weights an inner rule has stacked, 0 if it has not; the rows behind members.
        self.stacked = shape[0] if len(shape) == 3 else 0
        self.inner = 1 if self.differ else max(self.stacked, 1)

    def call(self) -> calls.Call:
        given, dims = self._given, self._dims
        tensors = [
            t if row is None else self.rows(t, dim, row)
            for t, dim, row in zip(given.tensors, dims, given.row_dims(), strict=True)
        ]
        if given.batch_sizes is not None:
            tensors[calls.BATCH_SIZES] = given.batch_sizes * self.members
        if self.differ:
            first = calls.FIRST_WEIGHT
            tensors[first:] = map(self._weight, tensors[first:], dims[first:])
        return given._replace(tensors=tuple(tensors))

    def rows(self, t: Any, dim: int | None, row: int) -> Any:
        """Puts the members into dimension `row`, that of rows or tokens in one member's tensor."""
        if t is None:
            return None
        t = self._with_members(t, dim, row)
        t = t.unflatten(row + 1, (t.shape[row + 1] // self.inner, self.inner))
        return t.movedim(row, row + 1).flatten(row, row + 2)

    def _with_members(self, t: Tensor, dim: int | None, at: int) -> Tensor:
        if dim is not None:
            return t.movedim(dim, at)
        return t.unsqueeze(at).expand(*t.shape[:at], self.members, *t.shape[at:])

    def _weight(self, t: Any, dim: int | None) -> Tensor:
        if self.stacked:
            return self._with_members(t, dim, 1).flatten(0, 1)
        return self._with_members(t, dim, 0)

    def unfolded(self, t: Tensor, row: int) -> Batched:
        """The inverse of `rows`: a tensor and the dimension of its members."""
        if t.dim() == 1:  # left out of the results
            return t, None
        rows = t.shape[row] // (self.members * self.inner)
        t = t.unflatten(row, (rows, self.members, self.inner))
        if self.inner == 1:
            return t.squeeze(row + 2), row + 1
        return t.movedim(row + 1, 0).flatten(row + 1, row + 2), 0

    def groups(self, members: int) -> int:
        """The argument `members` of backward, which was `members` of one member's call."""
        return (members or max(self.stacked, 1)) * self.members

    def gradient(self, t: Tensor, needed: bool, members: int) -> Batched:
        """The gradient of a weight of one member's call, which had `members`."""
        if not needed:
            return t, None
        each = t.shape[0] // self.members
        t = t.unflatten(0, (each // self.inner, self.members, self.inner)).movedim(1, 0)
        lead = (each,) if members or self.stacked else ()
        return t.reshape(self.members, *lead, *t.shape[3:]), 0

    def repeated(self, made: tuple, rows: tuple, config: calls.Config) -> tuple:
        """What forward made for one member, for each of them."""
        y, reserve, hs, cs = made
        sections = calls.reserve_rows(config, y.dtype)
        count = len(reserve)
        repeated = reserve.new_empty(count * self.members, reserve.shape[1])
        given = reserve.flatten().split([count * width for width in sections])
        parts = repeated.flatten().split([len(repeated) * width for width in sections])
        for part, source, width in zip(parts, given, sections, strict=True):
            if width:
                shape = (count // self.inner, -1, self.inner, width)
                part.view(shape).copy_(source.view(shape))
        states = [
            # Of one row a view, which is not contiguous.
            t if t is None or t.dim() == 1 else self.rows(t, None, row).contiguous()
            for t, row in ((y, rows[0]), (hs, rows[3]), (cs, rows[4]))
        ]
        return states[0], repeated, *states[1:]


def _is_batched(t: Tensor) -> bool:
    """At any level of torch.func."""
    while _functorch.is_functorch_wrapped_tensor(t):
        if _functorch.is_batchedtensor(t):
            return True
        t = _functorch.get_unwrapped(t)
    return False


def _transposed(pairs: list[Batched]) -> tuple[tuple, tuple]:
    return tuple(t for t, _ in pairs), tuple(d for _, d in pairs)


def _forward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    call, save = calls.Call.of(*arguments[:-1]), arguments[-1]
    fold = _Fold(call, calls.Call.of(*in_dims[:-1]).tensors, info.batch_size)
    results = ops.forward(*fold.call().arguments(), save)
    of_y, of_hn, of_cn, of_hs, of_cs = call.result_row_dims()
    rows = (of_y, of_hn, of_cn, 0, of_hs, of_cs)
    return _transposed([fold.unfolded(t, row) for t, row in zip(results, rows, strict=True)])


def _infer(info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    call = calls.Call.of(*calls.plain_call(*arguments)[0])
    dims = (*in_dims[:4], *[None] * (len(call.arguments()) - 4))
    fold = _Fold(call, calls.Call.of(*dims).tensors, info.batch_size)
    results = ops.infer(*fold.call().arguments()[:4], *arguments[4:])
    rows = (*call.result_row_dims()[:3], 0)
    pairs: Any = [
        (None, None) if t is None else fold.unfolded(t, row)
        for t, row in zip(results, rows, strict=True)
    ]
    return _transposed(pairs)


def _backward(info: Any, in_dims: Dims, *arguments: Any) -> tuple[tuple, tuple]:
    given = calls.BackwardCall.of(*arguments)
    dims: Any = calls.BackwardCall.of(*in_dims)
    call, rows = given.call, given.call.result_row_dims()
    fold = _Fold(call, dims.call.tensors, info.batch_size)
    folded = fold.call()
    grads = [fold.rows(*each) for each in zip(given.grads, dims.grads, rows, strict=True)]
    if any(d is not None for d in dims.made):
        of_made = zip(given.made, dims.made, (rows[0], 0, rows[3], rows[4]), strict=True)
        made = tuple(t if d is None else fold.rows(t, d, row).contiguous() for t, d, row in of_made)
    elif _is_batched(given.made[1]):
        # A reserve does not have the members of an outer rule apart.
        y, _, _, *kept = ops.forward(*folded.arguments(), True)
        made = (y, *kept)
    elif _share(given, fold):
        made = given.made
    else:
        # Only gradients are batched.
        made = fold.repeated(given.made, rows, calls.Config(*call.constants[1:]))
    groups = fold.groups(given.members)
    *states, dweights = ops.backward(*grads, *made, given.needs, groups, *folded.arguments())
    found, of_found = _transposed(
        [fold.unfolded(t, row) for t, row in zip(states, (rows[0], 1, 1), strict=True)]
    )
    needs = given.needs[3:]
    weights, of_weights = _transposed(
        [fold.gradient(g, n, given.members) for g, n in zip(dweights, needs, strict=True)]
    )
    return (*found, list(weights)), (*of_found, list(of_weights))


def _share(given: calls.BackwardCall, fold: _Fold) -> bool:
    """Whether members read what forward saved once; rows b * n to b * n + n - 1 that of row b."""
    call = given.call
    weights = call.tensors[calls.FIRST_WEIGHT :]
    return not (
        any(given.needs[3:])
        or call.constants[calls.ALL_STATES]
        or given.made[0].device.type != "cpu"
        or fold.differ
        or fold.stacked
        or any(_is_batched(w) for w in weights if w is not None)
        # Second derivatives read a row for each member.
        or (torch.is_grad_enabled() and ops.require_grad((*given.grads, *call.tensors), True))
    )


def _unwrapped(argument: Any, level: int) -> tuple[Any, Dims]:
    """A tensor, or list of them, without the batched dimension of a level, and which that was."""
    if isinstance(argument, Tensor):
        return _functorch._unwrap_batched(argument, level)
    if isinstance(argument, (list, tuple)) and argument and isinstance(argument[0], Tensor):
        pairs = [_functorch._unwrap_batched(t, level) for t in argument]
        return [t for t, _ in pairs], [d for _, d in pairs]
    return argument, None


def _wrapped(result: Any, dims: Dims, level: int) -> Any:
    if isinstance(dims, list):
        return [_wrapped(t, dim, level) for t, dim in zip(result, dims, strict=True)]
    return result if dims is None else _functorch._add_batch_dim(result, dims, level)


def _any_batched(dims: Dims) -> bool:
    if isinstance(dims, (list, tuple)):
        return any(map(_any_batched, dims))
    return dims is not None


class _Info(NamedTuple):
    batch_size: int


def _at_level(op: Any, rule: Any) -> Any:
    """The op's kernel for batched tensors.

    torch.library.register_vmap's own takes each call's arguments through pytrees, a fifth of a
    millisecond, in which the kernels run an ensemble of small layers.
    """

    def kernel(keys: Any, *arguments: Any) -> Any:
        interpreter: Any = retrieve_current_functorch_interpreter()
        level = interpreter.level()
        given, dims = zip(*(_unwrapped(a, level) for a in arguments), strict=True)
        excluded = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)
        with torch._C._ExcludeDispatchKeyGuard(excluded):
            if not _any_batched(dims):
                return op(*arguments)
            results, of_results = rule(_Info(interpreter.batch_size()), dims, *given)
        pairs = zip(results, of_results, strict=True)
        return tuple(_wrapped(t, dim, level) for t, dim in pairs)

    return kernel


def register() -> None:
    for op, rule in ((ops.forward, _forward), (ops.infer, _infer), (ops.backward, _backward)):
        name = op.name().removesuffix(".default")
        node.register(name, _at_level(op, rule), "FuncTorchBatched")
