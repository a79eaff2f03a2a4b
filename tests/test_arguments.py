"""Arguments of ours in the forms in which their users hold them."""

import warnings

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

T, B, INPUT, HIDDEN = 6, 4, 3, 5
LENGTHS = [6, 0, 3, 5]

LENGTH_FORMS = {
    "list": list,
    "tuple": tuple,
    "int32": lambda n: torch.tensor(n, dtype=torch.int32),
    "column": lambda n: torch.tensor(n)[:, None],
    "numpy": np.array,
    "numpy int32": lambda n: np.array(n, dtype=np.int32),
    "numpy numbers": lambda n: list(np.array(n)),
    "tensors": lambda n: [torch.tensor(i) for i in n],
}


@pytest.mark.parametrize("form", LENGTH_FORMS)
def test_lengths(form):
    layer, x = fusedrnn.LSTM(INPUT, HIDDEN), torch.randn(T, B, INPUT)
    expected = layer(x, lengths=torch.tensor(LENGTHS))[0]
    assert torch.equal(layer(x, lengths=LENGTH_FORMS[form](LENGTHS))[0], expected)


@pytest.mark.parametrize("form", ["list", "numpy"])
def test_the_default_device_is_not_that_of_numbers(form):
    layer, x = fusedrnn.LSTM(INPUT, HIDDEN), torch.randn(T, B, INPUT)
    resets = torch.rand(T, B) < 0.4
    expected = layer(x, lengths=LENGTHS, resets=resets)[0]
    with torch.device("meta"):
        found = layer(x, lengths=LENGTH_FORMS[form](LENGTHS), resets=RESET_FORMS[form](resets))[0]
    assert torch.equal(found, expected)


DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float32, torch.float64, torch.bfloat16]
RESET_FORMS = {
    **{str(dtype): lambda r, dtype=dtype: r.to(dtype) for dtype in DTYPES},
    "trailing": lambda r: r[..., None],  # TorchRL's is_init
    "float, trailing": lambda r: r.float()[..., None],
    "numpy": lambda r: r.numpy(),
    "numpy float": lambda r: r.float().numpy(),  # episode_starts of stable-baselines3's buffers
    "list": lambda r: r.tolist(),
}


@pytest.mark.parametrize("kind", ["time first", "batch_first", "unbatched", "integers"])
@pytest.mark.parametrize("form", RESET_FORMS)
def test_resets(form, kind):
    layer = fusedrnn.GRU(INPUT, HIDDEN, batch_first=kind == "batch_first")
    x, resets = torch.randn(T, B, INPUT), torch.rand(T, B) < 0.4
    if kind == "unbatched":
        x, resets = x[:, 0], resets[:, 0]
    if kind == "integers":
        x = torch.randint(0, INPUT, (T, B))
    expected = layer(x, resets=resets)[0]
    assert not torch.equal(layer(x)[0], expected)
    assert torch.equal(layer(x, resets=RESET_FORMS[form](resets))[0], expected)


@pytest.mark.parametrize("form", ["torch.float32", "trailing", "float, trailing"])
def test_packed_resets(form):
    layer, x = fusedrnn.GRU(INPUT, HIDDEN), torch.randn(T, B, INPUT)
    resets, lengths = torch.rand(T, B) < 0.4, [6, 5, 3, 2]
    pack = lambda t: pack_padded_sequence(t, lengths)  # noqa: E731
    expected = layer(pack(x), resets=pack(resets))[0].data
    given = pack(RESET_FORMS[form](resets))
    assert torch.equal(layer(pack(x), resets=given)[0].data, expected)
    assert torch.equal(layer(pack(x), resets=given.data)[0].data, expected)


def test_resets_compiled():
    layer, x = fusedrnn.GRU(INPUT, HIDDEN), torch.randn(T, B, INPUT)
    resets = (torch.rand(T, B, 1) < 0.4).float()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, resets=resets)[0], layer(x, resets=resets)[0])


def test_numbers_of_numpy_and_lists_of_settings():
    layer = fusedrnn.LSTM(3, 4, recurrent_dropout=np.float32(0.5), zoneout=[np.float64(0.25), 0])
    assert repr(layer) == "fusedrnn.LSTM(3, 4, recurrent_dropout=0.5, zoneout=(0.25, 0))"
    assert type(layer.recurrent_dropout) is type(layer.zoneout[0]) is float
    for wrong in ("0.5", None, True, np.float32(1.5), float("nan"), 0.5j, torch.tensor(0.5)):
        with pytest.raises(ValueError, match="recurrent_dropout should be a number in range"):
            fusedrnn.GRU(3, 4, recurrent_dropout=wrong)
        with pytest.raises(ValueError, match="zoneout should be a number in range"):
            fusedrnn.GRU(3, 4, zoneout=wrong)


# Integers, which torch.nn refuses: features by mistake, or tokens

AMBIGUOUS = {
    "features, unbatched": (torch.ones(T, INPUT, dtype=torch.int64), {}),
    "features, one step": (torch.ones(INPUT, dtype=torch.int64), {}),
    "uint8": (torch.ones(T, INPUT, dtype=torch.uint8), {}),
    "return_all": (torch.ones(T, INPUT, dtype=torch.int64), {"return_all": True}),
}
CLEAR = {
    "another width": (torch.ones(T, INPUT + 1, dtype=torch.int64), {}),
    "floats": (torch.ones(T, INPUT), {}),
    "a state": (torch.ones(T, INPUT, dtype=torch.int64), {"hx": torch.zeros(1, INPUT, HIDDEN)}),
    "lengths": (torch.ones(T, INPUT, dtype=torch.int64), {"lengths": [T] * INPUT}),
    "resets": (torch.ones(T, INPUT, dtype=torch.int64), {"resets": torch.zeros(T, INPUT)}),
    "packed": (pack_padded_sequence(torch.ones(2, 2, dtype=torch.int64), [2, 1]), {}),
}


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("which", AMBIGUOUS)
def test_integers_that_may_be_features(which, graph):
    x, kwargs = AMBIGUOUS[which]
    layer = fusedrnn.GRU(INPUT, HIDDEN)
    with torch.set_grad_enabled(graph), pytest.warns(UserWarning, match="if these are feat") as w:
        layer(x, **kwargs)
    (warning,) = w
    assert f"integers of shape {list(x.shape)} are taken for" in str(warning.message)
    assert "write input.float()" in str(warning.message)


@pytest.mark.parametrize("which", CLEAR)
def test_integers_that_are_tokens(which):
    x, kwargs = CLEAR[which]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedrnn.GRU(INPUT, HIDDEN)(x, **kwargs)


def test_the_warning_names_the_line_of_the_call():
    layer, x = fusedrnn.GRU(INPUT, HIDDEN), torch.ones(T, INPUT, dtype=torch.int64)
    for kwargs in ({}, {"return_all": True}):
        with pytest.warns(UserWarning) as caught:
            layer(x, **kwargs)
        assert caught[0].filename == __file__


def test_no_lengths_of_no_rows():
    y, _ = fusedrnn.GRU(3, 4)(torch.randn(5, 0, 3), lengths=[])
    assert y.shape == (5, 0, 4)
