"""The gradient of a weight whose input is integers: sums of rows by value, on the emulated GPU."""

from __future__ import annotations

import bindings
import pytest
import torch
from emulator import run
from torch import Tensor


def launch(rows: Tensor, values: Tensor, width: int, mode: str = "plain", seed: int = -1) -> Tensor:
    compute = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out = torch.full((width, rows.shape[1]), float("nan"), dtype=compute)
    params = bindings.RowSums(
        dtype=bindings.DType[str(rows.dtype).removeprefix("torch.")],
        tokens=len(values),
        width=width,
        columns=rows.shape[1],
        stride=rows.stride(0),
    )
    arrays = {"values": values, "rows": rows, "out": out}
    run("planned_sum_rows", params, arrays, mode, seed).check()
    return out


def expected(rows: Tensor, values: Tensor, width: int) -> Tensor:
    known = (values >= 0) & (values < width)
    sums = torch.zeros(width, rows.shape[1], dtype=torch.float64)
    return sums.index_add_(0, values[known], rows[known].double())


def whole(tokens: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Small whole numbers, whose sums are exact in any order; rows that lie apart."""
    return torch.randint(-100, 100, (tokens, columns + 3)).to(dtype)[:, 1 : columns + 1]


# tokens, values, columns: one digit, two and three; one block that sorts and several; tokens whose
# run has several pieces.
SIZES = [(1, 1, 1), (5, 33, 257), (33, 255, 5), (257, 5, 33), (1120, 28, 130), (257, 256, 1)]
SIZES += [(2500, 7, 3), (2500, 70000, 5), (70001, 100, 1)]


@pytest.mark.parametrize("tokens, width, columns", SIZES)
def test_sums(tokens, width, columns):
    rows, values = whole(tokens, columns), torch.randint(0, width, (tokens,))
    exact = expected(rows, values, width)
    for seed in (-1, 1):
        assert torch.equal(launch(rows, values, width, seed=seed).double(), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    rows, values = whole(257, 33, dtype), torch.randint(0, 33, (257,))
    assert torch.equal(launch(rows, values, 33).double(), expected(rows, values, 33))


@pytest.mark.parametrize("width", [1, 5, 257])
def test_integers_that_are_no_values_are_left_out(width):
    wrong = torch.tensor([-1, width, -(2**40), 2**40, 256, -256])
    values = torch.cat([torch.randint(0, width, (257,)), wrong[(wrong < 0) | (wrong >= width)]])
    values = values[torch.randperm(len(values))]
    rows = whole(len(values), 5)
    assert torch.equal(launch(rows, values, width).double(), expected(rows, values, width))
    wrong = torch.full((65,), width)
    assert not launch(whole(65, 5), wrong, width).any()


@pytest.mark.parametrize("tokens, values", [(20001, [1]), (1057, [0, 2]), (96, [0, 1, 2])])
def test_values_that_fill_many_chunks(tokens, values):
    """Runs of each value that end within a chunk, and at its end."""
    each = torch.tensor(values).repeat_interleave(-(-tokens // len(values)))[:tokens]
    rows = whole(tokens, 3)
    assert torch.equal(launch(rows, each, 3).double(), expected(rows, each, 3))


def test_tokens_of_a_value_are_added_in_the_order_of_time():
    """The same bits in any order of threads, and those of compensated sums in order."""
    rows = torch.rand(300, 5) * 10.0 ** torch.randint(-3, 3, (300, 5))
    values = torch.arange(300) % 20
    found = launch(rows, values, 20)
    for seed in (1, 2):
        assert torch.equal(launch(rows, values, 20, seed=seed), found)
    torch.testing.assert_close(found.double(), expected(rows, values, 20), rtol=2e-7, atol=0)
    # A large number comes and goes: what is added between is lost, or not.
    column = torch.zeros(300, 1)
    column[[20, 120, 220], 0] = torch.tensor([1e10, 1.0, -1e10])
    assert launch(column, values, 20)[0] == 0
    column[[20, 120, 220], 0] = torch.tensor([1e10, -1e10, 1.0])
    assert launch(column, values, 20)[0] == 1


@pytest.mark.parametrize("mode", ["address", "thread"])
def test_memory_and_races(mode):
    for tokens, width in ((257, 5), (600, 300)):
        rows, values = whole(tokens, 5), torch.randint(-1, width + 1, (tokens,))
        found = launch(rows, values, width, mode, seed=1)
        assert torch.equal(found.double(), expected(rows, values, width))
