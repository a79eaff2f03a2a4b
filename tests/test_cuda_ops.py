"""The ops' CUDA side, run on CPU tensors with every launch emulated: numbers, buffers, checks.

The same sources, called by the same modules and autograd; only the launches and the GPU's own ATen
are played. What a GPU alone can tell is in test_gpu.py.
"""

from __future__ import annotations

import pytest
import test_numbers
import test_ops
import torch
from cases import CELLS, DTYPES, make_pair, random_state
from emulator.ops import instead_of_cpu, load
from torch.nn.utils.rnn import pack_padded_sequence

from fusedrnn import ops

BACKENDS = ["stepwise"]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PLAN", request.param)
    with instead_of_cpu(seed=1):
        yield request.param


@pytest.fixture
def filled():
    """Every buffer starts as NaN, those inside the op too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# T, B, input_size, hidden_size, layers, bidirectional, bias, batch_first, states
SHAPES = [
    (1, 1, 1, 1, 1, False, True, False, True),
    (5, 3, 4, 5, 2, True, True, True, False),
    (4, 33, 1, 7, 1, True, False, False, True),
    (3, 2, 3, 33, 3, False, True, False, True),
    (2, 5, 33, 257, 1, False, False, True, False),
]


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s[:5])))
@pytest.mark.parametrize("cell", CELLS)
def test_matches_torch(cell, shape, dtype):
    T, B, inputs, hidden, layers, bidirectional, bias, batch_first, states = shape
    plain, fused = make_pair(
        cell, inputs, hidden, num_layers=layers, bidirectional=bidirectional, bias=bias,
        batch_first=batch_first, dtype=dtype,
    )  # fmt: skip
    x = torch.randn(*(B, T) if batch_first else (T, B), inputs).to(dtype)
    test_numbers.compare(plain, fused, x, random_state(plain, B) if states else None)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("states", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_packed(cell, states, dtype):
    plain, fused = make_pair(cell, 3, 5, num_layers=2, bidirectional=True, dtype=dtype)
    lengths = torch.tensor([2, 5, 1, 5, 3])
    packed = pack_padded_sequence(torch.randn(5, 5, 3).to(dtype), lengths, enforce_sorted=False)
    test_numbers.compare(plain, fused, packed, random_state(plain, 5) if states else None)


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("kind", test_ops.KINDS)
@pytest.mark.parametrize("cell", CELLS)
def test_computes_what_is_asked_for(cell, kind):
    """Each gradient alone has the bits that it has among all."""
    full = test_ops.backward_arguments(cell=cell, kind=kind, mask=True)
    dx, dhx, dcx, dweights = load().backward(*full.values())
    complete = [dx, dhx, dcx, *dweights]
    for i in range(test_ops.KINDS.index(kind), len(complete), 3):  # each at one of the kinds
        needs = [j == i and asked for j, asked in enumerate(full["needs"])]
        dx, dhx, dcx, dweights = load().backward(*(full | {"needs": needs}).values())
        for j, grad in enumerate([dx, dhx, dcx, *dweights]):
            assert torch.equal(grad, complete[j]) if needs[j] else grad.numel() == 0


@pytest.mark.usefixtures("filled")
@pytest.mark.parametrize("call", test_ops.CALLS)
@pytest.mark.parametrize("cell", CELLS)
def test_shapes_are_those_of_the_fakes(cell, call):
    variation = test_ops.CALLS[call]
    forward = tuple(test_ops.arguments(cell, **variation).values())
    backward = tuple(test_ops.backward_arguments(cell=cell, **variation).values())
    for op, arguments in ((ops.forward, forward), (ops.backward, backward)):
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
