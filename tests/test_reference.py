"""The plain PyTorch stack against torch.nn in float64."""

import pytest
import torch
from cases import CELLS, make_pair, random_state
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fusedrnn import masks, reference

T, B = 5, 4


def stack(cell, **kwargs):
    return make_pair(cell, 3, 4, dtype=torch.float64, **kwargs)


def run_reference(module, x, states=None, batch_sizes=None, lengths=None, mask=None, dropout=0.0):
    """reference.forward with the weights of one of our modules: y and the states."""
    hx, cx, *_ = (*(states or (None,)), None)
    arguments = (x, hx, cx, list(module.parameters()), batch_sizes, lengths, mask)
    results = reference.forward(*arguments, *[None] * 4, dropout, *module._config())
    y, hn, cn = results[:3]
    return y, (hn, cn) if module.mode == "LSTM" else hn


def assert_close(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(b, tuple):
            assert_close(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def hx_of(module, states):
    return states if states is None or module.mode == "LSTM" else states[0]


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_padded(cell, layers, bidirectional, bias, with_states):
    plain, fused = stack(cell, num_layers=layers, bidirectional=bidirectional, bias=bias)
    x = torch.randn(T, B, 3, dtype=torch.float64)
    states = random_state(plain, B) if with_states else None
    assert_close(run_reference(fused, x, states), plain(x, hx_of(plain, states)))


@pytest.mark.parametrize("cell", CELLS)
def test_gradients(cell):
    plain, fused = stack(cell, num_layers=2, bidirectional=True)
    x = torch.randn(T, B, 3, dtype=torch.float64)
    grads = []
    for module, call in ((plain, plain), (fused, lambda x: run_reference(fused, x))):
        leaf = x.clone().requires_grad_()
        call(leaf)[0].square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in module.parameters())])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "empty"),
        ([2, -1, 2**40, 1, 2], "positive and not rise"),  # torch's own code crashes on these
        ([1, 2], "positive and not rise"),
        ([3, 1], "add up to 4, not to 5"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_wrong_batch_sizes(sizes, message, device):
    _, fused = stack("gru")
    x = torch.randn(5, 3, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=message):
        run_reference(fused, x, batch_sizes=torch.tensor(sizes, dtype=torch.int64))


@pytest.mark.parametrize("with_states", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_packed(cell, bidirectional, with_states):
    plain, fused = stack(cell, num_layers=2, bidirectional=bidirectional)
    packed = pack_padded_sequence(torch.randn(T, B, 3, dtype=torch.float64), [5, 3, 3, 1])
    states = random_state(plain, B) if with_states else None
    theirs, state = plain(packed, hx_of(plain, states))
    assert_close(
        run_reference(fused, packed.data, states, packed.batch_sizes), (theirs.data, state)
    )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_lengths_are_packed_input_in_any_order(cell, bidirectional):
    plain, fused = stack(cell, num_layers=2, bidirectional=bidirectional)
    x, lengths = torch.randn(T, B, 3, dtype=torch.float64), torch.tensor([2, 5, 1, 4])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    states = random_state(plain, B)
    theirs, state = plain(packed, hx_of(plain, states))
    padded, _ = pad_packed_sequence(theirs)
    assert_close(run_reference(fused, x, states, lengths=lengths), (padded, state))


@pytest.mark.parametrize("cell", CELLS)
def test_length_0_keeps_the_state(cell):
    _, fused = stack(cell, num_layers=2, bidirectional=True)
    x, states = torch.randn(T, B, 3, dtype=torch.float64), random_state(fused, B)
    y, state = run_reference(fused, x, states, lengths=torch.zeros(B, dtype=torch.int64))
    assert not y.any()
    assert_close(state if fused.mode == "LSTM" else (state,), states)


@pytest.mark.parametrize("dropout", [0.3, 1.0])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_dropout(cell, packed, dropout):
    """With the masks that torch.nn draws."""
    plain, fused = stack(cell, num_layers=3, bidirectional=True, dropout=dropout)
    x, batch_sizes = torch.randn(T, B, 3, dtype=torch.float64), None
    if packed:
        x = pack_padded_sequence(x, [5, 3, 3, 1])
    torch.manual_seed(4)
    theirs, state = plain(x)
    if packed:
        theirs, x, batch_sizes = theirs.data, x.data, x.batch_sizes
    torch.manual_seed(4)
    mask = masks.between_layers(fused, x, fused._config())
    found = run_reference(fused, x, None, batch_sizes, None, mask, dropout)
    assert_close(found, (theirs, state))


@pytest.mark.parametrize("cell", CELLS)
def test_no_rows(cell):
    _, fused = stack(cell, num_layers=2)
    y, state = run_reference(fused, torch.zeros(T, 0, 3, dtype=torch.float64))
    hn = state[0] if fused.mode == "LSTM" else state
    assert y.shape == (T, 0, hn.shape[-1])
    assert hn.shape[:2] == (2, 0)
