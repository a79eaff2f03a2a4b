"""What changes the recurrence itself, and what shows all of it: resets, return_all, recurrent
dropout and zoneout, each alone and all together, against the plain PyTorch reference."""

import copy
from typing import NamedTuple

import pytest
import torch
from cases import CELLS, make_pair, random_state
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn import calls, masks, ops, reference

T, B, WIDTH, HIDDEN = 6, 4, 3, 5
REGULARISERS = {
    "none": {},
    "dropout": {"recurrent_dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "both": {"recurrent_dropout": 0.3, "zoneout": 0.4},
    "zoneout of h": {"zoneout": (0.3, 0.0)},
    "zoneout of c": {"zoneout": (0.0, 0.3)},
}


def regularised(cell, which, *sizes, **kwargs):
    """(torch.nn's module, ours with one of REGULARISERS) of the same weights."""
    plain, fused = make_pair(cell, *sizes, **kwargs)
    on = dict(REGULARISERS[which])
    if isinstance(on.get("zoneout"), tuple) and fused.mode != "LSTM":
        on["zoneout"] = on["zoneout"][0]
    options = {"nonlinearity": plain.nonlinearity} if "RNN" in plain.mode else {}
    options |= {"proj_size": plain.proj_size} if plain.proj_size else {}
    made = type(fused)(*sizes, **options, **kwargs, **on)
    made.load_state_dict(fused.state_dict())
    assert made.state_dict().keys() == plain.state_dict().keys()
    return plain, made


def everything(module, x, states, **kwargs):
    """Results, and gradients of a random form of them, of a call with return_all."""
    torch.manual_seed(5)  # of the masks
    packed = isinstance(x, PackedSequence)
    data = x.data if packed else x
    if data.is_floating_point():
        data = data.detach().clone().requires_grad_()
    leaves = tuple(s.detach().clone().requires_grad_() for s in states)
    hx = leaves if module.mode == "LSTM" else leaves[0]
    y, state, states = module(
        x._replace(data=data) if packed else data, hx, return_all=True, **kwargs
    )
    found = [y, *(state if module.mode == "LSTM" else (state,)), *states.h, *(states.c or ())]
    found = [f.data if isinstance(f, PackedSequence) else f for f in found]
    generator = torch.Generator().manual_seed(3)
    forms = (torch.randn(f.shape, generator=generator, dtype=f.dtype).to(f.device) for f in found)
    loss = sum((f * form).sum() for f, form in zip(found, forms, strict=True))
    inputs = [*leaves, *module.parameters()] + ([data] if data.is_floating_point() else [])
    return [f.detach() for f in found], torch.autograd.grad(loss, inputs)


def assert_all_close(ours, theirs, **tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, **tolerance)


@given(
    cell=st.sampled_from(list(CELLS)),
    which=st.sampled_from(list(REGULARISERS)),
    kind=st.sampled_from(["padded", "lengths", "packed", "batch_first", "unbatched", "integers"]),
    steps=st.integers(1, 12),
    batch=st.integers(1, 9),
    hidden=st.sampled_from([1, 5, 18, 33]),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5]),
    resets=st.booleans(),
    training=st.booleans(),
    threads=st.integers(1, 3),
)
def test_matches_the_reference(
    cell,
    which,
    kind,
    steps,
    batch,
    hidden,
    layers,
    bidirectional,
    dropout,
    resets,
    training,
    threads,
):
    options = {"num_layers": layers, "bidirectional": bidirectional, "dtype": torch.float64}
    options["dropout"] = dropout if layers > 1 else 0.0
    _, fused = regularised(cell, which, WIDTH, hidden, **options, batch_first=kind == "batch_first")
    fused.train(training)
    assert_matches_the_reference(fused, kind, steps, batch, resets, threads)


def arguments(fused, kind, steps, batch, resets):
    """x, states and keywords of a call of a module, WIDTH wide, with `kind` of input."""
    batch = 1 if kind == "unbatched" else batch
    x = torch.randn(steps, batch, WIDTH, dtype=torch.float64).to(fused.weight_ih_l0.dtype)
    if kind == "integers":
        x = torch.randint(0, WIDTH, (steps, batch))
    where, kwargs = torch.rand(steps, batch) < 0.3, {}
    states, lengths = random_state(fused, batch), torch.randint(1, steps + 1, (batch,))
    if kind == "lengths":
        lengths[0] = 0
        kwargs["lengths"] = lengths
    elif kind == "packed":
        x = pack_padded_sequence(x, lengths, enforce_sorted=False)
        where = pack_padded_sequence(where, lengths, enforce_sorted=False)
    elif kind == "batch_first":
        x, where = x.transpose(0, 1), where.t()
    elif kind == "unbatched":
        x, where, states = x[:, 0], where[:, 0], tuple(s[:, 0] for s in states)
    if resets:
        kwargs["resets"] = where
    return x, states, kwargs


def assert_matches_the_reference(fused, kind, steps, batch, resets, threads, atol=1e-11):
    """Results and gradients of a float64 module, WIDTH wide, on `kind` of input; twice the same.

    `atol` is of the gradients.
    """
    x, states, kwargs = arguments(fused, kind, steps, batch, resets)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ours = everything(fused, x, states, **kwargs)
        again = everything(fused, x, states, **kwargs)
    finally:
        torch.set_num_threads(before)
    for a, b in zip((*ours[0], *ours[1]), (*again[0], *again[1]), strict=True):
        assert torch.equal(a, b)
    with pytest.MonkeyPatch().context() as context:
        context.setattr(ops, "run", exact_run)
        theirs = everything(fused, x, states, **kwargs)
    assert_all_close(ours[0], theirs[0], rtol=1e-11, atol=1e-12)
    assert_all_close(ours[1], theirs[1], rtol=1e-10, atol=atol)


def exact_run(call, graph, save):
    """The op as the reference in float64 computes it, in the op's dtypes."""

    def wide(value):
        if isinstance(value, list):
            return [w.double() for w in value]
        floats = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if floats else value

    dtype = call[3][0].dtype
    y, hn, cn, hs, cs = reference.forward(*map(wide, call))
    return *(t.to(dtype) for t in (y, hn, cn, hs)), cs.to(calls.compute_dtype(dtype))


class Call(NamedTuple):
    which: str = "none"  # of REGULARISERS
    kind: str = "padded"
    resets: bool = False
    layers: int = 1
    bidirectional: bool = False
    dropout: float = 0.0
    training: bool = True
    layer_norm: bool = False

    def takes(self, cell):
        return not self.layer_norm or cell in ("gru", "lstm", "lstm-proj")

    def module(self, cell, hidden, dtype):
        """One of ours, as the call wants it."""
        name, extra = CELLS[cell]
        on = dict(REGULARISERS[self.which])
        if isinstance(on.get("zoneout"), tuple) and name != "LSTM":
            on["zoneout"] = on["zoneout"][0]
        on |= {"layer_norm": True} if self.layer_norm else {}
        fused = getattr(fusedrnn, name)(
            WIDTH, hidden, self.layers, bidirectional=self.bidirectional, dropout=self.dropout,
            dtype=dtype, **extra(hidden), **on,
        )  # fmt: skip
        with torch.no_grad():
            for key, p in fused.named_parameters():
                if "gain" in key or "shift" in key:  # not those it begins with
                    p += torch.randn(p.shape).mul(0.3).to(p)
        return fused.train(self.training)


# What changes the recurrence, alone and with the rest, for the kernels of every device.
CALLS = {
    "resets": Call(resets=True),
    "resets, lengths, both directions": Call(kind="lengths", resets=True, bidirectional=True),
    "recurrent dropout": Call("dropout"),
    "recurrent dropout, packed, resets": Call("dropout", "packed", resets=True, bidirectional=True),
    "all states": Call(layers=3),
    "all states, dropout, lengths": Call(kind="lengths", layers=2, dropout=0.5),
    "zoneout": Call("zoneout", layers=2),
    "zoneout in evaluation": Call("zoneout", "lengths", training=False),
    "zoneout of h": Call("zoneout of h", "packed", layers=2),
    "zoneout of c": Call("zoneout of c", resets=True),
    "everything": Call("both", "packed", True, 3, dropout=0.4),
    "everything, both directions": Call("both", "lengths", True, 2, True, 0.4),
    "everything, integers": Call("both", "integers", True, 2),
    "layer normalisation": Call(layers=2, bidirectional=True, layer_norm=True),
    "layer normalisation, packed": Call("both", "packed", True, 2, layer_norm=True),
    "layer normalisation, lengths": Call("both", "lengths", True, 2, True, 0.4, layer_norm=True),
}
# How far results and gradients may be off, relative to the largest value of each.
FEW = {
    torch.float64: 1e-12,
    torch.float32: 3e-6,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
}


def assert_near_float64(cell, call, dtype, hidden=9, device="cpu"):
    """One of CALLS, against the reference in float64 with the same masks."""
    torch.manual_seed(0)
    fused = call.module(cell, hidden, dtype)
    x, states, kwargs = arguments(fused, call.kind, 5, B, call.resets)
    fused, x = fused.to(device), x.to(device)
    states = tuple(s.to(device) for s in states)
    kwargs = {k: v.to(device) for k, v in kwargs.items()}
    ours = everything(fused, x, states, **kwargs)
    with pytest.MonkeyPatch().context() as context:
        context.setattr(ops, "run", exact_run)
        theirs = everything(fused, x, states, **kwargs)
    few = FEW[dtype] * (5 if call.layer_norm else 1)  # small variances amplify errors
    for i, (a, b) in enumerate(zip((*ours[0], *ours[1]), (*theirs[0], *theirs[1]), strict=True)):
        assert a.shape == b.shape and a.dtype == b.dtype
        if a.numel():
            error = (a.double() - b.double()).abs().max().item()
            assert error <= few * b.abs().max().clamp_min(1e-2).item(), (i, error)


@pytest.mark.parametrize("cell, name", [(c, n) for n in CALLS for c in CELLS if CALLS[n].takes(c)])
def test_what_changes_the_recurrence(cell, name):
    assert_near_float64(cell, CALLS[name], torch.float32)


# Resets


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_sequences_in_one_row_are_those_alone(cell, bidirectional):
    """Also in the reverse direction: none knows of the next."""
    plain, fused = make_pair(
        cell, WIDTH, HIDDEN, num_layers=2, bidirectional=bidirectional, dtype=torch.float64
    )
    parts = [torch.randn(n, 1, WIDTH, dtype=torch.float64) for n in (3, 1, 4, 2)]
    resets = torch.cat([torch.arange(len(p)) == 0 for p in parts])[:, None]
    y, _ = fused(torch.cat(parts), resets=resets)
    expected = torch.cat([plain(part)[0] for part in parts])
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cell", CELLS)
def test_a_reset_ends_the_initial_state(cell):
    _, fused = make_pair(cell, WIDTH, HIDDEN, dtype=torch.float64)
    x, states = torch.randn(T, 2, WIDTH, dtype=torch.float64), random_state(fused, 2)
    states = tuple(s.requires_grad_() for s in states)
    resets = torch.zeros(T, 2, dtype=torch.bool)
    resets[0, 1] = True
    y, _ = fused(x, states if fused.mode == "LSTM" else states[0], resets=resets)
    torch.testing.assert_close(y[:, 1], fused(x)[0][:, 1])
    y.sum().backward()
    for s in states:
        assert s.grad[:, 0].any()
        assert not s.grad[:, 1].any()


WRONG_RESETS = {
    "a number": (1, TypeError, "resets should be a Tensor, an array or a list, got: int"),
    "a short list": ([[True]], RuntimeError, r"shape \[6, 4\], got \[1, 1\]"),
    "packed": (
        pack_padded_sequence(torch.zeros(T, B, dtype=torch.bool), [T] * B),
        TypeError,
        "resets should be a Tensor, an array or a list, got: PackedSequence",
    ),
    "rewards": (
        torch.full((T, B), 0.5),
        ValueError,
        "write resets != 0",
    ),
    "NaN": (torch.full((T, B), float("nan")), ValueError, "resets should be 0 or 1"),
    "steps": (torch.arange(T * B).view(T, B), ValueError, "resets should be 0 or 1"),
    "two a step": (torch.zeros(T, B, 2), RuntimeError, r"shape \[6, 4\], got \[6, 4, 2\]"),
    "transposed": (
        torch.zeros(B, T, dtype=torch.bool),
        RuntimeError,
        r"shape \[6, 4\], got \[4, 6\]",
    ),
    "1-D": (torch.zeros(T, dtype=torch.bool), RuntimeError, r"shape \[6, 4\], got \[6\]"),
}


@pytest.mark.parametrize("which", WRONG_RESETS)
def test_wrong_resets(which):
    resets, kind, words = WRONG_RESETS[which]
    _, fused = make_pair("gru", WIDTH, HIDDEN)
    with pytest.raises(kind, match=words):
        fused(torch.zeros(T, B, WIDTH), resets=resets)


# States of all layers and steps


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_all_states_are_those_of_layers_one_by_one(cell, bidirectional, batch_first):
    plain, fused = make_pair(
        cell, WIDTH, HIDDEN, num_layers=3, bidirectional=bidirectional, dtype=torch.float64
    )
    fused.batch_first = batch_first
    x = torch.randn(T, B, WIDTH, dtype=torch.float64)
    y, state, states = fused(x.transpose(0, 1) if batch_first else x, return_all=True)
    assert states.h[-1] is y
    assert (states.c is None) == (fused.mode != "LSTM")
    D, below = 1 + bidirectional, x
    for layer in range(3):
        single = type(plain)(
            below.shape[-1], HIDDEN, bidirectional=bidirectional, dtype=torch.float64,
            **({"nonlinearity": plain.nonlinearity} if "RNN" in plain.mode else {}),
            **({"proj_size": plain.proj_size} if plain.proj_size else {}),
        )  # fmt: skip
        single.load_state_dict({
            name.replace(f"_l{layer}", "_l0"): p
            for name, p in plain.named_parameters() if f"_l{layer}" in name
        })  # fmt: skip
        below = single(below)[0]
        h = states.h[layer].transpose(0, 1) if batch_first else states.h[layer]
        torch.testing.assert_close(h, below, rtol=1e-12, atol=1e-13)
        if states.c is not None:
            c = states.c[layer].transpose(0, 1) if batch_first else states.c[layer]
            assert c.shape == (T, B, D * HIDDEN)
            for d in range(D):  # the state after the last step of each direction
                last = c[0 if d else -1, :, d * HIDDEN : (d + 1) * HIDDEN]
                torch.testing.assert_close(last, state[1][layer * D + d])


@pytest.mark.parametrize("cell", CELLS)
def test_cell_states_of_every_step(cell):
    if "lstm" not in cell:
        pytest.skip("has none")
    plain, fused = make_pair(cell, WIDTH, HIDDEN, dtype=torch.float64)
    x = torch.randn(T, B, WIDTH, dtype=torch.float64)
    _, _, states = fused(x, return_all=True)
    for t in range(T):
        torch.testing.assert_close(states.c[0][t], plain(x[: t + 1])[1][1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_asking_for_all_states_changes_no_bit(cell, save, dtype):
    _, fused = make_pair(cell, WIDTH, HIDDEN, num_layers=2, bidirectional=True, dtype=dtype)
    x, lengths = torch.randn(T, B, WIDTH).to(dtype), torch.tensor([6, 0, 2, 4])
    grads = []
    for return_all in (False, True):
        with torch.set_grad_enabled(save):
            y, state, *states = fused(x, lengths=lengths, return_all=return_all)
        results = [y, *(state if fused.mode == "LSTM" else (state,))]
        if save:
            results += torch.autograd.grad(y.float().square().sum(), list(fused.parameters()))
        grads.append(results)
    assert all(map(torch.equal, *grads))
    for kept in (*states[0].h, *(states[0].c or ())):
        assert kept.dtype == dtype
        assert not any(kept[n:, b].any() for b, n in enumerate(lengths))


def test_all_states_in_autocast():
    _, fused = make_pair("lstm", WIDTH, HIDDEN, num_layers=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, (_, c), states = fused(torch.randn(T, B, WIDTH), return_all=True)
    assert {s.dtype for s in states.h} == {y.dtype}
    assert {s.dtype for s in states.c} == {c.dtype}


# Regularisers


def masks_by_hand(cell, training):
    """The formulas of the papers, one layer and direction, on the masks that the module draws."""
    plain, fused = regularised(cell, "both", WIDTH, HIDDEN, dtype=torch.float64)
    fused.train(training)
    x = torch.randn(T, B, WIDTH, dtype=torch.float64)
    torch.manual_seed(9)
    y, state = fused(x)
    torch.manual_seed(9)
    P = plain.proj_size or HIDDEN
    dropped = zone_h = zone_c = None
    if training:
        dropped = torch.empty(B, P, dtype=torch.float64).bernoulli_(0.7) / 0.7
        zone_h = torch.empty(T * B, P, dtype=torch.uint8).bernoulli_(0.4).view(T, B, P)
        zone_c = torch.empty(T * B, HIDDEN, dtype=torch.uint8).bernoulli_(0.4).view(T, B, HIDDEN)
    return plain, x, y, state, dropped, zone_h, zone_c


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_the_formulas_of_the_papers(cell, training):
    plain, x, y, state, dropped, zone_h, zone_c = masks_by_hand(cell, training)
    w_ih, w_hh, b_ih, b_hh, *w_hr = plain.parameters()
    h = torch.zeros(B, plain.proj_size or HIDDEN, dtype=torch.float64)
    c = torch.zeros(B, HIDDEN, dtype=torch.float64)
    for t in range(T):
        operand = h if dropped is None else h * dropped  # Gal and Ghahramani, equations 4 to 7
        gx, gh = x[t] @ w_ih.t() + b_ih, operand @ w_hh.t() + b_hh
        c_new = c
        if cell == "gru":
            r, z = (gx + gh)[:, : 2 * HIDDEN].sigmoid().chunk(2, 1)
            n = (gx[:, 2 * HIDDEN :] + r * gh[:, 2 * HIDDEN :]).tanh()
            h_new = (1 - z) * n + z * h
        elif "lstm" in cell:
            i, f, g, o = (gx + gh).chunk(4, 1)
            c_new = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h_new = o.sigmoid() * c_new.tanh()  # of c before zoneout: Krueger et al., section 3
            h_new = h_new @ w_hr[0].t() if w_hr else h_new
        else:
            h_new = (gx + gh).tanh() if cell == "rnn" else (gx + gh).relu()
        keep_h = 0.4 if zone_h is None else zone_h[t].double()
        keep_c = 0.4 if zone_c is None else zone_c[t].double()
        h, c = keep_h * h + (1 - keep_h) * h_new, keep_c * c + (1 - keep_c) * c_new
        torch.testing.assert_close(y[t], h, rtol=1e-12, atol=1e-13)
    if "lstm" in cell:
        torch.testing.assert_close(state[1][0], c, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("which", [w for w in REGULARISERS if w != "none"])
@pytest.mark.parametrize("cell", CELLS)
def test_lower_precision(cell, which, dtype):
    """As near to float64 as the same weights come without a regulariser, or nearly."""
    errors = {}
    for name in (which, "none"):
        _, fused = regularised(cell, name, WIDTH, HIDDEN, num_layers=2, dtype=dtype)
        fused.eval()  # the same in both, for the masks of training depend on the dtype
        x, states = torch.randn(T, B, WIDTH).to(dtype), random_state(fused, B)
        found = everything(fused, x, states)
        exact = copy.deepcopy(fused).double()
        expected = everything(exact, x.double(), tuple(s.double() for s in states))
        errors[name] = max(
            ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-3)).item()
            for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True)
        )
    assert errors[which] <= 3 * errors["none"] + 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("cell", CELLS)
def test_off_is_the_plain_module(cell):
    """Nothing is drawn, stored or changed, not even a bit."""
    _, fused = make_pair(cell, WIDTH, HIDDEN, num_layers=2)
    kwargs = {"nonlinearity": fused.nonlinearity} if "RNN" in fused.mode else {}
    kwargs |= {"proj_size": fused.proj_size} if fused.proj_size else {}
    off = type(fused)(WIDTH, HIDDEN, 2, recurrent_dropout=0.0, zoneout=0, **kwargs)
    off.load_state_dict(fused.state_dict())
    assert off.__dict__.keys() == fused.__dict__.keys()
    assert repr(off) == repr(fused)
    x, before = torch.randn(T, B, WIDTH), torch.get_rng_state()
    assert torch.equal(off(x)[0], fused(x)[0])
    assert torch.equal(before, torch.get_rng_state())


def test_recurrent_dropout_is_off_in_eval():
    _, fused = regularised("lstm", "dropout", WIDTH, HIDDEN)
    plain, x = make_pair("lstm", WIDTH, HIDDEN)[1], torch.randn(T, B, WIDTH)
    assert torch.equal(fused.eval()(x)[0], plain(x)[0])
    assert not torch.equal(fused.train()(x)[0], plain(x)[0])


@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout"])
def test_everything_dropped(name):
    """Probability 1: no recurrence, or no change at all."""
    _, plain = make_pair("rnn", WIDTH, HIDDEN, dtype=torch.float64)
    fused = fusedrnn.RNN(WIDTH, HIDDEN, dtype=torch.float64, **{name: 1.0})
    fused.load_state_dict(plain.state_dict())
    x, h0 = torch.randn(T, B, WIDTH, dtype=torch.float64), random_state(plain, B)[0]
    y, _ = fused(x, h0)
    if name == "zoneout":
        torch.testing.assert_close(y, h0.expand_as(y))
    else:
        torch.testing.assert_close(y, plain(x.view(1, T * B, WIDTH))[0].view_as(y))


@pytest.mark.parametrize("value", [-0.1, 1.1, "a", None, True, (0.1,), (0.1, 0.2, 0.3), (0.1, 2)])
def test_wrong_probabilities(value):
    for name in ("recurrent_dropout", "zoneout"):
        with pytest.raises(ValueError, match=name):
            fusedrnn.LSTM(3, 4, **{name: value})


def test_pairs_are_for_the_lstm():
    with pytest.raises(ValueError, match="zoneout is one number"):
        fusedrnn.GRU(3, 4, zoneout=(0.1, 0.1))
    assert "zoneout=(0.1, 0.2)" in repr(fusedrnn.LSTM(3, 4, zoneout=(0.1, 0.2)))


@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout"])
def test_torch_cannot_have_them(name):
    """What torch.nn would silently leave out is not unswapped, and copies keep it."""
    model = nn.Sequential(fusedrnn.GRU(3, 4, **{name: 0.5}))
    with pytest.raises(ValueError, match=name):
        fusedrnn.unswap(model)
    assert getattr(copy.deepcopy(model)[0], name) == 0.5
    assert name in fusedrnn.explain(model[0], torch.zeros(2, 2, 3))


# Derivatives

CHANGES = {
    "resets": ("none", {"resets": True}),
    "dropout": ("dropout", {}),
    "zoneout": ("zoneout", {}),
    "both, resets, lengths": ("both", {"resets": True, "lengths": True}),
}


def as_function(module, x, states, **kwargs):
    """All results, with return_all, as a function of x, the states and the parameters."""
    names = [name for name, _ in module.named_parameters()]

    def call(x, *rest):
        torch.manual_seed(4)
        hx, parameters = rest[: len(states)], dict(zip(names, rest[len(states) :], strict=True))
        hx = hx if module.mode == "LSTM" else hx[0]
        _, state, states_ = functional_call(
            module, parameters, (x, hx), {"return_all": True, **kwargs}
        )
        state = state if module.mode == "LSTM" else (state,)
        return (*states_.h, *(states_.c or ()), *state)

    inputs = [x, *states, *module.parameters()]
    return call, [t.detach().clone().requires_grad_() for t in inputs]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("cell", CELLS)
def test_derivatives(cell, change):
    which, more = CHANGES[change]
    _, fused = regularised(cell, which, 2, 2, num_layers=2, bidirectional=True, dtype=torch.float64)
    kwargs = {"resets": torch.rand(3, 2) < 0.4} if "resets" in more else {}
    if "lengths" in more:
        kwargs["lengths"] = torch.tensor([3, 2])
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    call, inputs = as_function(fused, x, random_state(fused, 2), **kwargs)
    assert gradcheck(call, inputs, fast_mode=True)
    assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("cell", CELLS)
def test_per_sample_gradients(cell):
    _, fused = make_pair(cell, WIDTH, 3, bidirectional=True, dtype=torch.float64)
    parameters = dict(fused.named_parameters())
    x, resets = torch.randn(3, T, 2, WIDTH, dtype=torch.float64), torch.rand(3, T, 2) < 0.4

    def loss(parameters, x, resets):
        _, _, states = functional_call(
            fused, parameters, (x,), {"resets": resets, "return_all": True}
        )
        return sum(h.square().sum() for h in states.h)

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, resets)
    for i in range(3):
        expected = torch.autograd.grad(loss(parameters, x[i], resets[i]), list(parameters.values()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, msg=name)


# The ops


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_opcheck(cell, packed):
    _, fused = regularised(
        cell, "both", WIDTH, 3, num_layers=2, bidirectional=True, dtype=torch.float64
    )
    config = fused._config()._replace(all_states=True)
    weights = [p.detach().requires_grad_() for p in fused.parameters()]
    tokens = (7,) if packed else (T, B)
    x = torch.randn(*tokens, WIDTH, dtype=torch.float64)
    sizes = torch.tensor([4, 2, 1]) if packed else None
    resets = torch.rand(tokens) < 0.3
    drawn = masks.of_recurrence(fused, x, sizes, weights[0], config)
    call = (x, None, None, weights, sizes, None, None, resets, *drawn, 0.0, *config)
    torch.library.opcheck(ops.forward, (*call, True))
    call = (*call[:3], [w.detach() for w in weights], *call[4:])
    y, _, _, reserve, hs, cs = ops.forward(*call, True)
    needs = [True, not packed, False, *[True] * len(weights)]
    grads = (torch.randn_like(y), None, None, torch.randn_like(hs), torch.randn_like(cs))
    torch.library.opcheck(ops.backward, (*grads, y, reserve, hs, cs, needs, 0, *call))


@pytest.mark.parametrize("which", ["none", "both"])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_compiles_for_any_length(cell, which):
    _, fused = regularised(cell, which, WIDTH, HIDDEN, num_layers=2)

    def call(x, resets):
        return fused(x, resets=resets, return_all=True)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (5, 9):
        x, resets = torch.randn(steps, B, WIDTH), torch.rand(steps, B) < 0.3
        found = []
        for run in (call, compiled):
            torch.manual_seed(2)
            _, _, states = run(x, resets)
            found.append([*states.h, *(states.c or ())])
            sum(s.sum() for s in found[-1]).backward()
        assert all(map(torch.equal, *found))
