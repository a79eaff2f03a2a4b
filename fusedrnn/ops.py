"""The ops and their derivatives. calls.py says what they take and return."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as _C_functorch
from torch.autograd import forward_ad

from fusedrnn import batched_gradients, derivatives, reference, tangents
from fusedrnn.calls import (
    ALL_STATES,
    NO_OTHERS,
    NON_DIFFERENTIABLE,
    RESULTS,
    STACK_IN,
    BackwardCall,
    Call,
    plain_call,
    plain_results,
)
from fusedrnn.node import Node, apply, register

forward = torch.ops.fusedrnn.forward.default
infer = torch.ops.fusedrnn.infer.default
backward = torch.ops.fusedrnn.backward.default
infer_quantized = torch.ops.fusedrnn.infer_quantized.default

# In the error of an op whose CUDA kernels were all refused, found wrong or switched off.
NOTHING_RUNS = "no CUDA kernel can run"

# Elements of an output for which it pays to ask autograd which gradients it is after: microseconds.
LARGE = 1 << 12

# Autograd is registered by hand: torch.library.register_autograd flattens lists of tensors through
# pytrees, which cost 170 us a training step, more than a small layer takes. A node has tensors one
# by one and a call's constants as one tuple; `Call` converts between these and the op's arguments.


def call_below_autograd(op: Any, *arguments: Any) -> Any:
    """Calls an op where `can_skip_dispatch`.

    Calling the op itself would ask every argument once more whether it overrides torch, and look
    for overloads: 2 to 5 us.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return torch._C._dispatch_call_boxed(op._handle, *arguments)


def _below_autograd(op: Any, keys: Any, arguments: tuple) -> Any:
    """Calls an op with the key set with which the dispatcher called."""
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


@contextlib.contextmanager
def _derivatives_on() -> Iterator[None]:
    """Inside autograd.Function, which switches gradients and forward mode off: also those of
    torch.func's lower levels.
    """
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def _below_function(op: Any, keys: Any, arguments: tuple) -> Any:
    """The same inside autograd.Function; `keys`: None where `can_skip_dispatch`."""
    if keys is None:
        return call_below_autograd(op, *arguments)
    if not torch._C._are_functorch_transforms_active():
        return _below_autograd(op, keys, arguments)
    with _derivatives_on():
        return _below_autograd(op, keys, arguments)


_NOTHING = torch.empty(0, device="cpu")  # whatever the default device at import


def _version_of(y: Tensor) -> Tensor:
    """A tensor whose `_version` is that of `y` and rises where `y` is written in place.

    It holds no memory of `y`: hooks on saved tensors may have moved that elsewhere.
    """
    version = y.detach()
    if type(y) is Tensor:  # another could not be given the data of a plain one
        version.data = _NOTHING
    return version


class _Forward(Node):
    # Each input or output tensor of a node costs a microsecond: `others` is one tuple, or None if a
    # call has none of them, and y, hn and cn are the only outputs unless the dispatcher (`keys`) or
    # all_states requires more. A line of Python costs too, more than in a loop of its own: kernels
    # have evicted it from the caches.
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any, keys: Any, save: bool, constants: tuple, others: tuple | None, *of_graph: Any
    ):
        x, hx, cx, *weights = of_graph
        direct = keys is None  # as can_skip_dispatch says: without forward mode and torch.func
        dual = not direct and in_forward_mode()
        save = save or dual
        if others is None:
            results = call_below_autograd(infer, x, hx, cx, weights, *constants[STACK_IN], save)
        else:
            arguments = (x, hx, cx, weights, *others, *constants, save)
            results = _below_function(forward, keys, arguments)
        y, reserve = results[0], results[3]
        ctx.set_materialize_grads(False)
        # torch.nn allows its output to be written in place. So y is saved with a version counter of
        # its own; where the output's counter has changed, backward computes y again. Tensors of
        # torch.func's transforms cannot be given other data: there the output is a copy.
        if not direct and torch._C._are_functorch_transforms_active():
            with _derivatives_on():
                output, kept_y, results = _NOTHING, y, (y.clone(), *results[1:])
        else:
            output, kept_y = _version_of(y), y.data
        states = results[4:] if constants[ALL_STATES] else (None, None)
        ctx.save_for_backward(kept_y, reserve, *states, *(others or ()), *of_graph)
        ctx.rest = output, output._version, constants, save, others is None
        if dual:
            ctx.for_jvp = Call.of(*arguments[:-1]), (kept_y, reserve, *states)
        if direct and not constants[ALL_STATES]:  # then hs and cs are empty
            return results[:3]
        ctx.mark_non_differentiable(reserve)
        return results

    @staticmethod
    def jvp(ctx: Any, *given: Any) -> tuple:
        call, made = ctx.for_jvp
        del ctx.for_jvp
        with forward_ad._set_fwd_grad_enabled(True):  # of torch.func's lower levels
            return tangents.of_forward(call, made, given[4:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        output, version, constants, saved, no_others = ctx.rest
        y, reserve, hs, cs, *tensors = ctx.saved_tensors
        grads = (*grads, None, None) if len(grads) == 3 else (*grads[:3], *grads[4:])
        others = NO_OTHERS
        if not no_others:
            others, tensors = tensors[:NON_DIFFERENTIABLE], tensors[NON_DIFFERENTIABLE:]
        x, hx, cx, *weights = tensors
        call = (x, hx, cx, weights, *others, *constants)
        needs = ctx.needs_input_grad[4:]
        if y.numel() >= LARGE:
            needs = derivatives.asked_for(ctx, needs, (x, hx, cx, *weights))
        try:
            if not saved or output._version != version:
                with torch.no_grad():
                    y, _, _, reserve, hs, cs = forward(*call, True)
            rest = (y, reserve, hs, cs, needs, 0, *call)
            if batched_gradients.are_batched(grads):
                found = _batched_backward(grads, rest)
            elif torch.is_grad_enabled() or not can_skip_dispatch((*grads, *tensors, *others)):
                found = backward(*grads, *rest)
            else:
                found = call_below_autograd(backward, *grads, *rest)
        except RuntimeError as error:
            if NOTHING_RUNS not in str(error):
                raise
            return (*_NO_GRADS, *derivatives.plain_gradients(Call.of(*call), list(needs), grads))
        dx, dhx, dcx, dweights = found
        if not all(needs):  # then they are empty
            dx, dhx, dcx, *dweights = [
                g if need else None
                for g, need in zip((dx, dhx, dcx, *dweights), needs, strict=True)
            ]
        return (*_NO_GRADS, dx, dhx, dcx, *dweights)


_NO_GRADS = (None,) * 4  # of keys, save, constants and others


def _batched_backward(grads: tuple, rest: tuple) -> tuple:
    """The backward op for the members of is_grads_batched."""

    def of_member(*of_outputs: Any) -> tuple:
        *states, dweights = backward(*of_outputs, *rest)
        return (*states, *dweights)

    dx, dhx, dcx, *dweights = batched_gradients.over_batched(of_member, grads)
    return dx, dhx, dcx, dweights


# Without a search for tensors of finished torch.func transforms: 2 us.
apply_forward = _Forward.apply


class _Backward(Node):
    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx: Any,
        keys: Any,
        made: tuple,
        needs: list[bool],
        members: int,
        constants: tuple,
        *rest: Any,
    ):
        grads, tensors = rest[:RESULTS], rest[RESULTS:]
        call = Call(tensors, constants)
        arguments = (*grads, *made, needs, members, *call.arguments())
        *states, dweights = _below_function(backward, keys, arguments)
        ctx.set_materialize_grads(False)
        kept: tuple[Any, ...] = ()
        if tangents.has_kernels(call):
            # A copy of y, which lacks the output's version counter and may be written in place.
            kept = (made[0].clone(), made[1], *(t if t is None else t.detach() for t in made[2:]))
        ctx.save_for_backward(*kept, *grads, *tensors)
        ctx.constants, ctx.needs, ctx.members, ctx.kept = constants, needs, members, len(kept)
        if in_forward_mode():
            ctx.for_jvp = call, kept, needs, members, grads
        return (*states, *dweights)

    @staticmethod
    def jvp(ctx: Any, *given: Any) -> tuple:
        call, made, needs, members, grads = ctx.for_jvp
        del ctx.for_jvp
        dgrads, direction = given[5 : 5 + RESULTS], Call(given[5 + RESULTS :], ()).differentiable()
        with forward_ad._set_fwd_grad_enabled(True):  # of torch.func's lower levels
            return tangents.of_backward(call, made, needs, members, grads, dgrads, direction)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Any) -> tuple:
        kept, saved = ctx.saved_tensors[: ctx.kept], ctx.saved_tensors[ctx.kept :]
        call = Call(saved[RESULTS:], ctx.constants)
        # No kernel takes tangents of weights that each member has, nor torch's older kind of vmap.
        of_weights = ctx.members and any(g is not None for g in grad_grads[3:])
        if kept and not of_weights and not batched_gradients.are_batched(grad_grads):
            return (None,) * 5 + _second(ctx, call, kept, saved[:RESULTS], grad_grads)
        grads = derivatives.of_members(
            ctx.members, saved[:RESULTS], call, ctx.needs, grad_grads, torch.is_grad_enabled()
        )
        return (None,) * 5 + grads


def _second(ctx: Any, call: Call, made: tuple, grads: tuple, grad_grads: tuple) -> tuple:
    """The gradients of the backward op by all its tensors, by kernels."""
    needs = derivatives.asked_for(ctx, ctx.needs_input_grad[5:], (*grads, *call.tensors))
    direction = tuple(g if n else None for g, n in zip(grad_grads, ctx.needs, strict=True))
    if all(d is None for d in direction):
        return (None,) * len(needs)
    of_call: Any = Call(tuple(needs[RESULTS:]), ()).differentiable()  # type: ignore[arg-type]
    first, second = tangents.derivative(call, made, grads, direction, list(of_call))
    of_grads = (g if n else None for g, n in zip(first, needs, strict=False))
    return (*of_grads, *second[:3], *[None] * NON_DIFFERENTIABLE, *second[3:])


def _needs_graph(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def in_forward_mode() -> bool:
    return forward_ad._current_level >= 0


def require_grad(tensors: tuple[Tensor | None, ...], transformed: bool) -> bool:
    """Whether one of them requires a gradient; `transformed`: at any level of torch.func."""
    if any(t is not None and t.requires_grad for t in tensors):
        return True
    if not transformed:
        return False
    if torch.compiler.is_compiling():
        return True  # levels cannot be looked through
    inner = [
        _C_functorch.get_unwrapped(t)
        for t in tensors
        if t is not None and _C_functorch.is_functorch_wrapped_tensor(t)
    ]
    return bool(inner) and require_grad(tuple(inner), True)


def _has_tangent(*tensors: Tensor | None) -> bool:
    level = forward_ad._current_level
    if level < 0:
        return False
    # Not forward_ad.unpack_dual, which takes three times as long.
    return any(t is not None and torch._unpack_dual(t, level=level)[1] is not None for t in tensors)


def _forward_autograd(keys: Any, *arguments: Any) -> tuple:
    *rest, save = arguments
    call = Call.of(*rest)
    dual = _has_tangent(*call.tensors)
    if dual and not tangents.has_kernels(call):
        # Forward mode goes through the plain implementation, and so does its backward.
        y, hn, cn, hs, cs = reference.forward(*rest)
        return y, hn, cn, y.new_empty((0, 0), dtype=torch.uint8), hs, cs
    if not dual and not _needs_graph(*call.tensors):
        return _below_autograd(forward, keys, arguments)
    return apply(
        _Forward, keys, save, call.constants, call.non_differentiable(), *call.differentiable()
    )


def can_skip_dispatch(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether an op may be called below the dispatcher's keys.

    Forward mode, compilers, tracers, and tensor classes or modes that override torch have to see
    the dispatcher call it.
    """
    return not (
        in_forward_mode()
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._are_functorch_transforms_active()
        or torch.overrides.has_torch_function(tensors)
    )


def run(call: tuple, graph: bool, save: bool) -> tuple:
    """The forward op with the arguments `call` and `save`; `graph`: autograd records it.

    It skips the Autograd key, whose implementation in Python takes 9 us, and does what that does.
    Returns y, hn, cn, hs, cs; the last two are None without all_states.
    """
    tensors, constants = given = Call.of(*call)
    if not can_skip_dispatch(tensors):
        results = forward(*call, save)
    elif graph:
        results = apply_forward(
            None, save, constants, given.non_differentiable(), *given.differentiable()
        )
    else:
        results = call_below_autograd(forward, *call, save)
    return results[:3] + (results[4:] or (None, None))


def _infer_autograd(keys: Any, *arguments: Any) -> tuple:
    x, hx, cx, weights, *_ = arguments
    if _has_tangent(x, hx, cx, *weights) or _needs_graph(x, hx, cx, *weights):
        call, save = plain_call(*arguments)
        return plain_results(call, save, forward(*call, True))
    return _below_autograd(infer, keys, arguments)


def _infer_quantized_autograd(keys: Any, *arguments: Any) -> tuple:
    return _below_autograd(infer_quantized, keys, arguments)  # has no derivative, as torch's int8


def _dual_of_gradients(grads: tuple[Tensor | None, ...], rest: tuple) -> tuple:
    """The backward op with tangents in `grads`, in which it is linear."""
    pairs = [(None, None) if g is None else forward_ad.unpack_dual(g) for g in grads]
    *states, dweights = backward(*(primal for primal, _ in pairs), *rest)
    *tangents, tangent_weights = backward(*(tangent for _, tangent in pairs), *rest)
    dx, dhx, dcx, *dual_weights = (
        forward_ad.make_dual(primal, tangent)
        for primal, tangent in zip((*states, *dweights), (*tangents, *tangent_weights), strict=True)
    )
    return dx, dhx, dcx, dual_weights


def _backward_autograd(keys: Any, *arguments: Any) -> tuple:
    grads, made, needs, members, call = BackwardCall.of(*arguments)
    dual = _has_tangent(*call.tensors)
    if dual and not tangents.has_kernels(call):
        # As forward does.
        found = derivatives.plain_gradients(call, needs, grads)
        dx, dhx, dcx, *dweights = (made[0].new_empty(0) if g is None else g for g in found)
        return dx, dhx, dcx, dweights
    if not dual and _has_tangent(*grads):
        return _dual_of_gradients(grads, arguments[RESULTS:])
    if not dual and not _needs_graph(*grads, *call.tensors):
        return _below_autograd(backward, keys, arguments)
    dx, dhx, dcx, *dweights = apply(
        _Backward, keys, made, needs, members, call.constants, *grads, *call.tensors
    )
    return dx, dhx, dcx, dweights


register("forward", _forward_autograd, "Autograd")
register("backward", _backward_autograd, "Autograd")
register("infer", _infer_autograd, "Autograd")
register("infer_quantized", _infer_quantized_autograd, "Autograd")
