"""The stack in plain PyTorch, step by step: slow, obvious, differentiable any number of times.

It is what the kernels are tested against, and what their second derivatives are taken through.
Formulas are those of torch.nn.RNN, GRU and LSTM; csrc/cells states the same for the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

# (x W_ih^T + b_ih, h W_hh^T + b_hh, h, c) -> (h, c); c is None but for an LSTM
State = tuple[Tensor, "Tensor | None"]
Step = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], State]


def rnn_tanh_step(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor | None) -> State:
    return torch.tanh(gx + gh), c


def rnn_relu_step(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor | None) -> State:
    return torch.relu(gx + gh), c


def gru_step(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor | None) -> State:
    rx, zx, nx = gx.chunk(3, -1)
    rh, zh, nh = gh.chunk(3, -1)
    r, z = torch.sigmoid(rx + rh), torch.sigmoid(zx + zh)
    n = torch.tanh(nx + r * nh)
    return (1 - z) * n + z * h, c


def lstm_step(gx: Tensor, gh: Tensor, h: Tensor, c: Tensor | None) -> State:
    i, f, g, o = (gx + gh).chunk(4, -1)
    assert c is not None
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


STEPS: dict[str, Step] = {
    "RNN_TANH": rnn_tanh_step,
    "RNN_RELU": rnn_relu_step,
    "GRU": gru_step,
    "LSTM": lstm_step,
}


def layer(
    step: Step,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool,
    lengths: Tensor | None,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One layer in one direction: x (T, B, in), h (B, P), c (B, H) -> y (T, B, P), h_n, c_n.

    x may be integers (T, B), which stand for one-hot vectors: a column of W_ih each.
    """
    w_ih, w_hh, *more = weights
    b_ih, b_hh = more[:2] if bias else (None, None)
    w_hr = more[2 * bias] if len(more) > 2 * bias else None
    if x.is_floating_point():
        gx = linear(x, w_ih, b_ih)
    else:
        gx = embedding(x, w_ih.t()) + (0 if b_ih is None else b_ih)
    steps = range(len(x))
    outputs: list[Tensor] = []
    for t in reversed(steps) if reverse else steps:
        h_new, c_new = step(gx[t], linear(h, w_hh, b_hh), h, c)
        if w_hr is not None:
            h_new = linear(h_new, w_hr)
        out = h_new
        if lengths is not None:
            active = (t < lengths)[:, None]
            out = torch.where(active, h_new, 0)
            h_new = torch.where(active, h_new, h)
            if c is not None and c_new is not None:
                c_new = torch.where(active, c_new, c)
        h, c = h_new, c_new
        outputs.append(out)
    if reverse:
        outputs.reverse()
    y = torch.stack(outputs) if outputs else h.new_empty((0, *h.shape))
    return y, h, c


def forward(
    x: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    mode: str,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bias: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward op in plain PyTorch; arguments and results as in `fusedrnn.ops`, no reserve."""
    if batch_sizes is not None:
        x, lengths = pad_packed_sequence(PackedSequence(x, batch_sizes))
    if lengths is not None:
        lengths = lengths.to(x.device)
        valid = torch.arange(len(x), device=x.device)[:, None] < lengths
    like = x
    if not x.is_floating_point():
        # What lies behind a length is not looked at: it need not be an index.
        x = (x if lengths is None else torch.where(valid, x, 0)).long()
        like = weights[0]
    states = num_layers * (2 if bidirectional else 1)
    if hx is None:
        hx = like.new_zeros(states, x.shape[1], proj_size or hidden_size)
    if cx is None and mode == "LSTM":
        cx = like.new_zeros(states, x.shape[1], hidden_size)
    each = len(weights) // states
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    for i in range(num_layers):
        if i and mask is not None:
            keep = mask[i - 1].to(x.dtype)
            if batch_sizes is not None:
                keep = x.new_zeros(x.shape).index_put((valid,), keep)
            x = x * (keep.view(x.shape) * (1 / (1 - dropout) if dropout < 1 else 0.0))
        outputs = []
        for d in range(2 if bidirectional else 1):
            j = len(h_n)
            c0 = None if cx is None else cx[j]
            part = weights[each * j : each * (j + 1)]
            y, h, c = layer(STEPS[mode], x, hx[j], c0, part, bias, lengths, reverse=d == 1)
            outputs.append(y)
            h_n.append(h)
            if c is not None:
                c_n.append(c)
        x = torch.cat(outputs, -1)
    if batch_sizes is not None:
        x = x[valid]
    return x, torch.stack(h_n), torch.stack(c_n) if c_n else hx.new_empty(0)
