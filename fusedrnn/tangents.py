"""Derivatives of the ops in one direction: two ops with kernels, and what autograd makes of them.

With `direction` tangents v of x, hx, cx and the weights:

    forward_tangent   F'(v): the tangents of forward's results, of the reserve if `save`
    backward_tangent  the tangents of backward's results, along v and tangents of its gradients u:
                      B'(v, u) + B(du), where B(u) is backward

So F' is forward's jvp, and both are backward's. They are its vjp too: backward is B(u), the
gradient of <F, u>, so the gradient of <B(u), v> by u is F'(v), and by x, hx, cx and weights it is
B'(v, u), the second derivative being symmetric. Likewise the vjp of F' is B and B'. Tangents of
weights without one are empty tensors. What the kernels do not take (`has_kernels`), or what a GPU
has refused, and derivatives of B' are left to derivatives.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

# ops imports this module: it is used in functions only.
from fusedrnn import batched_gradients, calls, cuda, derivatives, fakes, ops
from fusedrnn.node import Node, apply, register
from fusedrnn.recomputed import gradients_of

forward_tangent = torch.ops.fusedrnn.forward_tangent.default
backward_tangent = torch.ops.fusedrnn.backward_tangent.default

Tensors = tuple[Tensor | None, ...]


def has_kernels(call: calls.Call) -> bool:
    """Whether the kernels take the derivatives of a call."""
    x = call.tensors[0]
    assert x is not None
    return (x.device.type == "cpu" or _on_cuda(call)) and not batched_gradients.are_batched(
        call.tensors
    )


def _on_cuda(call: calls.Call) -> bool:
    """Whether the CUDA kernels take them."""
    x = call.tensors[0]
    assert x is not None
    return x.is_cuda and cuda.missing(x.device) is None


def _empty(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Not new_empty, which torch.vmap would batch."""
    return torch.empty(0, dtype=dtype, device=like.device)


def direction_arguments(direction: Tensors, y: Tensor) -> tuple:
    """The ops' arguments of tangents of Call.differentiable()."""
    return (*direction[:3], [_empty(y, y.dtype) if t is None else t for t in direction[3:]])


class TangentCall(NamedTuple):
    """The arguments of either op; of forward_tangent without u, du and `needs`."""

    u: Tensors
    du: Tensors
    direction: Tensors
    made: tuple[Any, ...]  # y, reserve, hs, cs, and for backward_tangent the tangents of these
    needs: list[bool]
    members: int
    call: calls.Call

    @staticmethod
    def of_forward(dx: Any, dhx: Any, dcx: Any, dweights: Any, *rest: Any) -> TangentCall:
        none, (*made, _), call = (
            (None,) * calls.RESULTS,
            rest[: calls.MADE + 1],
            rest[calls.MADE + 1 :],
        )
        direction = (dx, dhx, dcx, *map(_given, dweights))
        return TangentCall(none, none, direction, tuple(made), [], 0, calls.Call.of(*call))

    @staticmethod
    def of_backward(*arguments: Any) -> TangentCall:
        n = calls.RESULTS
        u, du, (dx, dhx, dcx, dweights, *rest) = (
            arguments[:n],
            arguments[n : 2 * n],
            arguments[2 * n :],
        )
        made, (needs, members, *call) = tuple(rest[: 2 * calls.MADE]), rest[2 * calls.MADE :]
        direction = (dx, dhx, dcx, *map(_given, dweights))
        return TangentCall(u, du, direction, made, needs, members, calls.Call.of(*call))

    def of_graph(self) -> Tensors:
        """The tensors that the results are differentiated by."""
        return (*self.u, *self.du, *self.direction, *self.call.differentiable())

    def with_graph(self, tensors: Sequence[Any]) -> TangentCall:
        """Others, or what is said of each, in their place."""
        ends = calls.RESULTS, 2 * calls.RESULTS, 2 * calls.RESULTS + len(self.direction)
        u, du, v = (tuple(tensors[i:j]) for i, j in zip((0, *ends), ends, strict=False))
        call = self.call.with_differentiable(tuple(tensors[ends[-1] :]))
        return self._replace(u=u, du=du, direction=v, call=call)


def _given(weight_tangent: Tensor) -> Tensor | None:
    return weight_tangent if weight_tangent.numel() else None


@torch.library.register_fake("fusedrnn::forward_tangent")
def _fake_forward_tangent(*arguments: Any) -> tuple[Tensor, ...]:
    made, (save, *call) = arguments[4 : 4 + calls.MADE], arguments[4 + calls.MADE :]
    fakes.check_devices(call[0], *arguments[:3], *arguments[3], *made)
    return fakes.forward(*call, save)


@torch.library.register_fake("fusedrnn::backward_tangent")
def _fake_backward_tangent(*arguments: Any) -> tuple:
    given = TangentCall.of_backward(*arguments)
    made, tangents = given.made[: calls.MADE], given.made[calls.MADE :]
    fakes.check_devices(made[0], *given.du, *given.direction, *tangents)
    return fakes.backward(*given.u, *made, given.needs, given.members, *given.call.arguments())


def derivative(
    call: calls.Call, made: tuple[Any, ...], u: Tensors, v: Tensors, needs: list[bool]
) -> tuple[Tensors, Tensors]:
    """F'(v), and B'(v, u) of what is needed, in Call.differentiable()'s order."""
    wanted = any(needs) and any(g is not None for g in u)
    direction, arguments = direction_arguments(v, made[0]), call.arguments()
    dy, dhn, dcn, dreserve, dhs, dcs = forward_tangent(*direction, *made, wanted, *arguments)
    first = dy, dhn, dcn, dhs, dcs
    if not wanted:
        return first, (None,) * len(needs)
    dmade = dy, dreserve, dhs, dcs
    dx, dhx, dcx, dweights = backward_tangent(
        *u, *[None] * calls.RESULTS, *direction, *made, *dmade, needs, 0, *arguments
    )
    found = zip((dx, dhx, dcx, *dweights), needs, strict=True)
    return first, tuple(g if n else None for g, n in found)


# ---- forward mode of the ops ----


def _primal(call: calls.Call, direction: Tensors) -> calls.Call:
    """The call without its tangents, which are `direction`."""
    pairs = zip(call.differentiable(), direction, strict=True)
    return call.with_differentiable(
        tuple(t if v is None else forward_ad.unpack_dual(t).primal for t, v in pairs)
    )


def of_forward(call: calls.Call, made: tuple[Any, ...], direction: Tensors) -> tuple:
    """The tangents of forward's results; `made`: y, the reserve, hs and cs."""
    given = direction_arguments(direction, made[0])
    results = forward_tangent(*given, *made, False, *_primal(call, direction).arguments())
    return (*results[:3], None, *results[4:])


def of_backward(
    call: calls.Call,
    made: tuple[Any, ...],
    needs: list[bool],
    members: int,
    grads: Tensors,
    dgrads: Tensors,
    direction: Tensors,
) -> Tensors:
    """The tangents of backward's results."""
    u = [g if g is None else forward_ad.unpack_dual(g).primal for g in grads]
    arguments = _primal(call, direction).arguments()
    given = direction_arguments(direction, made[0])
    dy, _, _, *dmade = forward_tangent(*given, *made, True, *arguments)
    *states, dweights = backward_tangent(
        *u, *dgrads, *given, *made, dy, *dmade, needs, members, *arguments
    )
    return (*states, *dweights)


# ---- autograd of the two ops ----


def _keep(ctx: Any, given: TangentCall, made: tuple[Tensor, ...]) -> None:
    """For `_kept`; tensors may be moved by hooks, so ctx itself holds none."""
    nothing = given.with_graph([None] * len(given.of_graph()))
    ctx.given = nothing._replace(
        made=(), call=calls.Call((None,) * len(nothing.call.tensors), given.call.constants)
    )
    ctx.count = len(made)
    ctx.save_for_backward(*made, *given.call.non_differentiable(), *given.of_graph())
    ctx.set_materialize_grads(False)


def _kept(ctx: Any) -> TangentCall:
    made, rest = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
    others, of_graph = rest[: calls.NON_DIFFERENTIABLE], rest[calls.NON_DIFFERENTIABLE :]
    call = ctx.given.call.with_non_differentiable(others)
    return ctx.given._replace(made=made, call=call).with_graph(of_graph)


class _ForwardTangent(Node):
    @staticmethod
    def forward(ctx: Any, keys: Any, arguments: tuple, *of_graph: Any):  # type: ignore[no-untyped-def]
        results = ops._below_function(forward_tangent, keys, arguments)
        given = TangentCall.of_forward(*arguments)
        _keep(ctx, given, given.made)
        ctx.mark_non_differentiable(results[3])
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        given, u = _kept(ctx), (*grads[:3], *grads[4:])
        needs = given.with_graph(ctx.needs_input_grad[2:])
        of_direction: Any = list(needs.direction)
        of_call: Any = list(needs.call.differentiable())
        first: list[Any] = [None] * len(of_direction)
        if any(of_direction):
            arguments = given.call.arguments()
            *states, dweights = ops.backward(*u, *given.made, of_direction, 0, *arguments)
            first = [
                g if n else None for g, n in zip((*states, *dweights), of_direction, strict=True)
            ]
        second: Tensors = (None,) * len(of_call)
        if any(of_call):
            _, second = derivative(given.call, given.made, u, given.direction, of_call)
        return (None, None, *given.u, *given.du, *first, *second)


class _BackwardTangent(Node):
    """Its derivatives run in the plain implementation."""

    @staticmethod
    def forward(ctx: Any, keys: Any, arguments: tuple, *of_graph: Any):  # type: ignore[no-untyped-def]
        *states, dweights = ops._below_function(backward_tangent, keys, arguments)
        _keep(ctx, TangentCall.of_backward(*arguments), ())
        return (*states, *dweights)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        given, needs, create_graph = _kept(ctx), ctx.needs_input_grad[2:], torch.is_grad_enabled()
        leaves: list[Any]
        with torch.enable_grad():
            leaves = [
                derivatives.leaf_of(t) if t is not None and n else t
                for t, n in zip(given.of_graph(), needs, strict=True)
            ]
            _, results = derivatives.plain_tangents(given.with_graph(leaves))
        return (None, None, *gradients_of(results, grads, leaves, needs, create_graph))


def _plain(given: TangentCall) -> tuple[Tensors, Tensors]:
    """The results of a call with tangents, with a graph only where one is asked for."""
    found = derivatives.plain_tangents(given)
    if ops._needs_graph(*given.of_graph()):
        return found

    def without_graph(t: Tensor | None) -> Tensor | None:
        if t is None:
            return None
        primal, tangent = forward_ad.unpack_dual(t)
        primal = primal.detach()
        return primal if tangent is None else forward_ad.make_dual(primal, tangent.detach())

    forward, backward = found
    return tuple(map(without_graph, forward)), tuple(map(without_graph, backward))


def _forward_tangent_autograd(keys: Any, *arguments: Any) -> tuple:
    given = TangentCall.of_forward(*arguments)
    tensors = given.of_graph()
    if not ops._has_tangent(*tensors):
        try:
            if not ops._needs_graph(*tensors):
                return ops._below_autograd(forward_tangent, keys, arguments)
            return apply(_ForwardTangent, keys, arguments, *tensors)
        except RuntimeError as error:
            if ops.NOTHING_RUNS not in str(error):
                raise
    (dy, dhn, dcn, dhs, dcs), _ = _plain(given)
    return dy, dhn, dcn, given.made[1].new_empty((0, 0)), dhs, dcs


def _backward_tangent_autograd(keys: Any, *arguments: Any) -> tuple:
    given = TangentCall.of_backward(*arguments)
    tensors, y, dreserve = given.of_graph(), given.made[0], given.made[calls.MADE + 1]
    # Of F' in the plain implementation there is no reserve: torch.func's levels find that out.
    lowest = not torch._C._are_functorch_transforms_active()
    no_reserve = lowest and y.numel() > 0 and dreserve.shape[0] == 0
    if not ops._has_tangent(*tensors) and not no_reserve:
        try:
            if not ops._needs_graph(*tensors):
                return ops._below_autograd(backward_tangent, keys, arguments)
            dx, dhx, dcx, *dweights = apply(_BackwardTangent, keys, arguments, *tensors)
            return dx, dhx, dcx, dweights
        except RuntimeError as error:
            if ops.NOTHING_RUNS not in str(error):
                raise
    empty = y.new_empty(0)
    dx, dhx, dcx, *dweights = (empty if g is None else g for g in _plain(given)[1])
    return dx, dhx, dcx, dweights


register("forward_tangent", _forward_tangent_autograd, "Autograd")
register("backward_tangent", _backward_tangent_autograd, "Autograd")
