"""The ops as standard ONNX nodes, LSTM, GRU and RNN, in torch.onnx.export's default exporter."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.functional import embedding

from fusedrnn import calls

# Of each mode: ONNX's operator, torch.nn's gates in ONNX's order, attributes of every direction.
OPERATORS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "RNN_TANH": ("RNN", (0,), {"activations": "Tanh"}),
    "RNN_RELU": ("RNN", (0,), {"activations": "Relu"}),
    "GRU": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z r n of r z n
    "LSTM": ("LSTM", (0, 3, 1, 2), {}),  # i o f g of i f g o
}


def _refuse(what: str, instead: str) -> NoReturn:
    raise NotImplementedError(f"fusedrnn: torch.onnx.export takes no {what}: {instead}")


def refuse_tracing(more: bool) -> None:
    """Raises where torch.onnx.export(dynamo=False) traces a call that torch.nn does not have."""
    if more and torch.onnx.is_in_onnx_export():
        _refuse("lengths, resets, integers or regularisers with dynamo=False", "leave that out")


def _check(call: calls.Call, config: calls.Config) -> None:
    _, _, mask, resets, h_mask, zone_h, zone_c = call.non_differentiable()
    on_aten = "ONNX's layers have none; torch.export has, also with run_decompositions()"
    if mask is not None:
        _refuse("dropout between layers", "call model.eval() before the export")
    if h_mask is not None:
        _refuse("recurrent_dropout", "call model.eval() before the export")
    if resets is not None:
        _refuse("resets", on_aten)
    if zone_h is not None or zone_c is not None or config.zoneout_h or config.zoneout_c:
        _refuse("zoneout", on_aten)
    if config.layer_norm:
        _refuse("layer_norm", on_aten)
    if config.proj_size:
        _refuse("proj_size", on_aten)
    if config.all_states and config.mode == "LSTM":
        _refuse("return_all of an LSTM", "ONNX's returns c of the last step only")


def _reordered(weight: Tensor, gates: tuple[int, ...]) -> Tensor:
    if gates == tuple(range(len(gates))):
        return weight
    rows = weight.shape[0] // len(gates)
    return torch.cat([weight[g * rows : (g + 1) * rows] for g in gates])


def forward(call: calls.Call, config: calls.Config) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """y, hn, an LSTM's cn, and hs (the outputs of all layers but the last) as ONNX nodes."""
    _check(call, config)
    x, hx, cx = call.tensors[:3]
    lengths, weights = call.tensors[4], call.tensors[3 + calls.NON_DIFFERENTIABLE :]
    assert x is not None
    operator, gates, attributes = OPERATORS[config.mode]
    directions = config.directions
    attributes = {
        name: [value] * directions if isinstance(value, str) else value
        for name, value in attributes.items()
    }
    attributes["hidden_size"] = config.hidden_size
    attributes["direction"] = "bidirectional" if config.bidirectional else "forward"
    each = len(weights) // (config.num_layers * directions)
    outputs, h_n, c_n = [], [], []
    for layer in range(config.num_layers):
        start = layer * directions
        own = [weights[(start + d) * each :][:each] for d in range(directions)]
        kinds = [[_reordered(w, gates) for w in kind] for kind in zip(*own, strict=True)]
        w_ih, w_hh = torch.stack(kinds[0]), torch.stack(kinds[1])
        biases = [torch.cat(both) for both in zip(*kinds[2:], strict=True)]
        if layer == 0 and not x.is_floating_point():
            x, w_ih = _gathered(x, w_ih, lengths)
        initial = [None if s is None else s[start : start + directions] for s in (hx, cx)]
        size, (steps, batch) = config.hidden_size, x.shape[:2]
        state = (directions, batch, size)
        inputs = [x, w_ih, w_hh, torch.stack(biases) if biases else None]
        inputs += [None if lengths is None else lengths.to(torch.int32), initial[0]]
        shapes: list[tuple] = [(steps, directions, batch, size), state]
        if config.mode == "LSTM":
            inputs.append(initial[1])
            shapes.append(state)
        y, *states = torch.onnx.ops.symbolic_multi_out(
            operator, inputs, attributes, dtypes=[w_hh.dtype] * len(shapes), shapes=shapes
        )
        if lengths is not None:  # ONNX does not say what the states of a row without steps are
            states = [
                torch.where((lengths > 0)[:, None], new, 0 if old is None else old)
                for new, old in zip(states, initial, strict=False)
            ]
        x = y.transpose(1, 2).flatten(2)
        outputs.append(x)
        h_n.append(states[0])
        c_n += states[1:]
    hs = torch.stack(outputs[:-1]) if config.all_states and outputs[:-1] else x.new_empty(0)
    return outputs[-1], torch.cat(h_n), torch.cat(c_n) if c_n else None, hs


def _gathered(tokens: Tensor, w_ih: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Input and weight (D, gates * H, in) whose product is that of one-hot vectors with w_ih.

    ONNX's nodes multiply their input with W. So one of both is an identity, the narrower one, and
    the rows of the other are gathered.
    """
    if lengths is not None:  # what lies after a length need not be an index
        steps = torch.arange(tokens.shape[0], device=tokens.device)
        tokens = torch.where(steps[:, None] < lengths, tokens, 0)
    directions, rows, width = w_ih.shape
    if width <= directions * rows:
        table = torch.eye(width, dtype=w_ih.dtype, device=w_ih.device)
    else:
        table = w_ih.flatten(0, 1).t()
        w_ih = torch.eye(directions * rows, dtype=w_ih.dtype, device=w_ih.device)
        w_ih = w_ih.view(directions, rows, directions * rows)
    return embedding(tokens.long(), table), w_ih
