"""FlopCounterMode counts our ops as it counts torch.nn's."""

from __future__ import annotations

import pytest
import torch
from cases import CELLS, make_pair, random_state
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import fusedrnn


def count(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("x_needed", [False, True], ids=["", "dx"])
@pytest.mark.parametrize("state", [False, True], ids=["", "hx"])
@pytest.mark.parametrize("kwargs", [{}, {"bidirectional": True}, {"bias": False}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_counts_are_torch_nns(cell, kwargs, state, x_needed):
    plain, fused = make_pair(cell, 3, 5, num_layers=2, dtype=torch.float64, **kwargs)
    x = torch.randn(7, 4, 3, dtype=torch.float64, requires_grad=x_needed)
    states = tuple(s.requires_grad_() for s in random_state(plain, 4))
    hx = None if not state else states if plain.mode == "LSTM" else states[0]
    with torch.no_grad():
        forward = count(lambda: fused(x, hx))
        assert forward == count(lambda: plain(x, hx)) > 0
    assert count(lambda: fused(x, hx)) == forward
    both, expected = (count(lambda m=m: m(x, hx)[0].sum().backward()) for m in (fused, plain))
    assert both == expected > 2 * forward


def test_frozen_layers_are_skipped():
    fused = fusedrnn.GRU(3, 5, num_layers=3)
    x = torch.randn(7, 4, 3)
    for name, parameter in fused.named_parameters():
        parameter.requires_grad_(name.endswith("_l2"))
    forward = count(lambda: fused(x))
    last = 2 * 7 * 4 * 2 * 15 * 5
    # W_ih, W_hh and h of the last layer, whose initial state needs no gradient.
    assert count(lambda: fused(x)[0].sum().backward()) == forward + last + 2 * 6 * 4 * 15 * 5


def test_packed_and_integer_input():
    fused = fusedrnn.LSTM(6, 5, proj_size=2)
    x = torch.randn(7, 3, 6)
    packed = pack_padded_sequence(x, torch.tensor([7, 2, 1]))
    per_token = 2 * (20 * 6 + 20 * 2 + 5 * 2)
    assert count(lambda: fused(packed)) == 10 * per_token
    assert count(lambda: fused(x)) == 21 * per_token
    assert count(lambda: fused(torch.randint(6, (7, 3)))) == 21 * (per_token - 2 * 20 * 6)


def test_a_model_is_counted_by_module():
    model = nn.Sequential(nn.Linear(4, 4), fusedrnn.swap(nn.Sequential(nn.GRU(4, 4))).model)
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(3, 2, 4))
    assert "fusedrnn.infer" in str(counter.get_flop_counts()["Sequential"])


@pytest.mark.parametrize("cell", ["gru", "lstm-proj"])
def test_quantized_layers_count_the_same(cell):
    _, fused = make_pair(cell, 3, 5, num_layers=2, bidirectional=True)
    tokens, x = torch.randint(3, (7, 4)), torch.randn(7, 4, 3)
    with torch.no_grad():
        expected = [count(lambda given=given: fused(given)) for given in (x, tokens)]
    layer = fusedrnn.quantize(fused.eval()).model
    assert [count(lambda given=given: layer(given)) for given in (x, tokens)] == expected
