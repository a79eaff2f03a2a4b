"""The ops: their arguments and results, their fake implementations, their derivatives.

`torch.ops.fusedrnn.forward` runs a whole stack of layers and `torch.ops.fusedrnn.backward` its
back-propagation through time. `torch.ops.fusedrnn.infer` is forward of a plain call without
gradients; it has few arguments and results, which dominate the cost of a small call. All are
defined in csrc/torch. Arguments, with T steps, B rows of the batch, D directions, H hidden
units, P = proj_size or H, L layers:

    x            (T, B, input_size), or (tokens, input_size) with batch_sizes (packed); or integers
                 (T, B), (tokens,), which stand for one-hot vectors as wide as the first w_ih
    hx, cx       (L * D, B, P), (L * D, B, H) or None for zeros; cx of an LSTM only
    weights      torch.nn's, per layer and direction: w_ih, w_hh, [b_ih, b_hh], [w_hr]; with
                 layer_norm then gain_ih, gain_hh (as the biases), an LSTM's gain_c, shift_c (H,)
    batch_sizes  int64 (T,), of a PackedSequence
    lengths      integers (B,) in [0, T]: steps of each row of padded input
    mask         uint8 (L - 1, tokens, D * P), the dropout between layers: 1 keeps
    resets       bool (T, B) or (tokens,): where a row begins a new sequence, from zeros
    h_mask       (L * D, B, P), float64 for float64 and float32 for the rest: h is multiplied with
                 it before W_hh (recurrent dropout)
    zone_h       uint8 (L * D, tokens, P), zone_c with H: 1 keeps the unit's old value (zoneout);
                 without them each keeps the part that Config says
    dropout      the probability that mask was drawn with
    save         whether the reserve is filled; without it backward runs forward again to fill one

forward returns y (like x, width D * P), hn, cn (empty but for an LSTM), and the reserve; then, with
all_states and else empty, hs (L - 1, T, B, D * P), the outputs of all layers but the last, and an
LSTM's cs (L, T, B, D * H), in float64 for float64 and float32 for the rest.
infer returns y, hn, and cn of an LSTM, else None.
`torch.ops.fusedrnn.infer_quantized` is infer with weights that fusedrnn/quantized.py packs, in
float32, with batch_sizes or lengths, the input's width and the format of the weights.
backward returns the gradients of x, hx, cx and each weight; `needs` says which are required, and
the others are empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as _C_functorch
from torch.autograd import forward_ad

from fusedrnn import _C, reference

forward = torch.ops.fusedrnn.forward.default
infer = torch.ops.fusedrnn.infer.default
backward = torch.ops.fusedrnn.backward.default
infer_quantized = torch.ops.fusedrnn.infer_quantized.default


class Config(NamedTuple):
    """What describes a stack besides its tensors; the ops' arguments of the same names."""

    mode: str
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    bidirectional: bool
    zoneout_h: float = 0.0
    zoneout_c: float = 0.0
    all_states: bool = False
    layer_norm: bool = False

    @property
    def out_size(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


def _check_devices(x: Tensor, *tensors: Tensor | None) -> None:
    """Raises where a tensor is not on the device of x. Meta tensors among real ones lead here."""
    for t in tensors:
        if t is not None and t.device != x.device:
            raise RuntimeError(
                f"fusedrnn: expected all tensors on {x.device} like the input, got {t.device}"
            )


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and cell states."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tokens_shape(x: Tensor) -> torch.Size:
    """(T, B) or (tokens,), also where x is integers."""
    return x.shape[:-1] if x.is_floating_point() else x.shape


@torch.library.register_fake("fusedrnn::forward")
def _fake_forward(  # type: ignore[no-untyped-def]
    x, hx, cx, weights, batch_sizes, lengths, mask, resets, h_mask, zone_h, zone_c, dropout, *rest
):
    _check_devices(x, hx, cx, mask, resets, h_mask, zone_h, zone_c, *weights)
    _check_devices(x, *(t for t in (batch_sizes, lengths) if t is not None and t.is_meta))
    config, save = Config(*rest[:-1]), rest[-1]
    like, shape = x if x.is_floating_point() else weights[0], tokens_shape(x)
    if batch_sizes is not None:
        tokens = shape[0]
        # The batch size of packed input is a value; only hx has it as a shape.
        batch = hx.shape[1] if hx is not None else torch.library.get_ctx().new_dynamic_size()
    else:
        tokens, batch = shape[0] * shape[1], shape[1]
    states = config.num_layers * config.directions
    y = like.new_empty((*shape, config.directions * config.out_size))
    hn = like.new_empty((states, batch, config.out_size))
    cn = like.new_empty((states, batch, config.hidden_size) if config.mode == "LSTM" else (0,))
    row = _C.reserve_bytes(
        mode=config.mode,
        dtype=str(like.dtype).removeprefix("torch."),
        hidden_size=config.hidden_size,
        proj_size=config.proj_size,
        num_layers=config.num_layers,
        bidirectional=config.bidirectional,
        zoneout=config.zoneout_h > 0 or config.zoneout_c > 0,
        all_states=config.all_states,
        layer_norm=config.layer_norm,
    )
    reserve = like.new_empty((tokens if save else 0, row), dtype=torch.uint8)
    return y, hn, cn, reserve, *_fake_states(y, config)


@torch.library.register_fake("fusedrnn::infer")
def _fake_infer(x, hx, cx, weights, *stack):  # type: ignore[no-untyped-def]
    others = (*[None] * NON_DIFFERENTIABLE, 0.0, *Config(*stack), False)
    y, hn, cn, *_ = _fake_forward(x, hx, cx, weights, *others)
    return y, hn, cn if stack[0] == "LSTM" else None


@torch.library.register_fake("fusedrnn::infer_quantized")
def _fake_infer_quantized(x, hx, cx, weights, batch_sizes, lengths, *stack):  # type: ignore[no-untyped-def]
    x = x if x.is_floating_point() else x.unsqueeze(-1).float()
    rest = (
        batch_sizes,
        lengths,
        *[None] * (NON_DIFFERENTIABLE - 2),
        0.0,
        *Config(*stack[:6]),
        False,
    )
    y, hn, cn, *_ = _fake_forward(x, hx, cx, weights, *rest)
    return y, hn, cn if stack[0] == "LSTM" else None


def _fake_states(y: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    layers, dtype = config.num_layers, compute_dtype(y.dtype)
    width = config.directions * config.hidden_size
    hs = y.new_empty((layers - 1, *y.shape) if config.all_states else (0,))
    lstm = config.all_states and config.mode == "LSTM"
    return hs, y.new_empty((layers, *y.shape[:-1], width) if lstm else (0,), dtype=dtype)


@torch.library.register_fake("fusedrnn::backward")
def _fake_backward(  # type: ignore[no-untyped-def]
    grad_y, grad_hn, grad_cn, grad_hs, grad_cs, y, reserve, hs, cs, needs, x, hx, cx, weights, *rest
):
    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return y.new_empty(tensor.shape if needed and tensor is not None else (0,))

    batch_sizes, lengths, *masks = rest[:7]
    grads = (grad_y, grad_hn, grad_cn, grad_hs, grad_cs)
    _check_devices(x, *grads, y, reserve, hs, cs, hx, cx, *masks, *weights)
    _check_devices(x, *(t for t in (batch_sizes, lengths) if t is not None and t.is_meta))
    config = Config(*rest[8:])
    hidden = hx
    if hx is None and needs[1]:
        packed = batch_sizes is not None
        batch = torch.library.get_ctx().new_dynamic_size() if packed else x.shape[1]
        hidden = y.new_empty((config.num_layers * config.directions, batch, config.out_size))
    of_weights = [like(w, needed) for w, needed in zip(weights, needs[3:], strict=True)]
    return like(x, needs[0]), like(hidden, needs[1]), like(cx, needs[2]), of_weights


# Autograd is registered by hand: torch.library.register_autograd flattens lists of tensors through
# pytrees, which cost 170 us a training step, more than a small layer takes. A node has tensors one
# by one and a call's constants as one tuple; `Call` converts between these and the op's arguments.


NON_DIFFERENTIABLE = 7  # tensors between cx and the weights, which have no gradient
ALL_STATES = 1 + Config._fields.index("all_states")  # among Call.constants


class Call(NamedTuple):
    """The arguments shared by both ops, split into tensors and constants."""

    # x, hx, cx, batch_sizes, lengths, mask, resets, h_mask, zone_h, zone_c, *weights
    tensors: tuple[Tensor | None, ...]
    constants: tuple  # dropout, *Config

    @staticmethod
    def of(*arguments: Any) -> Call:
        x, hx, cx, weights, *rest = arguments
        return Call(
            (x, hx, cx, *rest[:NON_DIFFERENTIABLE], *weights), tuple(rest[NON_DIFFERENTIABLE:])
        )

    def arguments(self) -> tuple:
        x, hx, cx, *rest = self.tensors
        return (x, hx, cx, rest[NON_DIFFERENTIABLE:], *rest[:NON_DIFFERENTIABLE], *self.constants)

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """x, hx, cx and the weights."""
        return self.tensors[:3] + self.tensors[3 + NON_DIFFERENTIABLE :]

    def non_differentiable(self) -> tuple[Tensor | None, ...]:
        return self.tensors[3 : 3 + NON_DIFFERENTIABLE]


def _below_autograd(op: Any, keys: Any, arguments: tuple) -> Any:
    """`keys`: the dispatcher's key set, None where the dispatcher did not call."""
    with torch._C._AutoDispatchBelowAutograd():
        if keys is None:
            return op(*arguments)
        return op.redispatch(keys & torch._C._after_autograd_keyset, *arguments)


_NOTHING = torch.empty(0, device="cpu")  # whatever the default device at import


def _version_of(y: Tensor) -> Tensor:
    """A tensor whose `_version` is that of `y` and rises where `y` is written in place.

    It holds no memory of `y`: hooks on saved tensors may have moved that elsewhere.
    """
    version = y.detach()
    if type(y) is Tensor:  # another could not be given the data of a plain one
        version.data = _NOTHING
    return version


class _Forward(torch.autograd.Function):
    # Each input or output tensor of a node costs a microsecond: `others` is one tuple, and y, hn
    # and cn are the only outputs unless the dispatcher (`keys`) or all_states requires more.
    @staticmethod
    def forward(ctx: Any, keys: Any, save: bool, constants: tuple, others: tuple, *of_graph: Any):  # type: ignore[no-untyped-def]
        x, hx, cx, *weights = of_graph
        arguments = (x, hx, cx, weights, *others, *constants, save)
        results = _below_autograd(forward, keys, arguments)
        y, _, _, reserve, *states = results
        plain = keys is None and not constants[ALL_STATES]  # then hs and cs are empty
        ctx.set_materialize_grads(False)
        # torch.nn allows its output to be written in place. So y is saved with a version counter of
        # its own; where the output's counter has changed, backward computes y again.
        ctx.output = _version_of(y)
        ctx.version = ctx.output._version
        ctx.states = states if plain else ()
        kept = () if plain else states
        ctx.save_for_backward(y.data, reserve, *kept, x, hx, cx, *others, *weights)
        ctx.constants, ctx.save = constants, save
        if plain:
            return results[:3]
        ctx.mark_non_differentiable(reserve)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple:
        y, reserve, *saved = ctx.saved_tensors
        saved = (*ctx.states, *saved)
        hs, cs, tensors = saved[0], saved[1], saved[2:]
        grads = (*grads[:3], *(grads[4:] or (None, None)))
        needs = list(ctx.needs_input_grad[4:])
        call = Call(tensors, ctx.constants)
        if any(g is not None and _C_functorch.is_legacy_batchedtensor(g) for g in grads):
            # is_grads_batched, for which no batching rule can be registered
            return (*[None] * 4, *_plain_gradients(call, needs, grads))
        if not ctx.save or ctx.output._version != ctx.version:
            with torch.no_grad():
                y, _, _, reserve, hs, cs = forward(*call.arguments(), True)
        arguments = (*grads, y, reserve, hs, cs, needs, *call.arguments())
        if torch.is_grad_enabled() or not can_skip_dispatch((*grads, *tensors)):
            *states, dweights = backward(*arguments)
        else:
            *states, dweights = _below_autograd(backward, None, arguments)
        found = zip((*states, *dweights), needs, strict=True)
        return (*[None] * 4, *(g if n else None for g, n in found))


# Function.apply without its search for tensors of finished torch.func transforms: 2 us.
apply_forward = super(torch.autograd.Function, _Forward).apply


def _plain_gradients(
    call: Call, needs: list[bool], grads: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of call.differentiable() by the reference; None where not required."""
    with torch.enable_grad():
        leaves = [
            t if t is None else t.detach().requires_grad_(need)
            for t, need in zip(call.differentiable(), needs, strict=True)
        ]
        tensors = (*leaves[:3], *call.non_differentiable(), *leaves[3:])
        outputs = reference.forward(*Call(tensors, call.constants).arguments())
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


RESULTS = 5  # of forward that have gradients: y, hn, cn, hs, cs


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, made: tuple, needs: list[bool], constants: tuple, *rest: Any):  # type: ignore[no-untyped-def]
        grads, tensors = rest[:RESULTS], rest[RESULTS:]
        call = Call(tensors, constants)
        arguments = (*grads, *made, needs, *call.arguments())
        *states, dweights = _below_autograd(backward, keys, arguments)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*grads, *tensors)
        ctx.constants, ctx.needs = constants, needs
        return (*states, *dweights)

    @staticmethod
    def backward(ctx: Any, *grad_grads: Any) -> tuple:
        saved = ctx.saved_tensors
        grads = _second_derivatives(
            saved[:RESULTS], Call(saved[RESULTS:], ctx.constants), ctx.needs, grad_grads
        )
        return (None,) * 4 + grads


def _second_derivatives(
    grads_out: tuple[Tensor | None, ...],
    call: Call,
    needs: list[bool],
    grad_grads: tuple[Tensor | None, ...],
) -> tuple:
    """Differentiates the backward op through the plain PyTorch reference, any number of times.

    Returns the gradients of grads_out and of call.tensors.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Fresh nodes: the graph that made the arguments is not differentiated here.
        sources = [
            t.view_as(t) if t is not None and t.requires_grad else t
            for t in (*grads_out, *call.tensors)
        ]
        here = Call(tuple(sources[RESULTS:]), call.constants)
        outputs = reference.forward(*here.arguments())
        pairs = [(o, g) for o, g in zip(outputs, sources[:RESULTS], strict=True) if g is not None]
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
        live = [(g, gg) for g, (_, gg) in zip(first, wanted, strict=True) if g.requires_grad]
        leaves = [t for t in sources if t is not None and t.requires_grad]
        second: Any = [None] * len(leaves)
        if live:
            second = torch.autograd.grad(
                [g for g, _ in live],
                leaves,
                [gg for _, gg in live],
                create_graph=create_graph,
                allow_unused=True,
            )
    found = iter(second)
    return tuple(next(found) if t is not None and t.requires_grad else None for t in sources)


def _needs_graph(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _has_tangent(*tensors: Tensor | None) -> bool:
    if forward_ad._current_level < 0:
        return False
    return any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def _forward_autograd(keys: Any, *arguments: Any) -> tuple:
    *rest, save = arguments
    call = Call.of(*rest)
    if _has_tangent(*call.tensors):
        # Forward mode goes through the plain implementation, and so does its backward.
        y, hn, cn, hs, cs = reference.forward(*rest)
        return y, hn, cn, y.new_empty((0, 0), dtype=torch.uint8), hs, cs
    if not _needs_graph(*call.tensors):
        return _below_autograd(forward, keys, arguments)
    return _Forward.apply(
        keys, save, call.constants, call.non_differentiable(), *call.differentiable()
    )


def can_skip_dispatch(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether an op may be called below the dispatcher's keys.

    Forward mode, compilers, tracers, and tensor classes or modes that override torch have to see
    the dispatcher call it.
    """
    return not (
        forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
        or torch._C._is_tracing()
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
        results = _below_autograd(forward, None, (*call, save))
    return results[:3] + (results[4:] or (None, None))


def _infer_autograd(keys: Any, *arguments: Any) -> tuple:
    x, hx, cx, weights, *stack = arguments
    if _has_tangent(x, hx, cx, *weights) or _needs_graph(x, hx, cx, *weights):
        others = (*[None] * NON_DIFFERENTIABLE, 0.0, *Config(*stack), True)
        y, hn, cn, *_ = forward(x, hx, cx, weights, *others)
        return y, hn, cn if stack[0] == "LSTM" else None
    return _below_autograd(infer, keys, arguments)


def _infer_quantized_autograd(keys: Any, *arguments: Any) -> tuple:
    return _below_autograd(infer_quantized, keys, arguments)  # has no derivative, as torch's int8


def _backward_autograd(keys: Any, *arguments: Any) -> tuple:
    grads, made, needs = arguments[:RESULTS], arguments[RESULTS : RESULTS + 4], arguments[9]
    call = Call.of(*arguments[10:])
    if _has_tangent(*grads, *call.tensors):
        raise NotImplementedError(
            "fusedrnn: forward-mode derivatives of a backward pass are not supported yet: "
            "use fusedrnn.unswap, or fusedrnn.reference"
        )
    if not _needs_graph(*grads, *call.tensors):
        return _below_autograd(backward, keys, arguments)
    dx, dhx, dcx, *dweights = _Backward.apply(
        keys, made, needs, call.constants, *grads, *call.tensors
    )
    return dx, dhx, dcx, dweights


_library = torch.library.Library("fusedrnn", "IMPL")
_library.impl("forward", _forward_autograd, "Autograd", with_keyset=True)
_library.impl("backward", _backward_autograd, "Autograd", with_keyset=True)
_library.impl("infer", _infer_autograd, "Autograd", with_keyset=True)
_library.impl("infer_quantized", _infer_quantized_autograd, "Autograd", with_keyset=True)
