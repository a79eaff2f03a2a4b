"""Draws the masks of a call from torch's generator: dropout between layers and regularisers."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fusedrnn import ops
from fusedrnn.layer import LayerBase


def between_layers(module: LayerBase, x: Tensor, config: ops.Config) -> Tensor | None:
    """The op's `mask` (L - 1, tokens, D * P), drawn in torch.nn's order."""
    if not (module.training and module.dropout > 0 and module.num_layers > 1):
        return None
    tokens = math.prod(ops.tokens_shape(x))
    mask = x.new_empty(
        (module.num_layers - 1, tokens, config.directions * config.out_size), dtype=torch.uint8
    )
    if module.dropout == 1:
        return mask.zero_()  # torch draws no numbers here either
    for layer in mask:
        layer.bernoulli_(1 - module.dropout)
    return mask


def of_recurrence(
    module: LayerBase, x: Tensor, batch_sizes: Tensor | None, like: Tensor, config: ops.Config
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The op's h_mask, zone_h and zone_c, drawn in this order."""
    if not (module.training and module.only_ours()):
        return None, None, None
    rate = module.recurrent_dropout
    # Not Size.numel(), which torch.export would take for a constant.
    states, tokens = config.num_layers * config.directions, math.prod(ops.tokens_shape(x))
    h_mask = None
    if rate:
        batch = x.size(1) if batch_sizes is None else int(batch_sizes[0])
        dtype = ops.compute_dtype(like.dtype)
        h_mask = like.new_empty((states, batch, config.out_size), dtype=dtype)
        h_mask = h_mask.bernoulli_(1 - rate).div_(1 - rate) if rate < 1 else h_mask.zero_()

    def zones(rate: float, width: int) -> Tensor | None:
        if not rate:
            return None
        mask = like.new_empty((states, tokens, width), dtype=torch.uint8)
        return mask.bernoulli_(rate)

    zone_h = zones(config.zoneout_h, config.out_size)
    return h_mask, zone_h, zones(config.zoneout_c, config.hidden_size)
