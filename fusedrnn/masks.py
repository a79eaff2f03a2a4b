"""Draws the masks of a call from torch's generator: dropout between layers and regularisers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedrnn import calls
from fusedrnn.layer import LayerBase


def _draw(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype, probability: float) -> Tensor:
    """Ones with this probability and else zeros, from torch's generator.

    Under vmap as its `randomness` says, where the operator in place refuses what is not batched.
    """
    if torch._C._are_functorch_transforms_active():
        return torch.bernoulli(torch.empty(shape, dtype=dtype, device=like.device), probability)
    return like.new_empty(shape, dtype=dtype).bernoulli_(probability)


def between_layers(module: LayerBase, x: Tensor, config: calls.Config) -> Tensor | None:
    """The op's `mask` (L - 1, tokens, D * P), drawn in torch.nn's order."""
    if not (module.training and module.dropout > 0 and module.num_layers > 1):
        return None
    keep, layers = 1 - module.dropout, module.num_layers - 1
    shape = math.prod(calls.tokens_shape(x)), config.directions * config.out_size
    if torch._C._are_functorch_transforms_active() and keep:
        return torch.stack([_draw(x, shape, torch.uint8, keep) for _ in range(layers)])
    mask = x.new_empty((layers, *shape), dtype=torch.uint8)
    if not keep:
        return mask.zero_()  # torch draws no numbers here either
    for layer in mask:
        layer.bernoulli_(keep)
    return mask


def of_recurrence(
    module: LayerBase, x: Tensor, batch_sizes: Tensor | None, like: Tensor, config: calls.Config
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The op's h_mask, zone_h and zone_c, drawn in this order."""
    if not (module.training and module.only_ours()):
        return None, None, None
    rate = module.recurrent_dropout
    # Not Size.numel(), which torch.export would take for a constant.
    states, tokens = config.num_layers * config.directions, math.prod(calls.tokens_shape(x))
    h_mask = None
    if rate:
        batch = x.size(1) if batch_sizes is None else int(batch_sizes[0])
        shape, dtype = (states, batch, config.out_size), calls.compute_dtype(like.dtype)
        if rate < 1:
            h_mask = _draw(like, shape, dtype, 1 - rate).div_(1 - rate)
        else:
            h_mask = like.new_zeros(shape, dtype=dtype)

    def zones(rate: float, width: int) -> Tensor | None:
        if not rate:
            return None
        return _draw(like, (states, tokens, width), torch.uint8, rate)

    zone_h = zones(config.zoneout_h, config.out_size)
    return h_mask, zone_h, zones(config.zoneout_c, config.hidden_size)
