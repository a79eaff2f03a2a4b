"""Forward mode and second derivatives by the CUDA kernels, emulated: the tests of test_tangents.py
run here once more, with threads in random order and memory that starts as NaN.
"""

from __future__ import annotations

import pytest
import test_tangents
import torch
from emulator import ops as emulated
from emulator.ops import instead_of_cpu, load
from test_ops import INPUT, T
from test_tangents import (  # noqa: F401
    CALLS,
    CELLS,
    NORMED,
    arguments,
    by_kernels,
    filled,
    given,
    kernels_only,
    test_dual_numbers_run_in_kernels,
    test_ensembles,
    test_forward_over_forward,
    test_gradient_penalties_run_in_kernels,
    test_input_of_no_width,
    test_linearize_runs_in_kernels,
    test_one_of_stacked_weights,
    test_outputs_may_be_written_between_the_derivatives,
    test_stacked_weights,
    test_transforms_by_weights_run_in_kernels,
    test_transforms_run_in_kernels,
    test_wrong_arguments,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from fusedrnn import calls, cuda, tangents

pytestmark = pytest.mark.filterwarnings("ignore:.*jit.script.* is deprecated:DeprecationWarning")


SOME_NORMED = ["gru normed", "lstm-proj normed"]
EACH = [*CELLS, *(pytest.param(cell, marks=pytest.mark.slow) for cell in NORMED)]


@pytest.fixture(autouse=True)
def emulation(monkeypatch):
    monkeypatch.setenv("FUSEDRNN_PLAN", "stepwise")
    torch.use_deterministic_algorithms(True)
    with instead_of_cpu(seed=1):
        yield
    torch.use_deterministic_algorithms(False)


def call_kernels(cell, kind, dtype, changed):
    """Both ops once."""
    by_kernels(*given(arguments(cell, kind=kind, mask=True, dtype=dtype, changed=changed)))


def equal(found, expected):
    return all(
        torch.equal(a, b)
        for group, right in zip(found, expected, strict=True)
        for a, b in zip(group, right, strict=True)
        if a is not None
    )


def test_the_kernels_run_emulated():
    case = given(arguments("gru"))
    load().fail_after(0)
    with pytest.raises(RuntimeError, match="fusedrnn: .* failed with the plan 'stepwise'"):
        by_kernels(*case)
    load().fail_after(-1)


@pytest.mark.parametrize("cell", [*CELLS, *SOME_NORMED])
def test_neither_order_nor_what_lies_behind_a_length_changes_a_bit(cell):
    call = arguments(cell, kind="lengths", mask=True, changed=True)
    call, made, direction, u, du = given(call)
    expected = by_kernels(call, made, direction, u, du)
    behind = torch.arange(T)[:, None] >= call.tensors[4]
    x, dx = call.tensors[0].clone(), direction[0].clone()
    x[behind] = dx[behind] = float("nan")
    call = call._replace(tensors=(x, *call.tensors[1:]))
    load().seed(2)
    assert equal(by_kernels(call, made, (dx, *direction[1:]), u, du), expected)


@pytest.mark.parametrize("cell", ["gru", "lstm-proj"])
def test_rows_may_lie_apart(cell):
    call, made, direction, u, du = given(arguments(cell, kind="lengths"))
    expected = by_kernels(call, made, direction, u, du)
    x, dx = (t.repeat_interleave(2, 1)[:, ::2] for t in (call.tensors[0], direction[0]))
    call = call._replace(tensors=(x, *call.tensors[1:]))
    assert equal(by_kernels(call, made, (dx, *direction[1:]), u, du), expected)


@pytest.mark.parametrize("cell", [*CELLS, "lstm-proj normed"])
def test_products_read_only_what_was_written(cell, monkeypatch):
    """Rows without a step too, though nothing depends on what comes out for them."""
    monkeypatch.setattr(emulated, "products_are_finite", True)
    by_kernels(*given(arguments(cell, kind="lengths", dtype=torch.bfloat16)))
    assert emulated.products_are_finite


# What test_tangents.py runs with more cells.


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cell", EACH)
def test_values(cell, name):
    test_tangents.test_values(cell, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cell", [*CELLS, *SOME_NORMED])
def test_odd_sizes_in_each_dtype(cell, dtype):
    test_tangents.test_odd_sizes_in_each_dtype(cell, dtype)


@pytest.mark.parametrize("cell", [*CELLS, *SOME_NORMED])
def test_members(cell):
    test_tangents.test_members(cell)


@pytest.mark.parametrize(("cell", "all_states"), [("gru", True), ("lstm-proj", False)])
def test_opcheck(cell, all_states):
    test_tangents.test_opcheck(cell, all_states)


@pytest.mark.parametrize(
    ("cell", "changed"),
    [
        ("LSTM", {"proj_size": 2, "zoneout": (0.3, 0.4)}),
        ("LSTM", {"return_all": True, "proj_size": 2, "zoneout": (0.3, 0.4)}),
        ("GRU", {"return_all": True, "bidirectional": True}),
        ("RNN", {"return_all": True, "zoneout": 0.3}),
        ("LSTM", {"layer_norm": True, "bidirectional": True}),
    ],
)
def test_options_run_in_kernels(cell, changed, monkeypatch):
    test_tangents.test_options_run_in_kernels(cell, changed, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["rnn", "lstm"])
def test_gradients_of_the_tangents(cell):
    test_tangents.test_gradients_of_the_tangents(cell)


@pytest.mark.parametrize("steps, batch", [(0, 4), (3, 0)])
@pytest.mark.parametrize("cell", [*CELLS, "lstm normed"])
def test_nothing_to_do(cell, steps, batch):
    call = arguments(cell) | {"x": torch.randn(steps, batch, INPUT, dtype=torch.float64)}
    call["hx"] = call["hx"][:, :batch]
    call["cx"] = None if call["cx"] is None else call["cx"][:, :batch]
    call, made, direction, u, du = given(call)
    (dy, dhn, *_), (dx, dhx, _, *dweights) = by_kernels(call, made, direction, u, du)
    assert dy.shape[:2] == dx.shape[:2] == (steps, batch)
    assert torch.equal(dhn, direction[1])
    assert torch.equal(dhx, du[1] if batch else direction[1])
    assert not any(g.any() for g in dweights)


def test_which_calls_on_cuda_have_kernels(monkeypatch):
    with FakeTensorMode():
        call = arguments("gru")
        tensors = calls.Call.of(*call.values()).tensors
        on_cuda = tuple(None if t is None else torch.empty_like(t, device="cuda") for t in tensors)
        constants = calls.Call.of(*call.values()).constants
        monkeypatch.setattr(cuda, "missing", lambda device: None)
        assert tangents.has_kernels(calls.Call(on_cuda, constants))
        for option in ("all_states", "layer_norm"):
            changed = calls.Call.of(*(call | {option: True}).values()).constants
            assert tangents.has_kernels(calls.Call(on_cuda, changed))
        stacked = [torch.empty((1, *t.shape), device="cuda") for t in on_cuda[calls.FIRST_WEIGHT :]]
        given = calls.Call((*on_cuda[: calls.FIRST_WEIGHT], *stacked), constants)
        assert tangents.has_kernels(given)
        monkeypatch.setattr(cuda, "missing", lambda device: "some reason")
        assert not tangents.has_kernels(calls.Call(on_cuda, constants))
