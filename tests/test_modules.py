"""The modules as modules: what torch.nn's do with state, types, names and shapes, ours do too."""

import copy
import doctest
import inspect
import io
import pickle
import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from cases import AUTOCAST_LSTM, CELLS, make_pair, random_state, run
from tolerances import assert_as_exact_as_torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

CLASSES = ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"]
SINGLE_STEPS = ["RNNCell", "GRUCell", "LSTMCell"]


def stack(cell, **kwargs):
    """A pair (torch.nn's, ours) of two bidirectional layers in float64, 3 -> 4."""
    return make_pair(
        cell, 3, 4, **{"num_layers": 2, "bidirectional": True, "dtype": torch.float64} | kwargs
    )


def assert_same(plain, fused, x=None, states=None):
    x = torch.randn(5, 2, 3, dtype=torch.float64) if x is None else x
    theirs = run(plain, x, states)
    assert_as_exact_as_torch(run(fused, x, states), theirs, theirs)


def assert_same_numbers(ours, theirs):
    """Tensors, tuples of them and PackedSequences, to float64's rounding."""
    if isinstance(theirs, tuple):
        assert type(ours) is type(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same_numbers(a, b)
    elif theirs is not None:
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


# Names, classes, state


@pytest.mark.parametrize("name", CLASSES)
def test_subclasses_of_torchs_classes(name):
    plain, fused = getattr(nn, name), getattr(fusedrnn, name)
    assert issubclass(fused, plain)
    assert fused.__name__ == plain.__name__
    assert isinstance(fused(2, 3), plain)
    assert issubclass(fused, nn.RNNCellBase if name.endswith("Cell") else nn.RNNBase)


@pytest.mark.parametrize("name", CLASSES)
def test_same_seed_same_weights(name):
    torch.manual_seed(3)
    plain = getattr(nn, name)(4, 5)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    fused = getattr(fusedrnn, name)(4, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(fused.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert torch.equal(fused.state_dict()[key], value)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"num_layers": 3, "bias": False, "batch_first": True, "dropout": 0.25},
        {"num_layers": 2, "bidirectional": True},
    ],
)
@pytest.mark.parametrize("cell", CELLS)
def test_repr_and_attributes(cell, kwargs):
    plain, fused = make_pair(cell, 4, 5, **kwargs)
    assert repr(fused) == f"fusedrnn.{plain!r}"
    assert vars(fused).keys() == vars(plain).keys()
    for name in plain.__constants__:
        assert getattr(fused, name) == getattr(plain, name)
    assert [[p.shape for p in layer] for layer in fused.all_weights] == [
        [p.shape for p in layer] for layer in plain.all_weights
    ]


def test_positional_arguments():
    plain = nn.RNN(3, 4, 2, "relu", False, True, 0.5, True)
    fused = fusedrnn.RNN(3, 4, 2, "relu", False, True, 0.5, True)
    assert repr(fused) == f"fusedrnn.{plain!r}"
    assert fused.mode == plain.mode == "RNN_RELU"
    arguments = (3, 4, 2, False, True, 0.5, True, 2)
    assert repr(fusedrnn.LSTM(*arguments)) == f"fusedrnn.{nn.LSTM(*arguments)!r}"


@pytest.mark.parametrize("cell", CELLS)
def test_state_dicts_load_both_ways(cell):
    plain, fused = stack(cell)
    with torch.no_grad():
        for p in fused.parameters():
            p.normal_()
    assert plain.load_state_dict(fused.state_dict()) == ([], [])
    assert_same(plain, fused)
    with torch.no_grad():
        for p in plain.parameters():
            p.normal_()
    assert fused.load_state_dict(plain.state_dict()) == ([], [])
    assert_same(plain, fused)


def through_pickle(module):
    return pickle.loads(pickle.dumps(module))


def through_torch_save(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, through_pickle, through_torch_save])
@pytest.mark.parametrize("cell", CELLS)
def test_copies(cell, again):
    plain, fused = stack(cell)
    other = again(fused)
    assert type(other) is type(fused)
    assert all(p is not q for p, q in zip(other.parameters(), fused.parameters(), strict=True))
    assert_same(plain, other)
    with torch.no_grad():  # of its own weights
        other.weight_hh_l0.zero_()
        plain.weight_hh_l0.zero_()
    assert_same(plain, other)


@pytest.mark.parametrize("cell", CELLS)
def test_checkpoints_of_torch(cell, tmp_path):
    plain, fused = stack(cell)
    torch.save(plain.state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    fused.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert_same(plain, fused)


@pytest.mark.parametrize("cell", ["rnn", "relu", "gru", "lstm"])
def test_modules_pickled_by_old_torch(cell):
    """Before 1.8 there was no `proj_size`, and `all_weights` held parameters, not names."""
    plain, fused = stack(cell)
    old = {k: v for k, v in vars(plain).items() if not k.startswith(("_flat_weight", "_all_w"))}
    del old["proj_size"]
    restored = type(fused).__new__(type(fused))
    restored.__setstate__(copy.deepcopy(old | {"all_weights": plain.all_weights}))
    assert_same(plain, restored)


# Types and devices


@pytest.mark.parametrize("cell", CELLS)
def test_dtype_of_the_module_can_change(cell):
    plain, fused = stack(cell, dtype=torch.float32)
    x = torch.randn(5, 2, 3)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert fused.to(dtype) is fused
        plain.to(dtype)
        for a, b in zip(fused(x.to(dtype))[0], plain(x.to(dtype))[0], strict=True):
            assert a.dtype == b.dtype == dtype
    assert_same(plain, fused)


@pytest.mark.parametrize("cell", CELLS)
def test_default_dtype(cell):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        plain, fused = stack(cell, dtype=None)
        assert fused.weight_ih_l0.dtype == torch.float64
        assert_same(plain, fused)
        # The other way: nothing inside takes the default for the input's.
        plain, fused = stack(cell, dtype=torch.float32)
        y, _ = fused(torch.randn(5, 2, 3, dtype=torch.float32))
        assert y.dtype == torch.float32
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("device", ["meta"])
@pytest.mark.parametrize("cell", CELLS)
def test_modules_made_elsewhere(cell, device):
    plain, fused = stack(cell, device=device)
    x = torch.randn(5, 2, 3, dtype=torch.float64, device=device)
    assert fused(x)[0].shape == plain(x)[0].shape
    assert fused(x)[0].device.type == device
    plain, source = stack(cell)
    fused = fused.to_empty(device="cpu")
    fused.load_state_dict(source.state_dict())
    assert_same(plain, fused)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("cell", CELLS)
def test_autocast_gives_torchs_dtypes(cell, of, with_states, packed):
    if cell == "lstm" and of == torch.float32 and not (packed or AUTOCAST_LSTM):
        pytest.skip("torch.nn fails")
    plain, fused = stack(cell, dtype=of)
    found = []
    for module in (plain, fused):
        x = torch.randn(5, 2, 3, dtype=of, requires_grad=True)
        states = random_state(module, 2) if with_states else None
        hx = states if states is None or module.mode == "LSTM" else states[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, state = module(pack_padded_sequence(x, [5, 3]) if packed else x, hx)
        y = y.data if packed else y
        y.double().sum().backward()
        results = {
            "output": y,
            **dict(zip("hc", state if module.mode == "LSTM" else [state], strict=False)),
        }
        results |= {"grad x": x.grad, **{f"grad {n}": p.grad for n, p in module.named_parameters()}}
        found.append({name: t.dtype for name, t in results.items()})
    assert found[1] == found[0]


@pytest.mark.parametrize("cell", CELLS)
def test_autocast_numbers(cell):
    """In bfloat16 under autocast: near the float32 ones, and the same as a bfloat16 module's."""
    plain, fused = stack(cell, dtype=torch.float32)
    x = torch.randn(5, 2, 3)
    exact = plain(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = fused(x)[0].float()
        theirs = plain(x)[0].float() if cell != "lstm" or AUTOCAST_LSTM else None
    if theirs is not None:
        assert (ours - exact).norm() <= 2 * (theirs - exact).norm()
    inside = copy.deepcopy(fused).bfloat16()(x.bfloat16())[0].float()
    torch.testing.assert_close(ours, inside, rtol=0, atol=0)
    torch.testing.assert_close(fused(x)[0], exact)  # and no trace of it is left


# Shapes


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("layout", ["time first", "batch first", "unbatched", "packed", "unsorted"])
@pytest.mark.parametrize("cell", CELLS)
def test_layouts(cell, layout, with_states):
    plain, fused = stack(cell, batch_first=layout == "batch first")
    states = random_state(plain, 3) if with_states else None
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    if layout == "batch first":
        x = x.transpose(0, 1)
    elif layout == "unbatched":
        x, states = x[:, 0], states and tuple(s[:, 0] for s in states)
    elif layout == "packed":
        x = pack_padded_sequence(x, [5, 3, 2])
    elif layout == "unsorted":
        x = pack_padded_sequence(x, [2, 5, 3], enforce_sorted=False)
    assert_same(plain, fused, x, states)
    hx = states if states is None or plain.mode == "LSTM" else states[0]
    theirs, ours = plain(x, hx), fused(x, hx)
    assert_same_numbers(ours, theirs)
    assert isinstance(ours[0], PackedSequence) == isinstance(x, PackedSequence)


@pytest.mark.parametrize("cell", CELLS)
def test_state_is_passed_on(cell):
    """Two halves with the state between them are the whole, for either kind of call."""
    _, fused = stack(cell, bidirectional=False)
    x = torch.randn(6, 2, 3, dtype=torch.float64)
    whole, last = fused(x)
    first, state = fused(x[:2])
    second, state = fused(x[2:], hx=state)
    assert_same_numbers((torch.cat((first, second)), state), (whole, last))


def test_results_are_contiguous_where_torchs_are():
    for batch_first in (False, True):
        plain, fused = make_pair("lstm", 3, 4, batch_first=batch_first)
        x = torch.randn(5, 2, 3)
        for a, b in zip(fused(x)[1], plain(x)[1], strict=True):
            assert a.is_contiguous() == b.is_contiguous()
        fused(x)[0].transpose(0, 1).reshape(-1, 4)


def test_long_sequence():
    """More steps than 16 bits count."""
    plain, fused = make_pair("rnn", 1, 1, dtype=torch.float64)
    assert_same(plain, fused, torch.randn(70_000, 1, 1, dtype=torch.float64))


# Parameters from elsewhere


@pytest.mark.parametrize("cell", CELLS)
def test_functional_call(cell):
    plain, fused = stack(cell)
    other, _ = stack(cell, seed=9)
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    weights = {k: v.clone().requires_grad_() for k, v in other.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, state = functional_call(fused, weights, (x,))
    assert_same_numbers((y, state), other(x))
    y.sum().backward()
    other(x)[0].sum().backward()
    for name, p in other.named_parameters():
        torch.testing.assert_close(weights[name].grad, p.grad, rtol=1e-11, atol=1e-12)
    assert all(p.grad is None for p in fused.parameters())
    assert_same(plain, fused)


@pytest.mark.parametrize("cell", CELLS)
def test_weight_norm(cell):
    plain, fused = stack(cell)
    for module in (plain, fused):
        parametrizations.weight_norm(module, "weight_hh_l0")
        parametrizations.weight_norm(module, "weight_ih_l1_reverse")
    assert_same(plain, fused)
    with torch.no_grad():
        for p, q in zip(plain.parameters(), fused.parameters(), strict=True):
            q.copy_(p.normal_())
    assert_same(plain, fused)
    for module in (plain, fused):
        parametrize.remove_parametrizations(module, "weight_hh_l0")
    assert_same(plain, fused)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_old_weight_norm():
    plain, fused = stack("lstm")
    for module in (plain, fused):
        nn.utils.weight_norm(module, "weight_hh_l0")
    with torch.no_grad():
        plain.weight_hh_l0_g.mul_(2)
        fused.weight_hh_l0_g.mul_(2)
    assert_same(plain, fused)


@pytest.mark.parametrize("cell", CELLS)
def test_tied_weights(cell):
    """One Parameter in two places gets the sum of both gradients."""
    plain, fused = stack(cell, bidirectional=True)
    for module in (plain, fused):
        module.weight_hh_l0_reverse = module.weight_hh_l0
        module.bias_hh_l1 = module.bias_ih_l1
    count = len(list(plain.parameters()))
    assert len(list(fused.parameters())) == count == len(plain._flat_weights_names) - 2
    assert_same(plain, fused)


@pytest.mark.parametrize("cell", CELLS)
def test_replaced_parameters_are_used(cell):
    plain, fused = stack(cell)
    new = torch.randn_like(plain.weight_hh_l0)
    for module in (plain, fused):
        module.weight_hh_l0 = nn.Parameter(new.clone())
    assert_same(plain, fused)
    for module in (plain, fused):
        del module.weight_hh_l0
        module.register_parameter("weight_hh_l0", nn.Parameter(2 * new))
        module.weight_ih_l0.data = 3 * module.weight_ih_l0.data
    y, _ = fused(torch.ones(5, 2, 3, dtype=torch.float64))
    expected = copy.deepcopy(plain)  # a copy, for torch.nn may use what it has kept
    assert_same_numbers(y, expected(torch.ones(5, 2, 3, dtype=torch.float64))[0])


def test_weights_need_not_be_contiguous():
    plain, fused = stack("lstm")
    fused.weight_hh_l0.data = fused.weight_hh_l0.data.T.contiguous().T
    assert not fused.weight_hh_l0.is_contiguous()
    assert_same(plain, fused)
    assert not fused.weight_hh_l0.is_contiguous()


@pytest.mark.parametrize("cell", CELLS)
def test_flatten_parameters(cell):
    plain, fused = stack(cell)
    before = [id(p) for p in fused.parameters()]
    assert fused.flatten_parameters() is None
    assert [id(p) for p in fused.parameters()] == before
    assert_same(plain, fused)


@pytest.mark.parametrize("cell", CELLS)
def test_hooks(cell):
    _, fused = stack(cell)
    seen = []
    fused.register_forward_pre_hook(lambda m, args: seen.append("before"))
    fused.register_forward_hook(lambda m, args, out: seen.append("after"))
    fused.register_full_backward_hook(lambda m, gi, go: seen.append("backward"))
    fused.weight_hh_l1.register_hook(lambda g: seen.append("weight"))
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    fused(x)[0].sum().backward()
    assert seen[:2] == ["before", "after"]
    assert set(seen[2:]) == {"backward", "weight"}


@pytest.mark.parametrize("cell", CELLS)
def test_an_optimizer_trains_both_alike(cell):
    plain, fused = stack(cell)
    x, goal = torch.randn(5, 2, 3, dtype=torch.float64), torch.rand(5, 2, 1, dtype=torch.float64)
    losses = []
    for module in (plain, fused):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = (module(x)[0] - goal).square().mean()
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[1][-1] < losses[1][0]


# One step at a time


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", SINGLE_STEPS)
def test_single_step_cells(name, bias):
    torch.manual_seed(0)
    plain = getattr(nn, name)(3, 4, bias, dtype=torch.float64)
    fused = getattr(fusedrnn, name)(3, 4, bias, dtype=torch.float64)
    assert repr(fused) == f"fusedrnn.{plain!r}"
    fused.load_state_dict(plain.state_dict())
    lstm = name == "LSTMCell"
    for shape in ((2, 3), (3,)):
        x = torch.randn(*shape, dtype=torch.float64)
        h = torch.randn(*shape[:-1], 4, dtype=torch.float64)
        for hx in (None, (h, -h) if lstm else h):
            theirs, ours = plain(x, hx), fused(x, hx)
            assert_same_numbers(ours, theirs)
            grads = []
            for module, out in ((plain, theirs), (fused, ours)):
                loss = sum(o.square().sum() for o in out) if lstm else out.square().sum()
                grads.append(torch.autograd.grad(loss, tuple(module.parameters())))
            assert_same_numbers(*reversed(grads))


@pytest.mark.parametrize("name", SINGLE_STEPS)
def test_single_step_cells_find_their_weights(name):
    """Parametrized, in another order than they were made in, or replaced by plain tensors."""
    plain, x = getattr(nn, name)(3, 5), torch.randn(2, 3)
    fused = fusedrnn.swap(copy.deepcopy(plain)).model
    for cell in (plain, fused):
        parametrizations.weight_norm(cell, "weight_ih")
    assert_same_numbers(fused(x), plain(x))
    for cell in (plain, fused):
        parametrize.remove_parametrizations(cell, "weight_ih")
    assert next(iter(fused._parameters)) != "weight_ih"
    assert_same_numbers(fused(x), plain(x))
    for cell in (plain, fused):
        bias = cell.bias_hh.detach() + 1
        del cell.bias_hh
        cell.bias_hh = bias
    assert_same_numbers(fused(x), plain(x))


def test_relu_cell():
    plain = nn.RNNCell(3, 4, nonlinearity="relu")
    fused = fusedrnn.RNNCell(3, 4, nonlinearity="relu")
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3)
    torch.testing.assert_close(fused(x), plain(x))


LAYERS = ("RNN", "GRU", "LSTM")


@pytest.mark.parametrize("name", [*LAYERS, "RNNCell", "GRUCell", "LSTMCell"])
def test_examples_of_docstrings_run(name):
    cls = getattr(fusedrnn, name)
    assert cls.__doc__ != getattr(nn, name).__doc__
    test = doctest.DocTestParser().get_doctest(
        cls.__doc__, {"fusedrnn": fusedrnn, "torch": torch}, name, None, None
    )
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


@pytest.mark.parametrize("name", LAYERS)
def test_signatures_name_every_argument(name):
    cls = getattr(fusedrnn, name)
    shown = inspect.signature(cls).parameters
    assert not {"args", "kwargs"} & set(shown)
    assert set(shown) <= set(re.findall(r"\w+", cls.__doc__))
    # torch.nn's, in its order: an argument by position means the same.
    documented = getattr(nn, name).__doc__.split("(", 1)[1].split(")")[0]
    theirs = [argument.split("=")[0].strip() for argument in documented.split(",")]
    assert list(shown)[: len(theirs)] == theirs
    ours = {"recurrent_dropout", "zoneout", "layer_norm", "recompute"}
    assert set(shown) - set(theirs) == ours - ({"layer_norm"} if name == "RNN" else set())
    called = inspect.signature(cls.forward).parameters
    assert list(called) == ["self", "input", "hx", "lengths", "resets", "return_all"]


def test_a_subclass_shows_its_own_signature():
    class Mine(fusedrnn.LSTM):
        def __init__(self, width: int) -> None:
            super().__init__(width, width)

    assert list(inspect.signature(Mine).parameters) == ["width"]
    assert Mine(3)(torch.randn(2, 1, 3))[0].shape == (2, 1, 3)


def test_what_type_checkers_accept_runs():
    """mypy checks tests/typing/; here the accepted calls run, so types and behaviour agree."""
    names = runpy.run_path(str(Path(__file__).parent / "typing/accepted.py"))
    assert isinstance(names["states"], fusedrnn.modules.AllStates)


def test_all_states_are_a_named_tuple_to_torch():
    lstm, x = fusedrnn.LSTM(3, 4), torch.randn(5, 2, 3)
    states = lstm(x, return_all=True)[2]
    doubled = torch.utils._pytree.tree_map(lambda t: 2 * t, states)
    assert torch.equal(doubled.h[0], 2 * states.h[0]) and doubled._fields == ("h", "c")
    assert torch.equal(pickle.loads(pickle.dumps(states)).c[0], states.c[0])
    compiled = torch.compile(lstm, backend="eager", fullgraph=True)(x, return_all=True)[2]
    assert torch.equal(compiled.c[0], states.c[0])
