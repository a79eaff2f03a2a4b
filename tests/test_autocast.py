"""Autocast on the CPU: every combination of dtypes gives torch.nn's dtypes, or its error."""

import itertools

import pytest
import torch
from cases import CELLS, DTYPES, make_pair, random_state
from torch.nn.utils.rnn import pack_padded_sequence

LOW = (torch.bfloat16, torch.float16)
T, B, INPUT, HIDDEN = 5, 2, 3, 4
# torch.nn gives some combinations to oneDNN, which does not have them on every processor: there
# ours computes, or refuses what torch.nn refuses elsewhere.
ONEDNN = ("could not create a primitive descriptor", "get_mkldnn_dtype: unsupported data type")
# torch.nn has other words for one row, where the vector's product says it.
DTYPES_DIFFER = "mat1 and mat2 must have the same dtype, but got "


def call(module, x, states, low, graph):
    with torch.autocast("cpu", low), torch.set_grad_enabled(graph):
        y, state = module(x, states if module.mode == "LSTM" or states is None else states[0])
    return [y.data, *(state if isinstance(state, tuple) else (state,))]


def attempt(*args):
    """(results, None) or (None, what the RuntimeError says)."""
    try:
        return call(*args), None
    except RuntimeError as error:
        return None, str(error)


def assert_as_torch(plain, fused, x, states, low, graph):
    theirs, error = attempt(plain, x, states, low, graph)
    ours, said = attempt(fused, x, states, low, graph)
    if error is None:
        assert [t.dtype for t in ours] == [t.dtype for t in theirs]
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=0.05, atol=0.03)
    elif not any(words in error for words in ONEDNN):
        assert said.startswith(DTYPES_DIFFER)
        assert said == error or not error.startswith(DTYPES_DIFFER)
    else:
        assert said is not None or {t.dtype for t in ours} == {low}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("kind", ["padded", "packed", "unbatched", "empty"])
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("cell", CELLS)
def test_weights_input_and_state(cell, low, kind, graph):
    for weights, of_input in itertools.product(DTYPES, DTYPES):
        plain, fused = make_pair(cell, INPUT, HIDDEN, num_layers=2, dtype=weights)
        rows = 0 if kind == "empty" else B
        x, given = torch.randn(T, rows, INPUT).to(of_input), random_state(plain, rows)
        if kind == "packed":
            x = pack_padded_sequence(x, [T, 3])
        if kind == "unbatched":
            x, given = x[:, 0], tuple(s[:, 0] for s in given)
        for of_state in (None, *DTYPES):
            states = None if of_state is None else tuple(s.to(of_state) for s in given)
            assert_as_torch(plain, fused, x, states, low, graph)


@pytest.mark.parametrize(("of_h", "of_c"), itertools.permutations(DTYPES, 2))
@pytest.mark.parametrize("low", LOW)
def test_h_and_c_differ(low, of_h, of_c):
    plain, fused = make_pair("lstm", INPUT, HIDDEN)
    h, c = random_state(plain, B)
    x = pack_padded_sequence(torch.randn(T, B, INPUT), [T, 3])
    assert_as_torch(plain, fused, x, (h.to(of_h), c.to(of_c)), low, True)


@pytest.mark.parametrize("of_input", LOW)
def test_without_onednn(of_input):
    plain, fused = make_pair("lstm", INPUT, HIDDEN)
    x, states = torch.randn(T, B, INPUT).to(of_input), random_state(plain, B)
    with torch.backends.mkldnn.flags(enabled=False):
        assert_as_torch(plain, fused, x, states, torch.bfloat16, True)
