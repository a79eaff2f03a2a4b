"""The two ops that everything runs through: their shapes, their gradients, their use.

`torch.ops.fusedrnn.forward` runs a whole stack of layers, `torch.ops.fusedrnn.backward` its
back-propagation through time; both are defined in csrc/torch. Arguments, with T steps, B rows of
the batch, D directions, H hidden units, P = proj_size or H, L layers:

    x            (T, B, input_size), or (tokens, input_size) with batch_sizes (packed)
    hx, cx       (L * D, B, P), (L * D, B, H) or None for zeros; cx of an LSTM only
    weights      torch.nn's, per layer and direction: w_ih, w_hh, [b_ih, b_hh], [w_hr]
    batch_sizes  int64 (T,), of a PackedSequence
    lengths      integers (B,) in [0, T]: steps of each row of padded input
    mask         uint8 (L - 1, tokens, D * P), the dropout between layers: 1 keeps
    dropout      the probability that mask was drawn with
    save         whether the reserve is filled, without which there is no backward

forward returns y (like x, width D * P), hn, cn (empty but for an LSTM), and the reserve.
backward returns the gradients of x, hx, cx and each weight; `needs` says which are wanted, the
others come back empty.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedrnn import _C, reference

forward = torch.ops.fusedrnn.forward.default
backward = torch.ops.fusedrnn.backward.default


class Config(NamedTuple):
    """What describes a stack besides its tensors; the ops' arguments of the same names."""

    mode: str
    hidden_size: int
    proj_size: int
    num_layers: int
    bias: bool
    bidirectional: bool

    @property
    def out_size(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1


@torch.library.register_fake("fusedrnn::forward")
def _(x, hx, cx, weights, batch_sizes, lengths, mask, dropout, *rest):
    config, save = Config(*rest[:-1]), rest[-1]
    if batch_sizes is not None:
        tokens = x.shape[0]
        # The batch of packed input is a value, not a shape: hx knows it, or nothing does.
        batch = hx.shape[1] if hx is not None else torch.library.get_ctx().new_dynamic_size()
    else:
        tokens, batch = x.shape[0] * x.shape[1], x.shape[1]
    states = config.num_layers * config.directions
    y = x.new_empty((*x.shape[:-1], config.directions * config.out_size))
    hn = x.new_empty((states, batch, config.out_size))
    cn = x.new_empty((states, batch, config.hidden_size) if config.mode == "LSTM" else (0,))
    row = _C.reserve_bytes(
        config.mode,
        str(x.dtype).removeprefix("torch."),
        config.hidden_size,
        config.proj_size,
        config.num_layers,
        config.bidirectional,
    )
    return y, hn, cn, x.new_empty((tokens if save else 0, row), dtype=torch.uint8)


@torch.library.register_fake("fusedrnn::backward")
def _(grad_y, grad_hn, grad_cn, y, reserve, needs, x, hx, cx, weights, *rest):
    def like(tensor, needed):
        return x.new_empty(tensor.shape if needed and tensor is not None else (0,))

    config = Config(*rest[-6:])
    hidden = hx
    if hx is None and needs[1]:
        hidden = x.new_empty((config.num_layers * config.directions, x.shape[1], config.out_size))
    grads = [like(w, needed) for w, needed in zip(weights, needs[3:], strict=True)]
    return like(x, needs[0]), like(hidden, needs[1]), like(cx, needs[2]), grads


class _Saved:
    """Packs a call's tensors into what an autograd context keeps, and back."""

    @staticmethod
    def put(ctx: Any, first: list[Tensor | None], call: tuple) -> None:
        x, hx, cx, weights, batch_sizes, lengths, mask, *constants = call
        ctx.save_for_backward(*first, x, hx, cx, batch_sizes, lengths, mask, *weights)
        ctx.constants = constants
        ctx.first = len(first)

    @staticmethod
    def get(ctx: Any) -> tuple[list[Tensor | None], tuple]:
        saved = list(ctx.saved_tensors)
        first, saved = saved[: ctx.first], saved[ctx.first :]
        x, hx, cx, batch_sizes, lengths, mask, *weights = saved
        return first, (x, hx, cx, weights, batch_sizes, lengths, mask, *ctx.constants)


def _wanted(grads: Any, needs: list[bool]) -> tuple:
    dx, dhx, dcx, dweights = grads
    dx, dhx, dcx, *dweights = [
        g if n else None for g, n in zip([dx, dhx, dcx, *dweights], needs, strict=True)
    ]
    return dx, dhx, dcx, dweights


def _setup_forward(ctx: Any, inputs: tuple, output: tuple) -> None:
    y, _, _, reserve = output
    *call, ctx.save = inputs
    ctx.set_materialize_grads(False)
    _Saved.put(ctx, [y, reserve], tuple(call))


def _backward_of_forward(ctx: Any, grad_y, grad_hn, grad_cn, _) -> tuple:
    if not ctx.save:
        raise RuntimeError("fusedrnn: the forward op was called with save=False: no backward")
    (y, reserve), call = _Saved.get(ctx)
    need = ctx.needs_input_grad
    needs = [bool(n) for n in (need[0], need[1], need[2], *need[3])]
    grads = backward(grad_y, grad_hn, grad_cn, y, reserve, needs, *call)
    return (*_wanted(grads, needs), *[None] * 11)


def _setup_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    grad_y, grad_hn, grad_cn, _, _, ctx.needs, *call = inputs
    ctx.set_materialize_grads(False)
    _Saved.put(ctx, [grad_y, grad_hn, grad_cn], tuple(call))


def _backward_of_backward(ctx: Any, *grad_grads: Any) -> tuple:
    """Differentiates the backward op through the plain PyTorch reference, any number of times."""
    grads_out, call = _Saved.get(ctx)
    x, hx, cx, weights, *rest = call
    *constants, mode, hidden_size, proj_size, num_layers, bias, bidirectional = rest
    *flat_gg, gg_weights = grad_grads
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Fresh nodes: what is differentiated here is this call, not how its arguments came about.
        sources = [
            t.view_as(t) if t is not None and t.requires_grad else t
            for t in [*grads_out, x, hx, cx, *weights]
        ]
        gy, ghn, gcn, x, hx, cx, *weights = sources
        config = (mode, hidden_size, proj_size, num_layers, bias, bidirectional)
        outputs = reference.forward(x, hx, cx, weights, *constants, *config)
        pairs = [
            (o, g) for o, g in zip(outputs, (gy, ghn, gcn), strict=True) if g is not None
        ]
        inputs = [x, hx, cx, *weights]
        wanted = [
            (t, gg)
            for t, n, gg in zip(inputs, ctx.needs, [*flat_gg, *gg_weights], strict=True)
            if n and gg is not None
        ]
        first = torch.autograd.grad(
            [o for o, _ in pairs],
            [t for t, _ in wanted],
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
    result = [next(found) if t is not None and t.requires_grad else None for t in sources]
    g3, gx, ghx, gcx, gw = result[:3], *result[3:6], result[6:]
    return (*g3, None, None, None, gx, ghx, gcx, gw, *[None] * 10)


torch.library.register_autograd(
    "fusedrnn::forward", _backward_of_forward, setup_context=_setup_forward
)
torch.library.register_autograd(
    "fusedrnn::backward", _backward_of_backward, setup_context=_setup_backward
)
