"""Derivatives of the plain implementation in chunks of steps: values, and memory."""

import pytest
import torch
from torch import Tensor

import fusedrnn
from benchmarks.machine import peak_bytes
from fusedrnn import derivatives, recomputed, reference, tangents

T = recomputed.LEAST_STEPS + 3  # the last chunk is shorter


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """Second derivatives as on a device without kernels for them."""
    monkeypatch.setattr(tangents, "has_kernels", lambda call: False)


@pytest.fixture
def chunks(monkeypatch):
    """What the nodes of chunks were called with."""
    seen = []
    run = recomputed._run

    def counted(*arguments):
        seen.append(arguments)
        return run(*arguments)

    monkeypatch.setattr(recomputed, "_run", counted)
    return seen


def orders(layer, x, states, count, **kwargs) -> list[Tensor]:
    """The gradients of each order up to `count`, each of a form of those before."""
    leaves = [x.clone().requires_grad_(), *(s.clone().requires_grad_() for s in states)]
    hx = tuple(leaves[1:]) if len(states) > 1 else leaves[1]
    results = torch.utils._pytree.tree_leaves(layer(leaves[0], hx, **kwargs))
    inputs, found = [*leaves, *layer.parameters()], []
    for order in range(count):
        loss = sum(r.sin().sum() for r in results if r is not None and r.requires_grad)
        results = torch.autograd.grad(loss, inputs, create_graph=order + 1 < count)
        found += results
    return [g.detach() for g in found]


LAYERS = {
    "normed LSTM, lengths": (
        lambda: fusedrnn.LSTM(2, 3, layer_norm=True, recurrent_dropout=0.5),
        {"lengths": torch.tensor([T, 5])},
        2,
    ),
    "normed GRU, resets, all states": (
        lambda: fusedrnn.GRU(2, 3, 2, layer_norm=True, zoneout=0.3),
        {"resets": torch.arange(2 * T).view(T, 2) % 7 == 0, "return_all": True},
        2,
    ),
    "RNN, third derivatives": (lambda: fusedrnn.RNN(2, 3, bidirectional=True), {}, 3),
}


@pytest.mark.parametrize("name", LAYERS)
def test_values(name, chunks, monkeypatch):
    make, kwargs, count = LAYERS[name]
    torch.manual_seed(0)
    layer = make().double()
    directions = 2 if layer.bidirectional else 1
    states = torch.randn(2, layer.num_layers * directions, 2, 3, dtype=torch.float64)
    states = states[: 2 if layer.mode == "LSTM" else 1]
    x = torch.randn(T, 2, 2, dtype=torch.float64)

    def found():
        torch.manual_seed(1)  # of the masks
        return orders(layer, x, states, count, **kwargs)

    first = found()
    assert chunks
    monkeypatch.setattr(derivatives, "each_chunk", reference.each_step)
    for a, b in zip(first, found(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_second_gradients_in_a_batch():
    """is_grads_batched, whose tensors no node of chunks takes."""
    layer = fusedrnn.GRU(1, 2, layer_norm=True).double()
    x = torch.randn(T, 1, 1, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x)[0].sin().sum(), x, create_graph=True)
    forms = torch.eye(T, dtype=torch.float64).view(T, T, 1, 1)[:3]
    found = torch.autograd.grad(dx, x, forms, is_grads_batched=True, retain_graph=True)[0]
    each = [torch.autograd.grad(dx, x, f, retain_graph=True)[0] for f in forms]
    torch.testing.assert_close(found, torch.stack(each))


def test_memory_of_second_derivatives(monkeypatch):
    """Apart from arrays of one width of all steps it is that of a chunk."""
    layer = fusedrnn.GRU(4, 8, layer_norm=True)
    x = torch.randn(6 * recomputed.LEAST_STEPS, 2, 4)

    def penalty():
        leaf = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(layer(leaf)[0].sum(), leaf, create_graph=True)
        torch.autograd.grad(dx.square().sum(), list(layer.parameters()))

    in_chunks = peak_bytes(penalty, torch.device("cpu"))
    monkeypatch.setattr(derivatives, "each_chunk", reference.each_step)
    assert 3 * in_chunks < peak_bytes(penalty, torch.device("cpu"))
