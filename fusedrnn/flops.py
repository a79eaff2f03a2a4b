"""What torch.utils.flop_counter.FlopCounterMode counts for the ops: their matrix products.

As torch counts torch.nn's: two operations for a multiply-add, nothing for element-wise work. Padded
steps count, as rows of `lengths` may be on a device. Integer input has no product.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fusedrnn import calls
from fusedrnn.on_import import when_imported


def _layers(weights: list[Tensor], config: calls.Config) -> list[list[Tensor]]:
    """The weights of each layer and direction."""
    each = len(weights) // (config.num_layers * config.directions)
    return [weights[i : i + each] for i in range(0, len(weights), each)]


def _size(matrix: Tensor) -> int:
    """Of an ensemble's, that of one, which each token is multiplied with."""
    return matrix.shape[-2] * matrix.shape[-1]


def _tokens(x: Tensor) -> int:
    return calls.tokens_shape(x).numel()


def _batch(x: Tensor, hx: Tensor | None, batch_sizes: Tensor | None) -> int:
    """0 where it is a value that a trace does not have."""
    if batch_sizes is None:
        return x.shape[1]
    if hx is not None:
        return hx.shape[1]
    return int(batch_sizes[0]) if type(batch_sizes) is Tensor else 0


def _config(call: tuple) -> calls.Config:
    return calls.Config(*call[-len(calls.Config._fields) :])


def forward(*arguments: Any, out_val: Any = None) -> int:
    call = arguments[:-1]  # without `save`
    return _products(call[0], call[3], _config(call))


def infer(
    x: Tensor, hx: Any, cx: Any, weights: list[Tensor], *stack: Any, out_val: Any = None
) -> int:
    return _products(x, weights, calls.Config(*stack[: calls.STACK]))


def infer_quantized(
    x: Tensor,
    hx: Any,
    cx: Any,
    weights: list[Tensor],
    batch_sizes: Any,
    lengths: Any,
    *stack: Any,
    out_val: Any = None,
) -> int:
    """From sizes, as packed weights have other shapes."""
    *described, input_size, _ = stack
    config = calls.Config(*described)
    rows = {"LSTM": 4, "GRU": 3}.get(config.mode, 1) * config.hidden_size
    flops = 0
    for layer in range(config.num_layers):
        width = config.directions * config.out_size if layer else input_size
        gathers = layer == 0 and not x.is_floating_point()
        flops += rows * ((0 if gathers else width) + config.out_size)
        flops += config.proj_size * config.hidden_size
    return 2 * _tokens(x) * config.directions * flops


def _products(x: Tensor, weights: list[Tensor], config: calls.Config) -> int:
    flops = 0
    for i, (w_ih, w_hh, *more) in enumerate(_layers(weights, config)):
        gathers = i < config.directions and not x.is_floating_point()
        flops += (0 if gathers else _size(w_ih)) + _size(w_hh)
        if config.proj_size:
            flops += _size(more[2 if config.bias else 0])
    return 2 * _tokens(x) * flops


def backward(*arguments: Any, out_val: Any = None) -> int:
    """Only products that a required gradient depends on."""
    needs, _, *call = arguments[calls.RESULTS + 4 :]
    x, hx, weights, config = call[0], call[1], call[3], _config(tuple(call))
    tokens, batch = _tokens(x), _batch(x, hx, call[4])
    need_x, need_hx, need_cx = needs[:3]
    layers = _layers(weights, config)
    required = [any(n) for n in _layers(needs[3:], config)]
    first = 0 if need_x or need_hx or need_cx else required.index(True) // config.directions
    flops = 0
    for i, (w_ih, w_hh, *more) in enumerate(layers):
        layer, need = i // config.directions, needs[3 + i * len(layers[0]) :]
        if layer < first:
            continue
        gathers = layer == 0 and not x.is_floating_point()
        inputs = bool(need[0]) and not gathers, layer > first or (layer == 0 and need_x)
        flops += sum(inputs) * tokens * _size(w_ih)
        steps = tokens if need_hx else tokens - batch
        flops += (need[1] * tokens + steps) * _size(w_hh)
        if config.proj_size:
            which = 2 if config.bias else 0
            flops += (1 + need[2 + which]) * tokens * _size(more[which])
    return 2 * flops


def register() -> None:
    """Makes FlopCounterMode count the ops, whether it is imported already or later."""

    def add(counter: ModuleType) -> None:
        for formula in (forward, infer, infer_quantized, backward):
            op = getattr(torch.ops.fusedrnn, formula.__name__)
            counter.register_flop_formula(op, get_raw=True)(formula)

    when_imported("torch.utils.flop_counter", add)
