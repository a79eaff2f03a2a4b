"""What changes the recurrence, in the CUDA kernels: the calls of test_recurrence.py, emulated."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import CELLS, DTYPES
from emulator.ops import instead_of_cpu
from test_cuda_ops import SEVERAL_BLOCKS, takes
from test_recurrence import CALLS, assert_near_float64

# By FUSEDRNN_PLAN. Layers run in a chain, but for the last.
BACKENDS = {
    "stepwise": DTYPES,
    **dict.fromkeys(("grid", *SEVERAL_BLOCKS, "cluster,layers=1"), DTYPES[1:]),
}


def pairs(backend: str, call: str) -> list[tuple[str, torch.dtype]]:
    """Cells and dtypes. relu's slope jumps: 16 bits take another side of it than 64."""
    if CALLS[call].layer_norm and backend != "stepwise":
        return []
    return [
        (cell, dtype)
        for cell, dtype in itertools.product(CELLS, BACKENDS[backend])
        if takes(backend, cell)
        and CALLS[call].takes(cell)
        and (cell != "relu" or dtype.itemsize > 2)
    ]


def some() -> list[tuple]:
    """Each call on each backend with one cell and dtype; with layer normalisation more."""
    found = []
    for (i, backend), (j, call) in itertools.product(enumerate(BACKENDS), enumerate(CALLS)):
        which = pairs(backend, call)
        at = [7 * i + 5 * j] if not CALLS[call].layer_norm else range(j, j + len(which), 5)
        found += [(backend, call, which[k % len(which)]) for k in at]
    return found


@pytest.fixture
def emulated(monkeypatch):
    """What is left unwritten becomes NaN."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True)
    with instead_of_cpu(seed=1):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("backend, call, pair", some())
def test_near_float64(backend, call, pair, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PLAN", backend)
    cell, dtype = pair
    assert_near_float64(cell, CALLS[call], dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("backend, call", [(b, c) for b in BACKENDS for c in CALLS if pairs(b, c)])
def test_every_cell_and_dtype(backend, call, monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PLAN", backend)
    for cell, dtype in pairs(backend, call):
        assert_near_float64(cell, CALLS[call], dtype)
