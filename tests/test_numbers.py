"""Outputs, states and all gradients against float64, by the rule in tolerances.py."""

from __future__ import annotations

import contextlib
import copy
import itertools
import statistics
from collections.abc import Callable

import pytest
import torch
from cases import CELLS, DTYPES, make_pair, random_state, run
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import FACTOR, MANY, assert_as_exact_as_torch, largest
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fusedrnn

# T, B, input_size, hidden_size
SIZES = [(1, 1, 1, 1), (5, 3, 4, 5), (7, 33, 1, 33), (3, 5, 33, 257)]


def widen(x):
    return x._replace(data=x.data.double()) if isinstance(x, PackedSequence) else x.double()


def compare(plain, fused, x, states, **kwargs) -> None:
    exact_module = copy.deepcopy(plain).double()
    exact_states = states and tuple(s.double() for s in states)
    exact = run(exact_module, widen(x), exact_states, **kwargs)
    eps = torch.finfo(plain.weight_ih_l0.dtype).eps
    # Layer normalisation magnifies rounding where a variance is small, in float64 too.
    normed = getattr(plain, "layer_norm", False)
    noise = []
    for _ in range(3 if eps > 1e-10 or normed else 0):

        def moved(t):
            return t * (1 + eps * (2 * torch.rand_like(t) - 1))

        module = copy.deepcopy(exact_module)
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(moved(p))
        wide = widen(x)
        packed = isinstance(x, PackedSequence)
        near = wide._replace(data=moved(wide.data)) if packed else moved(wide)
        near_states = exact_states and tuple(moved(s) for s in exact_states)
        noise.append(run(module, near, near_states, **kwargs))
    ours, theirs = run(fused, x, states, **kwargs), run(plain, x, states, **kwargs)
    # A small variance is as much luck as a jump. And of one token a large weight's gradient has no
    # more independent errors than there are units.
    jumps = plain.mode == "RNN_RELU" or normed
    few = exact["output"].numel() < MANY
    assert_as_exact_as_torch(ours, theirs, exact, noise, luck=jumps or few)


@pytest.mark.parametrize("half", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("cell", CELLS)
def test_matches_torch(cell, sizes, dtype, half):
    """Each half of the options has every pair of values of two of them."""
    T, B, input_size, hidden_size = sizes
    grid = itertools.product([1, 2, 3], [False, True], [True, False], [False, True])
    for layers, bidirectional, bias, batch_first in grid:
        if (layers + bidirectional + bias + batch_first) % 2 != half:
            continue
        plain, fused = make_pair(
            cell,
            input_size,
            hidden_size,
            num_layers=layers,
            bidirectional=bidirectional,
            bias=bias,
            batch_first=batch_first,
            dtype=dtype,
        )
        shape = (B, T, input_size) if batch_first else (T, B, input_size)
        x = torch.randn(shape, dtype=torch.float32).to(dtype)
        # States every other time, so that the default zeros are seen as often.
        states = random_state(plain, B) if (layers + bias) % 2 else None
        compare(plain, fused, x, states)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_few_rows_of_large_weights(cell, dtype):
    """Weights that no L2 holds, read unpacked: in other orders than small ones."""
    for T, B in ((1, 1), (3, 1), (1, 5)):
        plain, fused = make_pair(cell, 517, 1030, dtype=dtype)
        x = torch.randn(T, B, 517).to(dtype)
        compare(plain, fused, x, random_state(plain, B))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_small_tensors_on_average(cell, dtype):
    """Of one small tensor luck decides how near torch.nn comes; of many cases it does not."""
    ours, theirs = {}, {}
    for seed in range(60):
        plain, fused = make_pair(cell, 3, 4, seed=seed, num_layers=2, dtype=dtype)
        x = torch.randn(6, 2, 3).to(dtype)
        states = random_state(plain, 2, seed)
        wide = tuple(s.double() for s in states)
        exact = run(copy.deepcopy(plain).double(), x.double(), wide)
        for errors, module in ((ours, fused), (theirs, plain)):
            for name, value in run(module, x, states).items():
                scale = largest(exact[name]) or 1.0
                errors.setdefault(name, []).append(largest(value.double() - exact[name]) / scale)
    for name, errors in ours.items():
        assert statistics.median(errors) <= FACTOR * statistics.median(theirs[name]), name


def one_of_three(attempt: Callable[[int], None]) -> None:
    """`attempt` with up to three seeds.

    Hypothesis hunts for the draw in which torch.nn is luckiest; a fault fails every draw.
    """
    for seed in (0, 1):
        with contextlib.suppress(AssertionError):
            return attempt(seed)
    return attempt(2)


@settings(max_examples=40)
@given(
    cell=st.sampled_from(list(CELLS)),
    T=st.integers(1, 40),
    B=st.integers(1, 40),
    input_size=st.integers(1, 70),
    hidden_size=st.integers(1, 70),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    bias=st.booleans(),
    threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(
    cell, T, B, input_size, hidden_size, layers, bidirectional, bias, threads, dtype
):
    def attempt(seed):
        plain, fused = make_pair(
            cell,
            input_size,
            hidden_size,
            seed=seed,
            num_layers=layers,
            bidirectional=bidirectional,
            bias=bias,
            dtype=dtype,
        )
        x = torch.randn(T, B, input_size).to(dtype)
        compare(plain, fused, x, random_state(plain, B, seed))

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        one_of_three(attempt)
    finally:
        torch.set_num_threads(before)


@given(
    cell=st.sampled_from(list(CELLS)),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=20),
    enforce_sorted=st.booleans(),
    layers=st.integers(1, 3),
    bidirectional=st.booleans(),
    with_states=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_packed(cell, lengths, enforce_sorted, layers, bidirectional, with_states, dtype):
    if enforce_sorted:
        lengths = sorted(lengths, reverse=True)

    def attempt(seed):
        plain, fused = make_pair(
            cell, 6, 9, seed=seed, num_layers=layers, bidirectional=bidirectional, dtype=dtype
        )
        x = torch.randn(max(lengths), len(lengths), 6).to(dtype)
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=enforce_sorted)
        states = random_state(plain, len(lengths), seed) if with_states else None
        compare(plain, fused, packed, states)

    one_of_three(attempt)


@given(
    cell=st.sampled_from(list(CELLS)),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12),
    extra=st.integers(0, 3),
    layers=st.integers(1, 2),
    bidirectional=st.booleans(),
    batch_first=st.booleans(),
)
def test_lengths_equal_each_row_alone(cell, lengths, extra, layers, bidirectional, batch_first):
    """Rows of padded input with `lengths` give what each gives alone, and zeros behind."""
    steps = max(max(lengths) + extra, 1)
    plain, fused = make_pair(
        cell, 3, 5, num_layers=layers, bidirectional=bidirectional, dtype=torch.float64
    )
    fused.batch_first = batch_first
    x = torch.randn(steps, len(lengths), 3, dtype=torch.float64)
    for b, n in enumerate(lengths):
        x[n:, b] = float("nan")  # what lies behind a length is never read
    states = random_state(plain, len(lengths))
    lstm = isinstance(plain, torch.nn.LSTM)
    hx = states if lstm else states[0]
    given_x = (x.transpose(0, 1) if batch_first else x).clone().requires_grad_()
    y, state = fused(given_x, hx, lengths=torch.tensor(lengths))
    y.sum().backward()
    grad, y = given_x.grad, y.detach()
    if batch_first:
        grad, y = grad.transpose(0, 1), y.transpose(0, 1)
    state = state if lstm else (state,)
    expected = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for b, n in enumerate(lengths):
        assert torch.equal(y[n:, b], torch.zeros_like(y[n:, b]))
        assert torch.equal(grad[n:, b], torch.zeros_like(grad[n:, b]))
        if n == 0:
            for s, s0 in zip(state, states, strict=True):
                assert torch.equal(s[:, b], s0[:, b])
            continue
        row = x[:n, b].clone().requires_grad_()
        own = tuple(s[:, b].contiguous() for s in states)
        y_row, state_row = plain(row, own if lstm else own[0])
        torch.testing.assert_close(y[:n, b], y_row, rtol=1e-11, atol=1e-12)
        for s, r in zip(state, state_row if lstm else (state_row,), strict=True):
            torch.testing.assert_close(s[:, b], r, rtol=1e-11, atol=1e-12)
        plain.zero_grad()
        y_row.sum().backward()
        torch.testing.assert_close(grad[:n, b], row.grad, rtol=1e-10, atol=1e-11)
        for name, p in plain.named_parameters():
            expected[name] += p.grad
    for name, p in fused.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-10, atol=1e-11, msg=name)


@pytest.mark.parametrize("dropout", [0.3, 1.0])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_dropout_draws_torchs_masks(cell, batch_first, dropout):
    plain, fused = make_pair(
        cell,
        4,
        7,
        num_layers=3,
        bidirectional=True,
        dropout=dropout,
        batch_first=batch_first,
        dtype=torch.float64,
    )
    padded = torch.randn(5, 5, 4, dtype=torch.float64)
    lengths = torch.tensor([5, 2, 5, 1, 3])
    packed = pack_padded_sequence(padded, lengths, batch_first, enforce_sorted=False)
    for x in (padded, packed):
        for module in (plain, fused):
            module.train()
        torch.manual_seed(5)
        theirs = run(plain, x, None)
        state = torch.get_rng_state()
        torch.manual_seed(5)
        ours = run(fused, x, None)
        assert torch.equal(torch.get_rng_state(), state)
        assert_as_exact_as_torch(ours, theirs, theirs)
        for module in (plain, fused):
            module.eval()
        theirs = run(plain, x, None)
        assert_as_exact_as_torch(run(fused, x, None), theirs, theirs)


@pytest.mark.parametrize("cell", ["rnn", "gru"])
def test_long_sums(cell):
    """Of one row torch.nn's products have many short sums, which round less than one long one."""
    plain, fused = make_pair(cell, 1500, 2000)
    compare(plain, fused, torch.randn(10, 1, 1500), None)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_for_any_number_of_threads(cell, dtype, monkeypatch):
    _, fused = make_pair(cell, 19, 37, num_layers=2, bidirectional=True, dtype=dtype)
    x = torch.randn(9, 13, 19).to(dtype)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 2, 3, 5, 1):
            torch.set_num_threads(threads)
            runs.append(run(fused, x, random_state(fused, 13)))
        monkeypatch.delenv("FUSEDRNN_THREADS")  # as many as the work is worth
        torch.set_num_threads(5)
        runs.append(run(fused, x, random_state(fused, 13)))
    finally:
        torch.set_num_threads(before)
    for other in runs[1:]:
        for name, value in runs[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("cell", CELLS)
def test_inference_gives_the_training_output(cell):
    """Without a reserve other buffers are used: the numbers are the same bits."""
    _, fused = make_pair(cell, 5, 12, num_layers=4, bidirectional=True)
    x = torch.randn(8, 6, 5)
    y, _ = fused(x)
    with torch.no_grad():
        again, _ = fused(x)
    assert torch.equal(y, again)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_and_infinity_pass(cell):
    plain, fused = make_pair(cell, 3, 4)
    for poison in (float("nan"), float("inf"), -float("inf")):
        x = torch.randn(5, 2, 3)
        x[2, 1, 0] = poison
        with torch.no_grad():
            theirs, ours = plain(x)[0], fused(x)[0]
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        assert torch.isfinite(ours[:, 0]).all()


def test_strided_input():
    plain, fused = make_pair("gru", 4, 6)
    base = torch.randn(3, 10, 9, 8)
    compare(plain, fused, base[1, ::2, 1:8, 2:6], None)
    compare(plain, fused, base[:, :, 0, ::2].transpose(0, 1), None)
    compare(plain, fused, base[0, :, :1, :4].expand(-1, 5, -1), None)


def test_outputs_are_fully_written():
    """Freed memory is full of NaN, so a gap in any output or gradient would show."""
    plain, fused = make_pair("lstm", 33, 37, num_layers=2, bidirectional=True)
    x = torch.randn(9, 7, 33)
    for _ in range(3):
        sizes = (10, 1_000, 30_000, 300_000)
        poison = [torch.full((n,), float("nan")) for n in sizes for _ in range(8)]
        del poison
        results = run(fused, x, random_state(fused, 7))
        assert all(torch.isfinite(r).all() for r in results.values())
    compare(plain, fused, x, None)


def test_module_is_exported():
    assert {"RNN", "GRU", "LSTM"} <= set(fusedrnn.__all__)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_open_gates(cell, dtype):
    """A gate near 1 multiplies a state at every step: an error of its own would add up."""
    plain, fused = make_pair(cell, 8, 16, dtype=dtype)
    with torch.no_grad():
        for module in (plain, fused):
            for p in module.parameters():
                p.mul_(0.2)
            module.bias_ih_l0[16:32] = 10  # the update gate, the forget gate
    x = torch.randn(1000, 32, 8).to(dtype)
    exact_module = copy.deepcopy(plain).double()
    with torch.no_grad():
        _, exact = exact_module(x.double())
        (_, theirs), (_, ours) = plain(x), fused(x)
    named = [dict(enumerate(s if cell == "lstm" else [s])) for s in (ours, theirs, exact)]
    assert_as_exact_as_torch(*named)


def compare_on_two_threads(plain, fused, x):
    """As exact as torch.nn, and the same bits on two threads as on one."""
    compare(plain, fused, x, random_state(plain, x.shape[1]))
    one, _ = fused(x)
    torch.set_num_threads(2)
    two, _ = fused(x)
    torch.set_num_threads(1)
    assert torch.equal(two, one)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", CELLS)
def test_few_rows(cell, dtype):
    """In forward their W_hh is not packed; the bits are those of any number of threads."""
    plain, fused = make_pair(cell, 33, 269, num_layers=2, bidirectional=True, dtype=dtype)
    for T, B in ((12, 1), (9, 2), (10, 3), (8, 4), (32, 1)):
        compare_on_two_threads(plain, fused, torch.randn(T, B, 33).to(dtype))
    x = torch.randn(10, 3, 33).to(dtype)
    packed = pack_padded_sequence(x, torch.tensor([2, 10, 5]), enforce_sorted=False)
    compare(plain, fused, packed, None)


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("kind", ["padded", "lengths", "resets", "integers"])
def test_few_rows_are_those_of_a_larger_batch(kind, projected):
    """With all that only we have: W_hh of three rows is not packed, of seven it is."""
    fused = fusedrnn.LSTM(
        30,
        200,
        num_layers=2,
        bidirectional=True,
        zoneout=(0.1, 0.2),
        proj_size=150 if projected else 0,
        dtype=torch.float64,
    ).eval()
    x = torch.randint(30, (10, 7)) if kind == "integers" else torch.randn(10, 7, 30).double()
    call = {
        "lengths": {"lengths": torch.tensor([10, 3, 7, 10, 1, 0, 5])},
        "resets": {"resets": torch.rand(10, 7) < 0.3},
    }.get(kind, {})
    states = random_state(fused, 7)
    y, (h, c) = fused(x, states, **call)
    few = {name: t[:3] if name == "lengths" else t[:, :3] for name, t in call.items()}
    again = fused(x[:, :3], tuple(s[:, :3].contiguous() for s in states), **few)
    for ours, theirs in zip((again[0], *again[1]), (y, h, c), strict=True):
        torch.testing.assert_close(ours, theirs[:, :3], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_few_tokens(cell, dtype):
    """Their weights are not packed; the bits are those of any number of threads."""
    plain, fused = make_pair(cell, 33, 257, num_layers=2, dtype=dtype)
    for T, B in ((1, 1), (1, 2), (2, 3), (1, 8), (1, 13), (3, 5), (1, 16), (3, 16), (8, 2), (2, 2)):
        x = torch.randn(T, B, 33).to(dtype)
        compare_on_two_threads(plain, fused, x)
    # The last are as many tokens as bfloat16 is not packed for.
    for lengths in ([1, 2], [2, 0]):
        y, _ = fused(x, lengths=torch.tensor(lengths))
        for b, n in enumerate(lengths):
            assert (y[n:, b] == 0).all()
            if n:
                alone, _ = fused(x[:n, b : b + 1])
                # A row alone is summed in another order where weights are read row by row.
                streams = "row by row" in fusedrnn.explain(fused, x[:n, b : b + 1])
                few = 4 * torch.finfo(dtype).eps if streams else 0
                torch.testing.assert_close(y[:n, b : b + 1], alone, rtol=few, atol=few)
