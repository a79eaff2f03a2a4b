"""Threads that take one row together: the meeting itself, and that no bit depends on it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from cases import CELLS, DTYPES, make_pair, random_state, run
from compiling import ROOT, setup_script
from test_numbers import compare
from torch.nn.utils.rnn import pack_padded_sequence

import fusedrnn

SOURCES = [
    ROOT / "tests/team.cpp",
    *(ROOT / f"csrc/cpu/run/{n}.cpp" for n in ("team", "taken_core")),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("team") / "team"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", "-pthread", f"-I{ROOT / 'csrc'}"]
    compiler, *words = setup_script().find_cxx()
    subprocess.run([compiler, *words, *flags, *SOURCES, "-o", path], check=True)
    return path


@pytest.mark.parametrize("what", ["all", "some", "serial", "absent", "late", "grouped"])
def test_meeting(program, what):
    """Under ThreadSanitizer; each returns 0 if every member saw what the others had written."""
    subprocess.run([program, what], check=True, timeout=120)


@pytest.mark.parametrize("what", ["taken", "long shares", "short wait"])
def test_a_core_that_is_taken(program, what):
    """A thread works alone for a while after a wait as long as a turn of the scheduler."""
    subprocess.run([program, what], check=True, timeout=120)


def test_the_sanitizer_sees_a_missing_meeting(program):
    found = subprocess.run([program, "bug"], capture_output=True, text=True, timeout=120)
    assert found.returncode and "data race" in found.stderr


def with_threads(counts, f):
    """f() with each number of threads."""
    before = torch.get_num_threads()
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            yield f()
    finally:
        torch.set_num_threads(before)


def assert_same_bits(runs):
    first, *others = runs
    assert others
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("batch", "steps", "hidden"), [(1, 70, 257), (2, 9, 130), (1, 1, 33)])
def test_same_bits_as_alone(cell, dtype, batch, steps, hidden):
    """Also where a team has more members than there are units to divide."""
    _, fused = make_pair(cell, 75, hidden, num_layers=2, bidirectional=True, dtype=dtype)
    x = torch.randn(steps, batch, 75).to(dtype)
    states = random_state(fused, batch)
    assert_same_bits(list(with_threads((1, 2, 3, 5, 9), lambda: run(fused, x, states))))


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_same_bits_with_everything_on(cell):
    """Dropout of both kinds, zoneout, lengths, all states, integers; resets keep threads apart."""
    more = {"recurrent_dropout": 0.3, "zoneout": 0.2, "dropout": 0.4}
    module = getattr(fusedrnn, cell)(80, 150, 2, bidirectional=True, **more)
    tokens = torch.randint(80, (40, 2))
    given = {"lengths": torch.tensor([40, 17]), "return_all": True}
    resets = torch.rand(40, 2) < 0.1

    def call():
        torch.manual_seed(3)
        found = {}
        for name, kwargs in {"teams": given, "resets": {**given, "resets": resets}}.items():
            y, _, states = module(tokens, **kwargs)
            grads = torch.autograd.grad(y.square().sum(), list(module.parameters()))
            found |= {f"{name} {i}": t for i, t in enumerate((y, *states.h, *grads))}
        return found

    assert_same_bits(list(with_threads((1, 2, 4, 7), call)))


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_same_bits_of_packed_rows(cell):
    _, fused = make_pair(cell, 20, 140)
    x = pack_padded_sequence(torch.randn(12, 3, 20), torch.tensor([5, 12, 1]), enforce_sorted=False)
    assert_same_bits(
        list(with_threads((1, 3, 6, 8), lambda: run(fused, x, random_state(fused, 3))))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("cell", "hidden"), [("rnn", 1100), ("gru", 600), ("lstm", 550)])
def test_rows_together_because_of_large_weights(cell, hidden, dtype):
    """As right as alone, and the same bits; rows that end early rest meanwhile."""
    _, fused = make_pair(cell, 20, hidden, num_layers=2, dtype=dtype)
    lengths = torch.tensor([4, 1, 6, 3, 2, 6])
    x = pack_padded_sequence(torch.randn(6, 6, 20).to(dtype), lengths, enforce_sorted=False)
    (plans,) = with_threads((2,), lambda: fusedrnn.explain(fused, x))
    assert "by 2 threads that divide the hidden units" in plans.splitlines()[1], plans
    states = random_state(fused, 6)
    assert_same_bits(list(with_threads((1, 2, 3, 4), lambda: run(fused, x, states))))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(
    ("steps", "batch"), [(1, 1), (2, 2), pytest.param(1, 4, marks=pytest.mark.slow)]
)
def test_few_tokens(cell, dtype, steps, batch):
    """Calls in a row go up and down through weights as they lie, and threads divide them."""
    plain, fused = make_pair(cell, 200, 290, num_layers=3, bidirectional=True, dtype=dtype)
    x, states = torch.randn(steps, batch, 200).to(dtype), random_state(fused, batch)
    compare(plain, fused, x, states)
    lengths, hx = torch.arange(batch) % (steps + 1), states if fused.mode == "LSTM" else states[0]

    def calls():
        with torch.no_grad():
            short = fused(x, hx, lengths=lengths)[0]
        return run(fused, x, states) | {"with lengths": short}

    assert_same_bits(list(with_threads((1, 1, 1, 2, 2, 3, 5), calls)))
