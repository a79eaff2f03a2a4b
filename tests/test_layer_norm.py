"""Layer normalisation inside the cells: against the paper's formula by hand in every dtype, and
against the plain PyTorch reference with everything else that the kernels do."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from cases import CELLS, DTYPES, random_state, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_numbers import compare
from test_recurrence import REGULARISERS, as_function, assert_matches_the_reference, everything
from test_recurrence import regularised as with_torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

import fusedrnn
from fusedrnn import ops

# Forward mode of torch's own operators loads decompositions that are scripted.
pytestmark = pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated:DeprecationWarning")

NORMED = ["gru", "lstm", "lstm-proj"]
T, B, WIDTH, HIDDEN = 6, 4, 3, 5


def normed(cell, width=WIDTH, hidden=HIDDEN, which="none", **kwargs):
    """Ours with layer normalisation, its gains and shifts not those it begins with."""
    name, extra = CELLS[cell]
    on = dict(REGULARISERS[which])
    if isinstance(on.get("zoneout"), tuple) and name != "LSTM":
        on["zoneout"] = on["zoneout"][0]
    torch.manual_seed(0)
    module = getattr(fusedrnn, name)(
        width, hidden, layer_norm=True, **extra(hidden), **kwargs, **on
    )
    with torch.no_grad():
        for key, p in module.named_parameters():
            if "gain" in key or "shift" in key:
                p += torch.randn(p.shape).mul(0.3).to(p)
    return module


@pytest.fixture
def filled():
    """What is left unwritten becomes NaN or 255."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# The formula


def by_hand(self, x, hx=None):
    """Ba, Kiros, Hinton, equations 20 to 22 for the LSTM and 23 to 26 for the GRU."""
    lstm, H = self.mode == "LSTM", self.hidden_size
    states = (hx if lstm else (hx,)) if hx is not None else None
    if states is None:
        size = self.num_layers * (1 + self.bidirectional), x.shape[1]
        states = (x.new_zeros(*size, self.proj_size or H), x.new_zeros(*size, H))
    finals = []
    for i in range(self.num_layers):
        outputs = []
        for suffix in ["", "_reverse"][: 1 + self.bidirectional]:

            def of(name, suffix=f"_l{i}{suffix}"):
                return getattr(self, name + suffix, None)

            def norm(a, which, of=of):
                sizes = [4 * H] if lstm else [2 * H, H]
                parts = zip(a.split(sizes, 1), of(f"gain_{which}").split(sizes), strict=True)
                a = torch.cat([F.layer_norm(p, p.shape[1:], g) for p, g in parts], 1)
                return a if of(f"bias_{which}") is None else a + of(f"bias_{which}")

            h, c = states[0][len(finals)], states[-1][len(finals)]
            y = [None] * len(x)
            for t in range(len(x)) if not suffix else reversed(range(len(x))):
                gx, gh = norm(x[t] @ of("weight_ih").t(), "ih"), norm(h @ of("weight_hh").t(), "hh")
                if lstm:
                    i_, f, g, o = (gx + gh).chunk(4, 1)
                    c = f.sigmoid() * c + i_.sigmoid() * g.tanh()
                    h = o.sigmoid() * F.layer_norm(c, (H,), of("gain_c"), of("shift_c")).tanh()
                    h = h if not self.proj_size else h @ of("weight_hr").t()
                else:
                    r, z = (gx + gh)[:, : 2 * H].sigmoid().chunk(2, 1)
                    n = (gx[:, 2 * H :] + r * gh[:, 2 * H :]).tanh()
                    h = (1 - z) * n + z * h
                y[t] = h
            outputs.append(torch.stack(y))
            finals.append((h, c))
        x = torch.cat(outputs, 2)
    h_n, c_n = (torch.stack(s) for s in zip(*finals, strict=True))
    return x, (h_n, c_n) if lstm else h_n


class ByHandLSTM(fusedrnn.LSTM):
    forward = by_hand


class ByHandGRU(fusedrnn.GRU):
    forward = by_hand


def twin(module):
    """Of the same weights, by the formula in plain PyTorch."""
    other = copy.deepcopy(module)
    other.__class__ = {"LSTM": ByHandLSTM, "GRU": ByHandGRU}[module.mode]
    return other


# T, B, input_size, hidden_size, layers, bidirectional, bias
SIZES = [
    (1, 1, 3, 5, 1, False, True),
    (5, 3, 4, 5, 2, True, True),
    (7, 33, 4, 33, 1, True, False),
    (3, 5, 33, 257, 3, False, True),
    (40, 9, 3, 18, 2, True, True),
]


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s[:5])))
@pytest.mark.parametrize("cell", NORMED)
def test_the_formula_of_the_paper(cell, sizes, dtype):
    steps, batch, width, hidden, layers, bidirectional, bias = sizes
    module = normed(
        cell, width, hidden, num_layers=layers, bidirectional=bidirectional, bias=bias, dtype=dtype
    )
    x = torch.randn(steps, batch, width).to(dtype)
    compare(twin(module), module, x, random_state(module, batch) if bias else None)


@pytest.mark.parametrize("cell", NORMED)
def test_as_exact_as_the_formula_on_average(cell):
    """Small variances magnify rounding, so one case is luck: twice its noise is allowed above."""
    ratios: dict[str, list[float]] = {}
    module = normed(cell)
    for _ in range(30):
        module.reset_parameters()
        x, states = torch.randn(T, B, WIDTH), random_state(module, B)
        ours, theirs = run(module, x, states), run(twin(module), x, states)
        exact = run(twin(module).double(), x.double(), tuple(s.double() for s in states))
        for name, value in exact.items():
            errors = [(r[name] - value).square().mean().sqrt() for r in (ours, theirs)]
            ratios.setdefault(name, []).append((errors[0] / errors[1]).log().item())
    assert {n: r for n, r in ratios.items() if sum(r) / len(r) > math.log(1.25)} == {}


@given(
    cell=st.sampled_from(NORMED),
    which=st.sampled_from(list(REGULARISERS)),
    kind=st.sampled_from(["padded", "lengths", "packed", "batch_first", "unbatched", "integers"]),
    steps=st.integers(1, 12),
    batch=st.integers(1, 9),
    hidden=st.sampled_from([1, 5, 18, 33]),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.5]),
    resets=st.booleans(),
    training=st.booleans(),
    threads=st.integers(1, 3),
)
@settings(max_examples=60)
def test_matches_the_reference(
    cell,
    which,
    kind,
    steps,
    batch,
    hidden,
    layers,
    bidirectional,
    bias,
    dropout,
    resets,
    training,
    threads,
):
    module = normed(
        cell, WIDTH, hidden, which, num_layers=layers, bidirectional=bidirectional, bias=bias,
        dropout=dropout if layers > 1 else 0.0, batch_first=kind == "batch_first",
        dtype=torch.float64,
    )  # fmt: skip
    module.train(training)
    # Of one unit the variance is 0: each layer divides what rounding leaves of 0 by sqrt(1e-5).
    atol = 1e-9 if hidden == 1 else 1e-11
    assert_matches_the_reference(module, kind, steps, batch, resets, threads, atol)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cell", NORMED)
def test_same_bits_on_any_number_of_threads(cell, dtype):
    module = normed(cell, 7, 70, num_layers=2, bidirectional=True, dtype=dtype)
    x, states = torch.randn(30, 11, 7).to(dtype), random_state(module, 11)
    lengths = torch.tensor([30, 0, 7, 30, 1, 29, 12, 30, 2, 3, 17])
    found = []
    for threads in (1, 2, 3, 7, 1):
        torch.set_num_threads(threads)
        results, gradients = everything(module, x, states, lengths=lengths)
        found.append([*results, *gradients])
    torch.set_num_threads(1)
    assert not any(t.isnan().any() for t in found[0])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    with torch.no_grad():  # what is not kept changes nothing
        assert torch.equal(module(x, states if len(states) > 1 else states[0], lengths=lengths)[0],
                           found[0][0])  # fmt: skip


@pytest.mark.parametrize("cell", NORMED)
def test_a_row_without_variance(cell):
    """Products of zeros: n(0) is 0, and so is its gradient."""
    module = normed(cell, dtype=torch.float64)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.fill_(0.5)
    x = torch.zeros(T, B, WIDTH, dtype=torch.float64)
    ours, theirs = run(module, x, None), run(twin(module), x, None)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-11, atol=1e-11, msg=name)


def test_nan_stays_in_its_row():
    module = normed("lstm", hidden=33)
    x = torch.randn(T, B, WIDTH)
    expected, _ = module(x)
    x[2, 1, 0] = float("nan")
    y, _ = module(x)
    assert y[2:, 1].isnan().all()
    y, expected = y.clone(), expected.clone()
    y[2:, 1] = expected[2:, 1] = 0
    assert torch.equal(y, expected)


# Derivatives


@pytest.mark.parametrize("which", ["none", "both"])
@pytest.mark.parametrize("cell", NORMED)
def test_derivatives(cell, which):
    module = normed(cell, 2, 3, which, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    kwargs = {"resets": torch.rand(3, 2) < 0.4, "lengths": torch.tensor([3, 2])}
    call, inputs = as_function(module, x, random_state(module, 2), **kwargs)
    assert gradcheck(call, inputs, fast_mode=True, check_forward_ad=which == "none")
    assert gradgradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("cell", NORMED)
def test_function_transforms(cell):
    module = normed(cell, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    x = torch.randn(3, T, 2, WIDTH, dtype=torch.float64)

    def loss(parameters, x):
        return functional_call(module, parameters, (x,))[0].square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(3):
        expected = torch.autograd.grad(module(x[i])[0].square().sum(), list(module.parameters()))
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("cell", NORMED)
def test_what_is_frozen_gets_no_gradient(cell):
    module = normed(cell, num_layers=2, dtype=torch.float64)
    x = torch.randn(T, B, WIDTH, dtype=torch.float64)
    module(x)[0].square().sum().backward()
    full = {name: p.grad for name, p in module.named_parameters()}
    for only in ("gain_ih_l0", "gain_hh_l1", "bias_ih_l0", "gain_c_l1", "shift_c_l0"):
        if only not in full:
            continue
        module.zero_grad()
        for name, p in module.named_parameters():
            p.requires_grad_(name == only)
        module(x)[0].square().sum().backward()
        for name, p in module.named_parameters():
            assert torch.equal(p.grad, full[name]) if name == only else p.grad is None


@pytest.mark.parametrize("cell", NORMED)
def test_recomputed(cell):
    module, x = normed(cell, which="both", num_layers=2), torch.randn(T, B, WIDTH)
    found = []
    for recompute in (False, True):
        module.recompute = recompute
        torch.manual_seed(1)
        loss = module(x)[0].square().sum()
        found.append(torch.autograd.grad(loss, list(module.parameters())))
    assert all(map(torch.equal, *found))


# The module


@pytest.mark.parametrize("cell", NORMED)
def test_off_is_the_plain_module(cell):
    plain, _ = with_torch(cell, "none", WIDTH, HIDDEN, num_layers=2)
    extra = {"proj_size": plain.proj_size} if plain.proj_size else {}
    made = []
    for kwargs in ({}, {"layer_norm": False}):
        torch.manual_seed(3)
        made.append(getattr(fusedrnn, plain.mode)(WIDTH, HIDDEN, 2, **extra, **kwargs))
    fused, off = made
    assert off.state_dict().keys() == plain.state_dict().keys()
    assert off.__dict__.keys() == fused.__dict__.keys()
    assert repr(off) == repr(fused)
    x = torch.randn(T, B, WIDTH)
    assert torch.equal(off(x)[0], fused(x)[0])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", NORMED)
def test_parameters(cell, bias):
    torch.manual_seed(3)
    name, extra = CELLS[cell]
    kwargs = {"num_layers": 2, "bidirectional": True, "bias": bias, **extra(HIDDEN)}
    plain = getattr(nn, name)(WIDTH, HIDDEN, **kwargs)
    torch.manual_seed(3)
    module = getattr(fusedrnn, name)(WIDTH, HIDDEN, layer_norm=True, **kwargs)
    own = {"gain_ih": plain.weight_ih_l0.shape[:1], "gain_hh": plain.weight_ih_l0.shape[:1]}
    if name == "LSTM":
        own |= {"gain_c": (HIDDEN,), "shift_c": (HIDDEN,)}
    places = [f"_l{i}{reverse}" for i in range(2) for reverse in ("", "_reverse")]
    state = module.state_dict()
    assert set(state) - set(plain.state_dict()) == {key + p for key in own for p in places}
    for _ in range(2):  # as made, and after reset_parameters
        for key, value in plain.state_dict().items():
            assert torch.equal(state[key], value)
        for key, shape in own.items():
            for place in places:
                assert state[key + place].shape == shape
                assert (state[key + place] == (key != "shift_c")).all()
        for p in module.parameters():
            nn.init.constant_(p, 7)
        torch.manual_seed(3)
        module.reset_parameters()
        state = module.state_dict()
    assert [len(group) for group in module.all_weights] == [2 + 2 * bias + len(own) + bool(
        module.proj_size)] * 4  # fmt: skip
    with pytest.raises(RuntimeError, match="Missing key.*gain_ih_l0"):
        module.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key.*gain_ih_l0"):
        plain.load_state_dict(state)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_state_dict(module):
    sizes = module.input_size, module.hidden_size, module.num_layers
    kwargs = {"proj_size": module.proj_size} if module.proj_size else {}
    other = nn.utils.skip_init(type(module), *sizes, layer_norm=True, bidirectional=True, **kwargs)
    assert other.load_state_dict(module.state_dict()) == ([], [])
    return other


def through_meta(module):
    state = module.state_dict()
    other = copy.deepcopy(module).to("meta")
    assert other(torch.empty(T, B, WIDTH, device="meta"))[0].shape[:2] == (T, B)
    other = other.to_empty(device="cpu")
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("again", [copy.deepcopy, through_pickle, through_state_dict, through_meta])
@pytest.mark.parametrize("cell", NORMED)
def test_copies(cell, again):
    module = normed(cell, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, WIDTH)
    expected, other = module(x)[0], again(module)
    assert other.layer_norm is True
    assert torch.equal(other(x)[0], expected)
    with torch.no_grad():  # of its own weights
        other.gain_ih_l1.zero_()
    assert torch.equal(module(x)[0], expected)
    assert not torch.equal(other(x)[0], expected)
    assert torch.equal(other.double()(x.double())[0], other(x.double())[0])


@pytest.mark.parametrize("cell", NORMED)
def test_autocast(cell):
    module, x = normed(cell, num_layers=2), torch.randn(T, B, WIDTH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = module(x)
    low = copy.deepcopy(module).bfloat16()(x.bfloat16())[0]
    assert torch.equal(y.bfloat16(), low)
    y.float().square().sum().backward()
    assert module.gain_ih_l0.grad.dtype == torch.float32


@pytest.mark.parametrize("cell", NORMED)
def test_torch_cannot_have_it(cell):
    module = normed(cell)
    model = nn.Sequential(module)
    with pytest.raises(ValueError, match="layer_norm"):
        fusedrnn.unswap(model)
    with pytest.raises(ValueError, match="layer_norm"):
        torch.jit.script(model)
    assert type(fusedrnn.swap(model).model[0]) is type(module)
    assert "layer_norm=True" in repr(module)
    assert "layer_norm in the kernels" in fusedrnn.explain(module, torch.zeros(1, 1, WIDTH))
    assert torch.fx.symbolic_trace(model)(torch.ones(T, B, WIDTH))[0].shape[:2] == (T, B)


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_a_plain_rnn_has_none(nonlinearity):
    with pytest.raises(ValueError, match="layer_norm is for LSTM and GRU"):
        fusedrnn.RNN(3, 4, nonlinearity=nonlinearity, layer_norm=True)
    assert not fusedrnn.RNN(3, 4, layer_norm=False).layer_norm


@pytest.mark.parametrize("value", [1, 0.5, None, "yes"])
def test_wrong_arguments(value):
    with pytest.raises(TypeError, match="layer_norm should be of type bool"):
        fusedrnn.LSTM(3, 4, layer_norm=value)


@pytest.mark.parametrize("cell", NORMED)
def test_compiles(cell):
    module = normed(cell, num_layers=2)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (5, 9):
        x = torch.randn(steps, B, WIDTH)
        found = []
        for call in (module, compiled):
            y, _ = call(x)
            found.append([y, *torch.autograd.grad(y.square().sum(), list(module.parameters()))])
        assert all(map(torch.equal, *found))


# The ops


def arguments(cell, kind="padded"):
    module = normed(cell, num_layers=2, bidirectional=True, dtype=torch.float64)
    tokens = (7,) if kind == "packed" else (T, B)
    return {
        "x": torch.randn(*tokens, WIDTH, dtype=torch.float64),
        "hx": None,
        "cx": None,
        "weights": [w.detach() for w in module._weights()],
        "batch_sizes": torch.tensor([4, 2, 1]) if kind == "packed" else None,
        "lengths": None,
        "mask": None,
        "resets": None,
        "h_mask": None,
        "zone_h": None,
        "zone_c": None,
        "dropout": 0.0,
        **module._config()._asdict(),
        "save": True,
    }


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("cell", NORMED)
def test_opcheck(cell, kind):
    call = arguments(cell, kind) | {"all_states": True}
    with_grad = call | {"weights": [w.clone().requires_grad_() for w in call["weights"]]}
    torch.library.opcheck(ops.forward, tuple(with_grad.values()))
    y, _, _, reserve, hs, cs = ops.forward(*call.values())
    del call["save"]
    needs = [True, False, False, *[True] * len(call["weights"])]
    grads = (torch.randn_like(y), None, None, torch.randn_like(hs), torch.randn_like(cs))
    torch.library.opcheck(ops.backward, (*grads, y, reserve, hs, cs, needs, 0, *call.values()))


def wrong_weights(weights, cell):
    """How many there are, and what is wrong with them."""
    each = len(weights) // 4
    own = 4 if "lstm" in cell else 2
    yield "expected 4 x", weights[:-1]
    yield "expected 4 x", [*weights, weights[-1]]
    yield "expected 4 x", [w for i, w in enumerate(weights) if i % each < each - own]
    for i in range(each - own, each):
        yield "of shape", [*weights[:i], weights[i][:-1], *weights[i + 1 :]]
        yield "of shape", [*weights[:i], weights[i][None], *weights[i + 1 :]]
        yield "dtype", [*weights[:i], weights[i].float(), *weights[i + 1 :]]


@pytest.mark.parametrize("cell", NORMED)
def test_wrong_weights(cell):
    call = arguments(cell)
    for words, weights in wrong_weights(call["weights"], cell):
        with pytest.raises(RuntimeError, match=words):
            ops.forward(*(call | {"weights": weights}).values())
    with pytest.raises(RuntimeError, match="expected 4 x"):
        ops.forward(*(call | {"layer_norm": False}).values())
    for mode in ("RNN_TANH", "RNN_RELU"):
        with pytest.raises(RuntimeError, match="only LSTM and GRU take layer_norm"):
            ops.forward(*(call | {"mode": mode, "proj_size": 0}).values())
    y, *_, reserve, hs, cs = ops.forward(*call.values())
    del call["save"]
    needs = [False] * 3 + [True] * len(call["weights"])
    with pytest.raises(RuntimeError, match="the reserve of shape"):
        ops.backward(y, *[None] * 4, y, reserve[:, :-8], hs, cs, needs, 0, *call.values())
