"""Wrong calls: the same exception with the same words as torch.nn's, and the same warnings.

Each entry of the tables is called on torch.nn's module and on ours. Where the two may differ, EXCEPT
says why and what ours says.
"""

import re
import warnings

import pytest
import torch
from cases import CELLS, make_pair
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

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
    h = h or (layers, batch, width or module.proj_size or module.hidden_size)
    c = c or (layers, batch, width or module.hidden_size)
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
    "state of an unsorted: more rows": lambda m: m(unsorted(), states(m, batch=B + 1)),
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
    "state: a tuple": lambda m: m(zeros(T, B, INPUT), (states(m),)),
    "state: a list": lambda m: m(zeros(T, B, INPUT), [states(m)]),
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


@pytest.mark.parametrize(("cell", "name"), [(c, n) for c in CELLS for n in tables(c)])
def test_wrong_calls(cell, name):
    plain, fused = make_pair(cell, INPUT, HIDDEN, num_layers=LAYERS)
    theirs, ours = (outcome(tables(cell)[name], m) for m in (plain, fused))
    assert theirs[0] is not None, "torch.nn accepts this"
    assert ours == theirs
