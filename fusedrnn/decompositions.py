"""The ops in aten's operators, for `ExportedProgram.run_decompositions` and what is built on it.

torch.export, torch.compile and AOTInductor keep the ops, which run the kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fusedrnn import calls, derivatives, onnx, ops, reference
from fusedrnn.on_import import when_imported


def _scan(
    advance: reference.Advance,
    of_input: reference.OfInput,
    constants: reference.Constants,
    state: reference.State,
    steps: reference.Steps,
    reverse: bool,
) -> tuple[reference.State, reference.State]:
    """reference.each_step as torch's `scan`, for any number of steps."""
    # torch.scan itself would start torch.compile inside of the tracing that asks for it.
    from torch._higher_order_ops.scan import scan_op

    steps = steps._replace(x=of_input.gates(steps.x))
    if reverse:
        steps = pytree.tree_map_only(Tensor, lambda s: s.flip(0), steps)
    groups = [pytree.tree_flatten(group) for group in (state, steps, constants)]
    leaves = [[leaf for leaf in group if leaf is not None] for group, _ in groups]

    def restored(given: Iterator[Tensor], group: Any) -> Any:
        flat, spec = group
        return pytree.tree_unflatten([None if f is None else next(given) for f in flat], spec)

    def body(*given: Tensor) -> list[Tensor]:
        rest = iter(given)
        state, now, constants = (restored(rest, group) for group in groups)
        after, out = advance(constants, state, now)
        # A result of scan's body must not be another one's memory.
        return [s for s in after if s is not None] + [o.clone() for o in out if o is not None]

    found = scan_op(body, [s.clone() for s in leaves[0]], leaves[1], tuple(leaves[2]))
    states, outputs = found[: len(leaves[0])], found[len(leaves[0]) :]
    if reverse:
        outputs = [o.flip(0) for o in outputs]
    (h, c), (y, cs) = ((*pair, None)[:2] for pair in (states, outputs))
    return (h, c), (y, cs)


class _Packed:
    """Packed input as padded input with lengths, by operators that need no values of batch_sizes,
    but B where no state says it.
    """

    def __init__(self, x: Tensor, hx: Tensor | None, batch_sizes: Tensor) -> None:
        if hx is not None:
            self.batch = hx.shape[1]
        else:
            self.batch = batch_sizes[0].item()  # type: ignore[assignment]
            torch._check(self.batch >= 1)
        device = batch_sizes.device
        rows = torch.arange(self.batch, device=device)
        tokens = torch.arange(x.shape[0], device=device)
        ends = batch_sizes.cumsum(0)
        starts = ends - batch_sizes
        exists = rows < batch_sizes[:, None]
        self.exists = exists.to(x.device)
        self.lengths = exists.sum(0).to(x.device)
        self.place = torch.where(exists, starts[:, None] + rows, 0).to(x.device)  # (T, B) -> token
        step = (tokens[:, None] >= ends).sum(1)
        self.step, self.row = step.to(x.device), (tokens - starts[step]).to(x.device)

    def padded_call(self, call: calls.Call) -> calls.Call:
        x, hx, cx, _, _, mask, resets, h_mask, *zones = call.tensors[: 3 + calls.NON_DIFFERENTIABLE]
        assert x is not None

        def flat(masks: Tensor | None) -> Tensor | None:
            return None if masks is None else masks[:, self.place].flatten(1, 2)

        resets = None if resets is None else resets[self.place]
        others = (None, self.lengths, flat(mask), resets, h_mask, *map(flat, zones))
        weights = call.tensors[3 + calls.NON_DIFFERENTIABLE :]
        return calls.Call((x[self.place], hx, cx, *others, *weights), call.constants)

    def padded(self, values: Tensor | None) -> Tensor | None:
        """(..., tokens, width) as (..., T, B, width), with zeros."""
        if values is None:
            return None
        return torch.where(self.exists[..., None], values[..., self.place, :], 0)

    def packed(self, steps: Tensor) -> Tensor:
        """(..., T, B, width) as (..., tokens, width)."""
        if steps.dim() == 1:
            return steps  # nothing
        return steps[..., self.step, self.row, :]


def _padded(call: calls.Call) -> tuple[calls.Call, _Packed | None]:
    x, hx, _, batch_sizes = call.tensors[:4]
    if batch_sizes is None:
        return call, None
    assert x is not None
    packed = _Packed(x, hx, batch_sizes)
    return packed.padded_call(call), packed


def _constant_steps(call: calls.Call) -> bool:
    x = call.tensors[0]
    return x is not None and isinstance(x.shape[0], int)


def forward(*arguments: Any) -> tuple[Tensor, ...]:
    call, packed = _padded(calls.Call.of(*arguments[:-1]))
    if torch.onnx.is_in_onnx_export():
        y, hn, c, hs = onnx.forward(call, calls.Config(*call.constants[1:]))
        cn, cs = y.new_empty(0) if c is None else c, y.new_empty(0)
    else:
        loop = reference.each_step if _constant_steps(call) else _scan
        y, hn, cn, hs, cs = reference.forward(*call.arguments(), loop=loop)
    if packed is not None:
        y, hs, cs = map(packed.packed, (y, hs, cs))
    # Only backward reads it, which computes it again.
    return y, hn, cn, y.new_empty((0, 0), dtype=torch.uint8), hs, cs


def infer(*arguments: Any) -> tuple:
    call, save = calls.plain_call(*arguments)
    return calls.plain_results(call, save, forward(*call, save))


def backward(*arguments: Any) -> Any:
    """By autograd, whose operators the tracing sees."""
    given = calls.BackwardCall.of(*arguments)
    grads, y, needs = given.grads, given.made[0], given.needs
    if given.members:
        raise NotImplementedError(
            "fusedrnn: gradients of each sample do not become aten's operators: leave "
            "torch.ops.fusedrnn out of the table of decompositions"
        )
    call, packed = _padded(given.call)
    if packed is not None:
        dy, dhn, dcn, *states = grads
        grads = (packed.padded(dy), dhn, dcn, *map(packed.padded, states))
    if not _constant_steps(call):
        raise NotImplementedError(
            "fusedrnn: the backward pass becomes aten's operators for a constant number of steps "
            "only: make T static, or leave torch.ops.fusedrnn out of the table of decompositions"
        )
    # Decompositions run below autograd, which these keys exclude.
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, excluded):
        found = derivatives.plain_gradients(call, needs, grads)

    def result(gradient: Tensor | None, of: Tensor | None, need: bool) -> Tensor:
        if gradient is None:
            return torch.zeros_like(of) if need and of is not None else y.new_empty(0)
        return gradient

    dx, dhx, dcx, *dweights = map(result, found, call.differentiable(), needs)
    if packed is not None:
        dx = packed.packed(dx)
    return dx, dhx, dcx, dweights


TABLE = {ops.forward: forward, ops.infer: infer, ops.backward: backward}


def register() -> None:
    """Adds the ops to torch's default table of decompositions, and leaves them out of Inductor's,
    which is a copy of it.
    """

    def add(utils: ModuleType) -> None:
        table = utils.CustomDecompTable
        known = table.__init__

        def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
            known(self, *args, **kwargs)
            self.update(TABLE)

        table.__init__ = __init__

    def leave_out(inductor: ModuleType) -> None:
        for op in TABLE:
            inductor.decompositions.pop(op, None)

    when_imported("torch.export.decomp_utils", add)
    when_imported("torch._inductor.decomposition", leave_out)
