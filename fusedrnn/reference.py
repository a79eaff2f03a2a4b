"""The stack in plain PyTorch, step by step: slow, simple, differentiable any number of times.

It is what the kernels are tested against, and what derivatives that they lack are taken through.
Formulas are those of torch.nn.RNN, GRU and LSTM; csrc/cells states the same for the kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from fusedrnn.layer_norm import count

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


def lstm_step(
    gx: Tensor,
    gh: Tensor,
    h: Tensor,
    c: Tensor | None,
    seen: Callable[[Tensor], Tensor] = lambda c: c,
) -> State:
    """`seen` maps c to what the output gate multiplies."""
    i, f, g, o = (gx + gh).chunk(4, -1)
    assert c is not None
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(seen(c)), c


STEPS: dict[str, Step] = {
    "RNN_TANH": rnn_tanh_step,
    "RNN_RELU": rnn_relu_step,
    "GRU": gru_step,
    "LSTM": lstm_step,
}


# Also in csrc/cpu/pass/layer_norm.h and csrc/cuda/stepwise/normed_step.cu.
EPSILON = 1e-5


def normalised(a: Tensor) -> Tensor:
    """Over the last dimension, in float32 or float64: squares of float16 overflow."""
    wide = a.to(torch.promote_types(a.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return (centred / torch.sqrt(variance + EPSILON)).to(a.dtype)


class Norm(NamedTuple):
    """Layer normalisation (Ba, Kiros, Hinton, arXiv:1607.06450, supplementary), of one layer and
    direction: W_ih x becomes gain_ih * n(W_ih x), W_hh h likewise, and what an LSTM's output gate
    sees of c is gain_c * n(c) + shift_c. An LSTM's gates are normalised together, of a GRU's r and
    z together and n apart.
    """

    gain_ih: Tensor
    gain_hh: Tensor
    gain_c: Tensor | None = None
    shift_c: Tensor | None = None

    def gates(self, product: Tensor, gain: Tensor) -> Tensor:
        if self.gain_c is not None:
            return normalised(product) * gain
        r, z, n = product.chunk(3, -1)
        rz = normalised(torch.cat([r, z], -1))
        return torch.cat([rz, normalised(n)], -1) * gain

    def cell(self, c: Tensor) -> Tensor:
        assert self.gain_c is not None
        assert self.shift_c is not None
        return normalised(c) * self.gain_c + self.shift_c


def plus(a: Tensor, bias: Tensor | None) -> Tensor:
    return a if bias is None else a + bias


class Regularisers(NamedTuple):
    """Of one layer and direction: what changes the recurrence itself.

    Recurrent dropout (Gal and Ghahramani, arXiv:1512.05287): W_hh h becomes W_hh (h * h_mask), with
    one mask (B, P) for the whole sequence. Zoneout (Krueger et al., arXiv:1606.01305): h and c
    become zone * before + (1 - zone) * new, where zone is a mask (T, B, width) or its expectation.
    """

    h_mask: Tensor | None
    zone_h: Tensor | float
    zone_c: Tensor | float


def zone_out(zone: Tensor | float, before: Tensor, new: Tensor) -> Tensor:
    if isinstance(zone, Tensor):
        zone = zone.to(new.dtype)
    elif not zone:
        return new
    return zone * before + (1 - zone) * new


class Steps(NamedTuple):
    """What a layer reads at each of its T steps, and so (T, ...)."""

    x: Tensor  # the layer's input; as `advance` takes it, x W_ih^T + b_ih
    anew: Tensor | None  # bool (T, B): the step is entered with states of zeros
    active: Tensor | None  # bool (T, B): the row has this step
    zone_h: Tensor | None
    zone_c: Tensor | None


class OfInput(NamedTuple):
    """The weights that a layer applies to its input."""

    w_ih: Tensor
    b_ih: Tensor | None
    norm: Norm | None

    def gates(self, x: Tensor) -> Tensor:
        """x W_ih^T + b_ih of all steps; integers stand for one-hot vectors, a column of W_ih
        each.
        """
        b_ih = self.b_ih
        if not x.is_floating_point():
            gx = embedding(x, self.w_ih.t())
        elif self.norm is None:
            gx, b_ih = linear(x, self.w_ih, b_ih), None
        else:
            gx = linear(x, self.w_ih)
        if self.norm is not None:
            gx = self.norm.gates(gx, self.norm.gain_ih)
        return plus(gx, b_ih)


class Constants(NamedTuple):
    """What a layer reads at every step."""

    w_hh: Tensor
    b_hh: Tensor | None
    w_hr: Tensor | None
    h_mask: Tensor | None
    norm: Norm | None


def advance(
    step: Step, rates: tuple[float, float], constants: Constants, state: State, now: Steps
) -> tuple[State, State]:
    """One step of all rows, from what `now` has for it; `rates`: zoneout's of h and c without
    masks. Returns the state after it, and what it puts out: h and c, zeros past a length.
    """
    h, c = state
    if now.anew is not None:
        h = torch.where(now.anew[:, None], 0, h)
        c = c if c is None else torch.where(now.anew[:, None], 0, c)
    norm = constants.norm
    operand = h if constants.h_mask is None else h * constants.h_mask.to(h.dtype)
    if norm is None:
        gh = linear(operand, constants.w_hh, constants.b_hh)
    else:
        gh = plus(norm.gates(linear(operand, constants.w_hh), norm.gain_hh), constants.b_hh)
        if norm.gain_c is not None:
            step = partial(lstm_step, seen=norm.cell)
    h_new, c_new = step(now.x, gh, h, c)
    if constants.w_hr is not None:
        h_new = linear(h_new, constants.w_hr)
    h_new = zone_out(rates[0] if now.zone_h is None else now.zone_h, h, h_new)
    if c is not None and c_new is not None:
        c_new = zone_out(rates[1] if now.zone_c is None else now.zone_c, c, c_new)
    if now.active is None:
        return (h_new, c_new), (h_new, c_new)
    active = now.active[:, None]
    out = torch.where(active, h_new, 0), None if c_new is None else torch.where(active, c_new, 0)
    kept = None if c is None or c_new is None else torch.where(active, c_new, c)
    return (torch.where(active, h_new, h), kept), out


Advance = Callable[[Constants, State, Steps], "tuple[State, State]"]


def each_step(
    advance: Advance,
    of_input: OfInput,
    constants: Constants,
    state: State,
    steps: Steps,
    reverse: bool,
) -> tuple[State, State]:
    """The state after all steps, and what they put out, stacked: a loop in Python."""
    hs: list[Tensor] = []
    cs: list[Tensor] = []
    count = len(steps.x)
    steps = steps._replace(x=of_input.gates(steps.x))
    # Not s[t], whose derivative has the size of s: T of them would be added up.
    each = [None if s is None else s.unbind() for s in steps]
    for t in reversed(range(count)) if reverse else range(count):
        now = Steps(*(None if s is None else s[t] for s in each))  # type: ignore[arg-type]
        state, (h, c) = advance(constants, state, now)
        hs.append(h)
        if c is not None:
            cs.append(c)
    if reverse:
        hs.reverse()
        cs.reverse()

    def stacked(of_steps: list[Tensor], like: Tensor | None) -> Tensor | None:
        if like is None:
            return None
        return torch.stack(of_steps) if of_steps else like.new_empty((0, *like.shape))

    y, c_all = stacked(hs, state[0]), stacked(cs, state[1])
    assert y is not None
    return state, (y, c_all)


Loop = Callable[[Advance, OfInput, Constants, State, Steps, bool], "tuple[State, State]"]


def layer(
    step: Step,
    x: Tensor,
    h: Tensor,
    c: Tensor | None,
    weights: Sequence[Tensor],
    bias: bool,
    lengths: Tensor | None,
    resets: Tensor | None,
    regularisers: Regularisers,
    reverse: bool,
    norm: Norm | None = None,
    loop: Loop = each_step,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer in one direction: x (T, B, in), h (B, P), c (B, H) -> y (T, B, P), h_n, c_n, cs.

    cs (T, B, H) are the cell states of all steps, None without. resets (T, B) says where a row
    begins a new sequence, which neither direction enters with a state of another.
    x may be integers (T, B), which stand for one-hot vectors: a column of W_ih each.
    """
    w_ih, w_hh, *more = weights
    b_ih, b_hh = more[:2] if bias else (None, None)
    w_hr = more[2 * bias] if len(more) > 2 * bias else None
    active = anew = None
    if lengths is not None:
        active = torch.arange(x.shape[0], device=x.device)[:, None] < lengths
    if resets is not None:
        anew = resets if active is None else resets & active
        if reverse:  # the step before a sequence begins is the last of another one
            anew = torch.cat([anew[1:], torch.zeros_like(anew[:1])])
    zones, rates = (regularisers.zone_h, regularisers.zone_c), [0.0, 0.0]
    masks: list[Tensor | None] = [None, None]
    for i, zone in enumerate(zones):
        if isinstance(zone, Tensor):
            masks[i] = zone
        else:
            rates[i] = zone
    constants = Constants(w_hh, b_hh, w_hr, regularisers.h_mask, norm)
    (h, c), (y, cs) = loop(
        partial(advance, step, (rates[0], rates[1])),
        OfInput(w_ih, b_ih, norm),
        constants,
        (h, c),
        Steps(x, anew, active, *masks),
        reverse,
    )
    return y, h, c, cs


def check_batch_sizes(rows: list[int], tokens: int) -> None:
    """Raises the kernels' errors: torch's pad_packed_sequence does not check batch_sizes."""
    if not rows:
        raise RuntimeError("fusedrnn: batch_sizes is empty")
    if min(rows) < 1 or any(b > a for a, b in pairwise(rows)):
        raise RuntimeError("fusedrnn: batch_sizes must be positive and not rise")
    if sum(rows) != tokens:
        raise RuntimeError(f"fusedrnn: batch_sizes add up to {sum(rows)}, not to {tokens} tokens")


def _of_ensembles(of_one: Callable[..., tuple]) -> Callable[..., tuple]:
    """The same function for stacked weights too: one after the other, each with its own rows."""

    @wraps(of_one)
    def of_all(*arguments: Any, **loop: Any) -> tuple:
        x, hx, cx, weights, batch_sizes, *rest = arguments
        if weights[0].dim() != 3:
            return of_one(*arguments, **loop)
        ensemble, tokens = len(weights[0]), int(batch_sizes is None)
        sizes = None if batch_sizes is None else batch_sizes // ensemble

        def rows(t: Any, dim: int, m: int) -> Any:
            return t if t is None else t[(slice(None),) * dim + (slice(m, None, ensemble),)]

        def joined(parts: tuple[Tensor, ...], dim: int) -> Tensor:
            if parts[0].dim() == 1:  # nothing
                return parts[0]
            return torch.stack(parts, dim + 1).flatten(dim, dim + 1)

        found = []
        for m in range(ensemble):
            masks = [rows(t, d, m) for t, d in zip(rest, (0, 1, tokens, 1, 1, 1), strict=False)]
            own = rows(x, tokens, m), rows(hx, 1, m), rows(cx, 1, m), [w[m] for w in weights]
            found.append(of_one(*own, sizes, *masks, *rest[len(masks) :], **loop))
        dims = tokens, 1, 1, tokens + 1, tokens + 1
        return tuple(joined(p, d) for p, d in zip(zip(*found, strict=True), dims, strict=True))

    return of_all


@_of_ensembles
def forward(
    x: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    resets: Tensor | None,
    h_mask: Tensor | None,
    zone_h: Tensor | None,
    zone_c: Tensor | None,
    dropout: float,
    mode: str,
    hidden_size: int,
    proj_size: int,
    num_layers: int,
    bias: bool,
    bidirectional: bool,
    zoneout_h: float = 0.0,
    zoneout_c: float = 0.0,
    all_states: bool = False,
    layer_norm: bool = False,
    loop: Loop = each_step,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The forward op in plain PyTorch; arguments and results as in `fusedrnn.ops`, no reserve.

    `loop` takes a layer through its steps.
    """
    if batch_sizes is not None:
        if not torch.compiler.is_compiling():
            check_batch_sizes(batch_sizes.tolist(), len(x))
        x, lengths = pad_packed_sequence(PackedSequence(x, batch_sizes))
    if lengths is not None:
        lengths = lengths.to(x.device)
        valid = torch.arange(x.shape[0], device=x.device)[:, None] < lengths
    like = x
    if not x.is_floating_point():
        # Values past a length are ignored: they need not be indices.
        x = (x if lengths is None else torch.where(valid, x, 0)).long()
        like = weights[0]
    states = num_layers * (2 if bidirectional else 1)
    if hx is None:
        hx = like.new_zeros(states, x.shape[1], proj_size or hidden_size)
    if cx is None and mode == "LSTM":
        cx = like.new_zeros(states, x.shape[1], hidden_size)
    tokens = x.shape[:2]

    def padded(values: Tensor) -> Tensor:
        """(tokens, ...) as (T, B, ...)."""
        shape = (*tokens, *values.shape[1:])
        if batch_sizes is None:
            return values.view(shape)
        return values.new_zeros(shape).index_put((valid,), values)

    if resets is not None and batch_sizes is not None:
        resets = padded(resets)
    each = len(weights) // states
    h_n: list[Tensor] = []
    c_n: list[Tensor] = []
    hs: list[Tensor] = []
    cs: list[Tensor] = []
    for i in range(num_layers):
        if i and mask is not None:
            keep = padded(mask[i - 1].to(x.dtype))
            x = x * (keep * (1 / (1 - dropout) if dropout < 1 else 0.0))
        outputs, cells = [], []
        for d in range(2 if bidirectional else 1):
            j = len(h_n)
            c0 = None if cx is None else cx[j]
            part = weights[each * j : each * (j + 1)]
            norm = None
            if layer_norm:
                own = count(mode)
                part, norm = part[:-own], Norm(*part[-own:])
            regularisers = Regularisers(
                None if h_mask is None else h_mask[j],
                zoneout_h if zone_h is None else padded(zone_h[j]),
                zoneout_c if zone_c is None else padded(zone_c[j]),
            )
            y, h, c, of_steps = layer(
                STEPS[mode],
                x,
                hx[j],
                c0,
                part,
                bias,
                lengths,
                resets,
                regularisers,
                reverse=d == 1,
                norm=norm,
                loop=loop,
            )
            outputs.append(y)
            h_n.append(h)
            if c is not None and of_steps is not None:
                c_n.append(c)
                cells.append(of_steps)
        x = torch.cat(outputs, -1)
        hs.append(x)
        if cells:
            cs.append(torch.cat(cells, -1))
    y = hs.pop()
    if batch_sizes is not None:
        y, hs, cs = y[valid], [h[valid] for h in hs], [c[valid] for c in cs]
    none = hx.new_empty(0)
    wide = torch.promote_types(y.dtype, torch.float32)
    return (
        y,
        torch.stack(h_n),
        torch.stack(c_n) if c_n else none,
        (torch.stack(hs) if hs else y.new_empty((0, *y.shape))) if all_states else none,
        torch.stack(cs).to(wide) if all_states and cs else none.to(wide),
    )
