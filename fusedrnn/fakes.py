"""The ops' fake implementations, which make results without values, for torch.compile and meta."""

from __future__ import annotations

import torch
from torch import Tensor

from fusedrnn.calls import (
    NON_DIFFERENTIABLE,
    Config,
    are_stacked,
    compute_dtype,
    plain_call,
    plain_results,
    reserve_rows,
    tokens_shape,
)


def check_devices(x: Tensor, *tensors: Tensor | None) -> None:
    """Raises where a tensor is not on the device of x. Meta tensors among real ones lead here."""
    for t in tensors:
        if t is not None and t.device != x.device:
            raise RuntimeError(
                f"fusedrnn: expected all tensors on {x.device} like the input, got {t.device}"
            )


def forward(  # type: ignore[no-untyped-def]
    x, hx, cx, weights, batch_sizes, lengths, mask, resets, h_mask, zone_h, zone_c, dropout, *rest
):
    check_devices(x, hx, cx, mask, resets, h_mask, zone_h, zone_c, *weights)
    check_devices(x, *(t for t in (batch_sizes, lengths) if t is not None and t.is_meta))
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
    row = sum(reserve_rows(config, like.dtype))
    reserve = like.new_empty((tokens if save else 0, row), dtype=torch.uint8)
    return y, hn, cn, reserve, *_all_states(y, config)


def _infer(*arguments):  # type: ignore[no-untyped-def]
    call, save = plain_call(*arguments)
    return plain_results(call, save, forward(*call, save))


def _infer_quantized(x, hx, cx, weights, batch_sizes, lengths, *stack):  # type: ignore[no-untyped-def]
    x = x if x.is_floating_point() else x.unsqueeze(-1).float()
    rest = (
        batch_sizes,
        lengths,
        *[None] * (NON_DIFFERENTIABLE - 2),
        0.0,
        *Config(*stack[:6]),
        False,
    )
    y, hn, cn, *_ = forward(x, hx, cx, weights, *rest)
    return y, hn, cn if stack[0] == "LSTM" else None


def _all_states(y: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    layers, dtype = config.num_layers, compute_dtype(y.dtype)
    width = config.directions * config.hidden_size
    hs = y.new_empty((layers - 1, *y.shape) if config.all_states else (0,))
    lstm = config.all_states and config.mode == "LSTM"
    return hs, y.new_empty((layers, *y.shape[:-1], width) if lstm else (0,), dtype=dtype)


def backward(  # type: ignore[no-untyped-def]
    grad_y, grad_hn, grad_cn, grad_hs, grad_cs, y, reserve, hs, cs, needs, members, *call
):
    x, hx, cx, weights, *rest = call

    def like(tensor: Tensor | None, needed: bool) -> Tensor:
        return y.new_empty(tensor.shape if needed and tensor is not None else (0,))

    batch_sizes, lengths, *masks = rest[:7]
    grads = (grad_y, grad_hn, grad_cn, grad_hs, grad_cs)
    check_devices(x, *grads, y, reserve, hs, cs, hx, cx, *masks, *weights)
    check_devices(x, *(t for t in (batch_sizes, lengths) if t is not None and t.is_meta))
    config = Config(*rest[8:])
    hidden = hx
    if hx is None and needs[1]:
        packed = batch_sizes is not None
        batch = torch.library.get_ctx().new_dynamic_size() if packed else x.shape[1]
        hidden = y.new_empty((config.num_layers * config.directions, batch, config.out_size))
    lead = (members,) if members else ()
    stacked = are_stacked(weights)
    of_weights = [
        y.new_empty((*lead, *w.shape[1 if members and stacked else 0 :]) if needed else (0,))
        for w, needed in zip(weights, needs[3:], strict=True)
    ]
    return like(x, needs[0]), like(hidden, needs[1]), like(cx, needs[2]), of_weights


def register() -> None:
    fakes = {
        "forward": forward,
        "infer": _infer,
        "infer_quantized": _infer_quantized,
        "backward": backward,
    }
    for op, fake in fakes.items():
        torch.library.register_fake(f"fusedrnn::{op}", fake)
