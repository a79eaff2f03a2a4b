"""Wrong calls: the same exception with the same words as torch.nn's, and the same warnings.

Each entry of the tables is called on torch.nn's module and on ours. Where the two may differ,
EXCEPT says why and what ours says.
"""

import re
import warnings
from pathlib import Path

import pytest
import torch
from cases import CELLS, make_pair
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn
from fusedrnn import ops

T, B, INPUT, HIDDEN = 5, 2, 3, 4
LSTMS = ("lstm", "lstm-proj")
LAYERS = 2


def zeros(*sizes, dtype=torch.float32):
    return torch.zeros(sizes, dtype=dtype)


def packed(width=INPUT, dtype=torch.float32, **kwargs):
    return pack_padded_sequence(zeros(T, B, width, dtype=dtype), [5, 3], **kwargs)


def unsorted():
    return pack_padded_sequence(zeros(T, B, INPUT), [3, 5], enforce_sorted=False)


def states(module, h=None, c=None, batch=B, dtype=torch.float32, layers=LAYERS, width=None):
    """hx for `module`: the right one but for what is given. h and c are sizes."""
    h = h if h is not None else (layers, batch, width or module.proj_size or module.hidden_size)
    c = c if c is not None else (layers, batch, width or module.hidden_size)
    h, c = zeros(*h, dtype=dtype), zeros(*c, dtype=dtype)
    return (h, c) if module.mode == "LSTM" else h


# name -> the call; all modules have two layers
CALLS = {
    "0-D": lambda m: m(zeros()),
    "1-D": lambda m: m(zeros(INPUT)),
    "4-D": lambda m: m(zeros(T, B, INPUT, 1)),
    "5-D": lambda m: m(zeros(1, 1, T, B, INPUT)),
    "input width": lambda m: m(zeros(T, B, INPUT + 1)),
    "input width 0": lambda m: m(zeros(T, B, 0)),
    "input width, unbatched": lambda m: m(zeros(T, INPUT + 1)),
    "input width, packed": lambda m: m(packed(INPUT + 1)),
    "no steps": lambda m: m(zeros(0, B, INPUT)),
    "no steps, unbatched": lambda m: m(zeros(0, INPUT)),
    "no steps and a state": lambda m: m(zeros(0, B, INPUT), states(m)),
    "no steps, no rows": lambda m: m(zeros(0, 0, INPUT)),
    "no steps, wrong width": lambda m: m(zeros(0, B, INPUT + 1)),
    "float64": lambda m: m(zeros(T, B, INPUT, dtype=torch.float64)),
    "bfloat16": lambda m: m(zeros(T, B, INPUT, dtype=torch.bfloat16)),
    "complex": lambda m: m(zeros(T, B, INPUT, dtype=torch.complex64)),
    "bool": lambda m: m(zeros(T, B, INPUT, dtype=torch.bool)),
    "float64, packed": lambda m: m(packed(dtype=torch.float64)),
    "float64 and wrong width": lambda m: m(zeros(T, B, INPUT + 1, dtype=torch.float64)),
    "state: layers": lambda m: m(zeros(T, B, INPUT), states(m, layers=3)),
    "state: rows": lambda m: m(zeros(T, B, INPUT), states(m, batch=B + 1)),
    "state: width": lambda m: m(zeros(T, B, INPUT), states(m, width=7)),
    "state: 2-D": lambda m: m(zeros(T, B, INPUT), states(m, h=(2, 4), c=(2, 4))),
    "state: 4-D": lambda m: m(zeros(T, B, INPUT), states(m, h=(2, B, 4, 1), c=(2, B, 4, 1))),
    "state: 0-D": lambda m: m(zeros(T, B, INPUT), states(m, h=(), c=())),
    "state: 0-D, unbatched": lambda m: m(zeros(T, INPUT), states(m, h=(), c=())),
    "state: 3-D, unbatched": lambda m: m(zeros(T, INPUT), states(m, batch=1)),
    "state: 1-D, unbatched": lambda m: m(zeros(T, INPUT), states(m, h=(4,), c=(4,))),
    "state: width, unbatched": lambda m: m(zeros(T, INPUT), states(m, h=(2, 9), c=(2, 9))),
    "state: layers, unbatched": lambda m: m(zeros(T, INPUT), states(m, h=(1, 4), c=(1, 4))),
    "state: float64": lambda m: m(zeros(T, B, INPUT), states(m, dtype=torch.float64)),
    "state: float16": lambda m: m(zeros(T, B, INPUT), states(m, dtype=torch.float16)),
    "state: integer": lambda m: m(zeros(T, B, INPUT), states(m, dtype=torch.int64)),
    "state: float64, unbatched": lambda m: m(
        zeros(T, INPUT), states(m, h=(2, m.proj_size or 4), c=(2, 4), dtype=torch.float64)
    ),
    "state and input: both wrong": lambda m: m(zeros(T, B, INPUT + 1), states(m, batch=B + 1)),
    "state of a packed: layers": lambda m: m(packed(), states(m, layers=3)),
    "state of a packed: rows": lambda m: m(packed(), states(m, batch=B + 1)),
    "state of a packed: width": lambda m: m(packed(), states(m, width=7)),
    "state of a packed: 2-D": lambda m: m(packed(), states(m, h=(2, 4), c=(2, 4))),
    "state of a packed: float64": lambda m: m(packed(), states(m, dtype=torch.float64)),
    "state of an unsorted: rows": lambda m: m(unsorted(), states(m, batch=1)),
    "state of an unsorted: width": lambda m: m(unsorted(), states(m, width=7)),
    "state of an unsorted: 1-D": lambda m: m(unsorted(), states(m, h=(4,), c=(4,))),
    "state: a number": lambda m: m(zeros(T, B, INPUT), 3),
    "state: a string": lambda m: m(zeros(T, B, INPUT), "zeros"),
    "no input": lambda m: m(),
    "input None": lambda m: m(None),
    "input a list": lambda m: m([[1.0]]),
    "input a string": lambda m: m("text"),
    "input a number": lambda m: m(1.0),
    "too many arguments": lambda m: m(zeros(T, B, INPUT), None, None),
    "unknown argument": lambda m: m(zeros(T, B, INPUT), state=None),
    "packed 3-D data": lambda m: m(PackedSequence(zeros(8, 1, INPUT), torch.tensor([5, 3]))),
    "packed 1-D data": lambda m: m(PackedSequence(zeros(INPUT), torch.tensor([1]))),
}
LSTM_CALLS = {
    "state: a tensor": lambda m: m(zeros(T, B, INPUT), zeros(2, B, HIDDEN)),
    "state: one of two": lambda m: m(zeros(T, B, INPUT), (states(m)[0],)),
    "state: three": lambda m: m(zeros(T, B, INPUT), (*states(m), zeros(1))),
    "state: empty": lambda m: m(zeros(T, B, INPUT), ()),
    "state: with None": lambda m: m(zeros(T, B, INPUT), (states(m)[0], None)),
    "h_0: width": lambda m: m(zeros(T, B, INPUT), states(m, h=(2, B, 9))),
    "c_0: width": lambda m: m(zeros(T, B, INPUT), states(m, c=(2, B, 9))),
    "c_0: rows": lambda m: m(zeros(T, B, INPUT), states(m, c=(2, 1, HIDDEN))),
    "h_0: 2-D": lambda m: m(zeros(T, B, INPUT), states(m, h=(2, HIDDEN))),
    "c_0: 2-D": lambda m: m(zeros(T, B, INPUT), states(m, c=(2, HIDDEN))),
    "c_0: 3-D, unbatched": lambda m: m(zeros(T, INPUT), states(m, h=(2, 4), c=(2, 1, 4))),
    "c_0 of a packed: width": lambda m: m(packed(), states(m, c=(2, B, 9))),
    "c_0 of an unsorted: rows": lambda m: m(unsorted(), states(m, c=(2, 1, HIDDEN))),
    "c_0: float64": lambda m: m(zeros(T, B, INPUT), (states(m)[0], states(m)[1].double())),
    "h_0: float64": lambda m: m(zeros(T, B, INPUT), (states(m)[0].double(), states(m)[1])),
}
SINGLE_STATE_CALLS = {
    "state: empty": lambda m: m(zeros(T, B, INPUT), ()),
    "state: a tuple": lambda m: m(zeros(T, B, INPUT), (states(m),)),
    "state: a list": lambda m: m(zeros(T, B, INPUT), [states(m)]),
}


STATE = r"Expected hidden\[[01]\] size \(2, 2, [24]\), got \["
STATE_DTYPE = r"RNN hidden state dtype \(torch.\w+\) does not match input dtype \(torch.float32\)"

# What ours may say otherwise: entry -> (exception, its words)
EXCEPT = {
    # torch.nn's come from inside ATen or oneDNN and do not say which argument was wrong.
    "state: float64": (RuntimeError, STATE_DTYPE),
    "state: float16": (RuntimeError, STATE_DTYPE),
    "state: integer": (RuntimeError, STATE_DTYPE),
    "state: float64, unbatched": (RuntimeError, STATE_DTYPE),
    "state of a packed: float64": (RuntimeError, STATE_DTYPE),
    "c_0: float64": (RuntimeError, STATE_DTYPE),
    "h_0: float64": (RuntimeError, STATE_DTYPE),
}
EXCEPT_LSTM = EXCEPT | {
    # torch.nn's LSTM leaves out its own checks of packed input: what then fails is inside ATen, and
    # one-dimensional data is broadcast and accepted. Ours says what RNN and GRU say.
    "input width, packed": (RuntimeError, "must be equal to input_size. Expected 3, got 4"),
    "float64, packed": (ValueError, "RNN input dtype (torch.float64) does not match weight dtype"),
    "packed 3-D data": (RuntimeError, "input must have 2 dimensions, got 3"),
    "packed 1-D data": (RuntimeError, "input must have 2 dimensions, got 1"),
    "state of a packed: layers": (RuntimeError, STATE),
    "state of a packed: rows": (RuntimeError, STATE),
    "state of a packed: width": (RuntimeError, STATE),
    "state of a packed: 2-D": (RuntimeError, STATE),
    "state of an unsorted: width": (RuntimeError, STATE),
    "c_0 of a packed: width": (RuntimeError, STATE),
    # Both say that an int was given; Python says it of the first thing tried.
    "state: a number": (TypeError, "'int' object is not "),
}


def outcome(call, *args):
    """(kind of exception, its words), or (None, shapes)."""
    try:
        result = call(*args)
    except Exception as error:
        return type(error), str(error)
    return None, result


def tables(cell):
    return CALLS | (LSTM_CALLS if cell in LSTMS else SINGLE_STATE_CALLS)


# Calls take another way where no gradient is wanted.
GRADIENTS = ["wanted", "switched off", "of nothing"]


def pair(cell, gradients):
    plain, fused = make_pair(cell, INPUT, HIDDEN, num_layers=LAYERS)
    if gradients == "of nothing":
        plain.requires_grad_(False), fused.requires_grad_(False)
    return plain, fused


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize(("cell", "name"), [(c, n) for c in CELLS for n in tables(c)])
def test_wrong_calls(cell, name, gradients):
    plain, fused = pair(cell, gradients)
    call = tables(cell)[name]
    with torch.set_grad_enabled(gradients != "switched off"):
        theirs, ours = outcome(call, plain), outcome(call, fused)
    other = (EXCEPT_LSTM if cell in LSTMS else EXCEPT).get(name)
    if other is None:
        assert theirs[0] is not None, "torch.nn accepts this"
        assert ours == theirs
    else:
        kind, words = other
        assert ours[0] is kind
        assert words in ours[1] or re.search(words, ours[1])


# Unusual, and right: name -> the call

ACCEPTED = {
    "state of an unsorted: more rows": lambda m: m(unsorted(), states(m, batch=B + 1)),
    "state as hx=": lambda m: m(zeros(T, B, INPUT), hx=states(m)),
    "input=": lambda m: m(input=zeros(T, B, INPUT)),
    "state: a list": lambda m: m(
        zeros(T, B, INPUT), list(states(m)) if m.mode == "LSTM" else states(m)
    ),
    "state: expanded": lambda m: m(
        zeros(T, B, INPUT),
        tuple(s[:, :1].expand(-1, B, -1) for s in states(m))
        if m.mode == "LSTM"
        else states(m)[:, :1].expand(-1, B, -1),
    ),
    "state: transposed": lambda m: m(
        zeros(T, B, INPUT),
        tuple(s.mT.contiguous().mT for s in states(m))
        if m.mode == "LSTM"
        else states(m).mT.contiguous().mT,
    ),
    "one step": lambda m: m(zeros(1, B, INPUT)),
    "one step, unbatched": lambda m: m(zeros(1, INPUT)),
    "no rows": lambda m: m(zeros(T, 0, INPUT)),
    "no rows and a state": lambda m: m(zeros(T, 0, INPUT), states(m, batch=0)),
}


def flatten(result):
    if isinstance(result, torch.Tensor):
        return [result]
    return [t for r in result if r is not None for t in flatten(r)]


@pytest.mark.parametrize("gradients", GRADIENTS)
@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("cell", CELLS)
def test_unusual_calls(cell, name, gradients):
    plain, fused = pair(cell, gradients)
    with torch.set_grad_enabled(gradients != "switched off"):
        theirs, ours = ACCEPTED[name](plain), ACCEPTED[name](fused)
    for a, b in zip(flatten(ours), flatten(theirs), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_no_rows_have_gradients_of_zero(cell, bidirectional, batch_first, with_state):
    plain, fused = make_pair(
        cell,
        INPUT,
        HIDDEN,
        num_layers=LAYERS,
        bidirectional=bidirectional,
        batch_first=batch_first,
    )
    grads = []
    for module in (plain, fused):
        x = zeros(0, T, INPUT) if batch_first else zeros(T, 0, INPUT)
        x.requires_grad_()
        layers = LAYERS * (1 + bidirectional)
        y, _ = module(x, states(module, batch=0, layers=layers) if with_state else None)
        y.sum().backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)
        assert not a.any()


# Constructors

CONSTRUCTORS = {
    "no arguments": ((), {}),
    "one argument": ((3,), {}),
    "input_size 0": ((0, 4), {}),
    "input_size < 0": ((-1, 4), {}),
    "input_size a float": ((3.0, 4), {}),
    "input_size None": ((None, 4), {}),
    "hidden_size 0": ((3, 0), {}),
    "hidden_size < 0": ((3, -4), {}),
    "hidden_size a float": ((3, 4.0), {}),
    "hidden_size a string": ((3, "4"), {}),
    "num_layers 0": ((3, 4), {"num_layers": 0}),
    "num_layers < 0": ((3, 4), {"num_layers": -1}),
    "num_layers a float": ((3, 4), {"num_layers": 2.0}),
    "bias a number": ((3, 4), {"bias": 1}),
    "bias None": ((3, 4), {"bias": None}),
    "batch_first a number": ((3, 4), {"batch_first": 1}),
    "batch_first a string": ((3, 4), {"batch_first": "yes"}),
    "dropout > 1": ((3, 4), {"num_layers": 2, "dropout": 1.5}),
    "dropout < 0": ((3, 4), {"num_layers": 2, "dropout": -0.1}),
    "dropout NaN": ((3, 4), {"num_layers": 2, "dropout": float("nan")}),
    "dropout a bool": ((3, 4), {"num_layers": 2, "dropout": True}),
    "dropout a string": ((3, 4), {"num_layers": 2, "dropout": "0.5"}),
    "dropout a word": ((3, 4), {"num_layers": 2, "dropout": "half"}),
    "dropout None": ((3, 4), {"num_layers": 2, "dropout": None}),
    "proj_size": ((3, 4), {"proj_size": 4}),
    "proj_size 2": ((3, 4), {"proj_size": 2}),
    "proj_size 0": ((3, 4), {"proj_size": 0}),
    "proj_size large": ((3, 4), {"proj_size": 5}),
    "proj_size < 0": ((3, 4), {"proj_size": -1}),
    "proj_size a float": ((3, 4), {"proj_size": 2.0}),
    "unknown": ((3, 4), {"layers": 2}),
    "hidden twice": ((3, 4), {"hidden_size": 4}),
    "too many": ((3, 4, 1, True, True, 0.0, True, 0, None, None, None, None, None), {}),
    "nonlinearity": ((3, 4), {"nonlinearity": "sigmoid"}),
    "nonlinearity None": ((3, 4), {"nonlinearity": None}),
    "dtype integer": ((3, 4), {"dtype": torch.int64}),
    "dtype a string": ((3, 4), {"dtype": "float32"}),
    "device unknown": ((3, 4), {"device": "abacus"}),
    "dropout of one layer": ((3, 4), {"dropout": 0.5}),
    "dropout of 1 of one layer": ((3, 4), {"dropout": 1}),
    "bidirectional a number": ((3, 4), {"bidirectional": 1}),
}


def built(make, args, kwargs):
    """What comes of a constructor: exception or representation, and all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kind, found = outcome(lambda: make(*args, **kwargs))
    found = found if kind else repr(found).removeprefix("fusedrnn.")
    return kind, found, [(w.category, str(w.message)) for w in caught]


@pytest.mark.parametrize("which", CONSTRUCTORS)
@pytest.mark.parametrize("name", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_constructors(name, which):
    args, kwargs = CONSTRUCTORS[which]
    theirs = built(getattr(nn, name), args, kwargs)
    assert built(getattr(fusedrnn, name), args, kwargs) == theirs


def test_the_table_of_constructors_has_warnings():
    args, kwargs = CONSTRUCTORS["dropout of one layer"]
    kind, _, caught = built(fusedrnn.LSTM, args, kwargs)
    assert kind is None
    assert caught[0][0] is UserWarning
    assert "num_layers greater than 1, but got dropout=0.5" in caught[0][1]


@pytest.mark.parametrize("cell", CELLS)
def test_right_calls_warn_of_nothing(cell):
    _, fused = make_pair(cell, INPUT, HIDDEN, num_layers=LAYERS, dropout=0.5)
    fused.weight_hh_l0 = nn.Parameter(fused.weight_hh_l0.T.contiguous().T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (zeros(T, B, INPUT), zeros(T, INPUT), packed(), unsorted()):
            y, _ = fused(x)
            y = y.data if isinstance(y, PackedSequence) else y
            y.sum().backward()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            fused(zeros(T, B, INPUT))


# lengths, which torch.nn does not know: name -> (lengths, exception, its words)

LENGTHS = {
    "a number": (5, TypeError, "lengths should be a Tensor, an array or a list, got: int"),
    "strings": (
        ["5", "3"],
        TypeError,
        "lengths should be a Tensor, got a list of which",
    ),
    "ragged": ([[5], [3, 1]], TypeError, "lengths should be a Tensor, got a list of which torch"),
    "a short list": ([5], RuntimeError, "lengths of shape (2,), got [1]"),
    "float": (torch.tensor([5.0, 3.0]), TypeError, "got torch.float32: write lengths.long()"),
    "fractions": ([1.0, 0.6], TypeError, "(lengths * T).round().long() where they are fractions"),
    "bool": (torch.tensor([True, True]), TypeError, "integers, got torch.bool: write mask.sum(-1)"),
    "a mask": (torch.ones(2, 5, dtype=torch.bool), TypeError, "write mask.sum(-1)"),
    "packed": (packed(), TypeError, "should be a Tensor, an array or a list, got: PackedSequence"),
    "complex": (torch.tensor([5j, 3j]), TypeError, "should be integers, got torch.complex64"),
    "too few": (torch.tensor([5]), RuntimeError, "lengths of shape (2,), got [1]"),
    "too many": (torch.tensor([5, 3, 1]), RuntimeError, "lengths of shape (2,), got [3]"),
    "2-D": (torch.tensor([[5, 3]]), RuntimeError, "lengths of shape (2,), got [1, 2]"),
    "0-D": (torch.tensor(5), RuntimeError, "lengths of shape (2,), got []"),
    "overlong": (torch.tensor([6, 3]), RuntimeError, "lengths in [0, 5], got 6"),
    "negative": (torch.tensor([5, -1]), RuntimeError, "lengths in [0, 5], got -1"),
    "huge": (torch.tensor([5, 2**62]), RuntimeError, "lengths in [0, 5], got 4611686018427387904"),
}


@pytest.mark.parametrize("which", LENGTHS)
@pytest.mark.parametrize("cell", CELLS)
def test_wrong_lengths(cell, which):
    lengths, kind, words = LENGTHS[which]
    _, fused = make_pair(cell, INPUT, HIDDEN, num_layers=LAYERS)
    with pytest.raises(kind, match=re.escape(words)):
        fused(zeros(T, B, INPUT), lengths=lengths)


@pytest.mark.parametrize("cell", CELLS)
def test_lengths_elsewhere(cell):
    plain, fused = make_pair(cell, INPUT, HIDDEN, num_layers=LAYERS)
    lengths = torch.tensor([5, 3])
    with pytest.raises(ValueError, match="a PackedSequence has lengths of its own"):
        fused(packed(), lengths=lengths)
    with pytest.raises(TypeError):  # by keyword only, for a third argument is an error in torch.nn
        fused(zeros(T, B, INPUT), None, lengths)
    with pytest.raises(TypeError):
        plain(zeros(T, B, INPUT), lengths=lengths)
    y, _ = fused(zeros(T, INPUT), lengths=lengths[:1])
    assert y.shape == (T, fused.proj_size or HIDDEN)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_lengths_of_any_integers(dtype):
    _, fused = make_pair("gru", INPUT, HIDDEN)
    x = torch.randn(T, 3, INPUT)
    expected = fused(x, lengths=torch.tensor([5, 0, 3]))[0]
    assert torch.equal(fused(x, lengths=torch.tensor([5, 0, 3]).to(dtype))[0], expected)
    strided = torch.tensor([5, 9, 0, 9, 3]).to(dtype)[::2]
    assert torch.equal(fused(x, lengths=strided)[0], expected)


# Errors of the ops themselves

OP_CALLS = {
    "lengths": lambda x, w: fusedrnn.GRU(INPUT, HIDDEN)(x, lengths=[T + 1, T]),
    "index": lambda x, w: fusedrnn.GRU(INPUT, HIDDEN)(x[..., 0].long() + INPUT),
    "no weights": lambda x, w: ops.infer(x, None, None, [], *GRU),
    "weights' shape": lambda x, w: ops.infer(x[..., 1:], None, None, w, *GRU),
    "weights' dtype": lambda x, w: ops.infer(x.double(), None, None, w, *GRU),
    "state": lambda x, w: ops.infer(x, zeros(1, 1, 1), None, w, *GRU),
    "cell": lambda x, w: ops.infer(x, None, zeros(1, B, HIDDEN), w, *GRU),
    "mode": lambda x, w: ops.infer(x, None, None, w, "CELL", *GRU[1:]),
    "dimensions": lambda x, w: ops.infer(x[0, 0], None, None, w, *GRU),
    "complex": lambda x, w: ops.infer(x.to(torch.complex64), None, None, w, *GRU),
}
GRU = ("GRU", HIDDEN, 0, 1, True, False)


@pytest.mark.parametrize("which", OP_CALLS)
def test_errors_name_no_line_of_ours(which):
    weights = [w.detach() for w in fusedrnn.GRU(INPUT, HIDDEN).parameters()]
    with torch.no_grad(), pytest.raises((RuntimeError, IndexError)) as error:
        OP_CALLS[which](zeros(T, B, INPUT), weights)
    assert str(error.value).startswith("fusedrnn: ")
    assert "csrc" not in str(error.value) and "\n" not in str(error.value)


def test_no_check_names_a_line():
    """Neither on a GPU. These macros of torch's put file and line into what they say."""
    macros = ("STD_TORCH_CHECK(", "TORCH_CHECK(", "TORCH_ERROR_CODE_CHECK(")
    folder = Path(__file__).parents[1] / "csrc"
    sources = [p for p in folder.rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".inc")]
    assert len(sources) > 20
    found = [p.name for p in sources if any(macro in p.read_text() for macro in macros)]
    assert not found


# After an error


@pytest.mark.parametrize("cell", CELLS)
def test_an_error_changes_nothing(cell):
    _, fused = make_pair(cell, INPUT, HIDDEN, num_layers=LAYERS, dropout=0.5)
    x = torch.randn(T, B, INPUT)
    torch.manual_seed(0)
    expected = fused(x)[0]
    before = {name: p.clone() for name, p in fused.named_parameters()}
    torch.manual_seed(0)
    for call in tables(cell).values():
        outcome(call, fused)
    torch.manual_seed(0)
    assert torch.equal(fused(x)[0], expected)
    for name, p in fused.named_parameters():
        assert torch.equal(p, before[name])
        assert p.grad is None


@pytest.mark.parametrize("gradients", GRADIENTS)
def test_weights_of_another_width_than_the_module(gradients):
    """Both look at input_size, whatever functional_call puts in the place of a weight."""
    x, said = zeros(T, B, 7), []
    with torch.set_grad_enabled(gradients != "switched off"):
        for module in pair("gru", gradients):
            weights = dict(module.named_parameters()) | {"weight_ih_l0": zeros(3 * HIDDEN, 7)}
            said.append(outcome(torch.func.functional_call, module, weights, (x,)))
    assert said[0] == said[1] and said[0][0] is RuntimeError


@pytest.mark.parametrize("given", ["tensor", "packed"])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_weight_of_none(given, gradients):
    plain, fused = make_pair("gru", INPUT, HIDDEN)
    x = zeros(T, B, INPUT) if given == "tensor" else packed()
    for layer in (plain, fused):
        layer.bias_hh_l0 = None
        with torch.set_grad_enabled(gradients), pytest.raises(TypeError, match="expected Tensor"):
            layer(x)
    with pytest.raises(TypeError, match="^GRU: expected Tensor as bias_hh_l0, got None$"):
        fused(x)


def test_a_subclass_checks_itself():
    class Strict(fusedrnn.GRU):
        def check_input(self, input, batch_sizes):
            raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        Strict(INPUT, HIDDEN)(zeros(T, B, INPUT))


@pytest.mark.parametrize("where", ["weights", "one weight", "state"])
@pytest.mark.parametrize("cell", CELLS)
def test_tensors_of_two_devices(cell, where):
    """One forgotten in model.to or hx.to; meta stands for a GPU."""
    errors = []
    for module in make_pair(cell, INPUT, HIDDEN, num_layers=LAYERS):
        hx = states(module)
        if where == "weights":
            module.to("meta")
        elif where == "one weight":
            module.weight_hh_l1 = nn.Parameter(module.weight_hh_l1.to("meta"))
        else:
            hx = tuple(s.to("meta") for s in hx) if module.mode == "LSTM" else hx.to("meta")
        with pytest.raises(RuntimeError, match="are not at the same device") as caught:
            module(zeros(T, B, INPUT), hx)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]
    with pytest.raises(RuntimeError, match="are not at the same device"):
        module(packed(), hx)  # where torch.nn's words differ


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_subclass_checks_all_arguments(cell, batch_first):
    """check_forward_args is asked as torch.nn asks it, by an LSTM for packed input too."""

    def checking(cls):
        class Checking(cls):
            def check_forward_args(self, input, hidden, batch_sizes):
                states = hidden if isinstance(hidden, tuple) else (hidden,)
                asked.append([s.shape for s in (input, *states)])
                assert all(s.dtype == input.dtype for s in states)
                super().check_forward_args(input, hidden, batch_sizes)

        return Checking

    answers = []
    for module in make_pair(cell, INPUT, HIDDEN, num_layers=LAYERS, batch_first=batch_first):
        module.__class__ = checking(type(module))
        asked = []
        module(zeros(T, B, INPUT)), module(zeros(T, INPUT))
        module(zeros(T, B, INPUT), states(module, batch=T if batch_first else B))
        if module.mode != "LSTM":
            module(packed())
        answers.append(asked)
    assert len(answers[0]) >= 3
    assert answers[0] == answers[1]


def test_a_subclass_checks_packed_input():
    class Strict(fusedrnn.LSTM):
        def check_forward_args(self, input, hidden, batch_sizes):
            raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"):
        Strict(INPUT, HIDDEN)(packed())


def test_the_error_of_a_hook_on_saved_tensors():
    """Is the user's, who sees it; the call is not made a second time."""
    packed = []

    def pack(tensor):
        packed.append(tensor)
        if len(packed) == 2:
            raise RuntimeError("disk full")
        return tensor

    layer = fusedrnn.GRU(INPUT, HIDDEN)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t)
    with hooks, pytest.raises(RuntimeError, match="disk full"):
        layer(zeros(T, B, INPUT))
    assert len(packed) == 2


@pytest.mark.parametrize(
    ("positional", "named", "message"),
    [
        (("LSTM",), {}, "expected keyword arguments only"),
        ((), {}, "missing argument 'mode'"),
        ((), {"mode": "LSTM", "dtype": "float32"}, "missing argument 'hidden_size'"),
        ((), {"mode": "LSTM", "dtype": "float32", "hidden_size": "5"}, "integer"),
        ((), {"mode": 5}, "argument"),
    ],
)
def test_functions_of_the_binary_take_named_arguments(positional, named, message):
    with pytest.raises(TypeError, match=message):
        fusedrnn._C.reserve_rows(*positional, **named)


def test_names_that_the_binary_does_not_know():
    config = {"hidden_size": 5, "proj_size": 0, "num_layers": 1, "bidirectional": False}
    config |= {"zoneout": False, "all_states": False, "layer_norm": False}
    assert fusedrnn._C.reserve_rows(mode="LSTM", dtype="float32", **config)
    with pytest.raises(RuntimeError, match="int8"):
        fusedrnn._C.reserve_rows(mode="LSTM", dtype="int8", **config)
    with pytest.raises(RuntimeError, match="LSTN"):
        fusedrnn._C.reserve_rows(mode="LSTN", dtype="float32", **config)
