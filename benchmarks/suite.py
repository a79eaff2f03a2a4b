"""Rows of the result: a case in one mode, dtype and number of threads, checked and then timed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from benchmarks import check, measure
from benchmarks.cases import Case
from benchmarks.measure import Budget, Summary
from benchmarks.peers import PEERS, Peer

MODES = ("training", "inference")


@dataclass(frozen=True)
class Result:
    """One peer's part of a row; all but ``peer`` is None where ``problem`` says why."""

    peer: str
    problem: str | None = None
    seconds: Summary | None = None
    tokens_per_second: float | None = None
    speedup: Summary | None = None  # over the first peer
    matmul_fraction: float | None = None  # of the rate of a large matrix product


@dataclass(frozen=True)
class Row:
    case: str
    shape: str
    mode: str
    dtype: str
    threads: int
    device: str
    matmul_flops: float  # a second
    noise: Summary  # the first peer against itself
    results: list[Result]


def rows(
    cases: Sequence[Case],
    modes: Sequence[str],
    dtypes: Sequence[torch.dtype],
    threads: Sequence[int],
    device: torch.device,
    budget: Budget,
    peers: Sequence[Peer] = PEERS,
) -> Iterator[Row]:
    """Measures every combination, one by one as they are asked for."""
    for case in cases:
        for dtype in dtypes:
            for mode in modes:
                # One thread: here time does not count, and no busy core can hold it up.
                with _threads(1):
                    expected = check.expect(case, mode == "training", dtype, device)
                for number in threads:
                    with _threads(number):
                        yield _row(case, mode, dtype, device, expected, budget, peers)


def _row(
    case: Case,
    mode: str,
    dtype: torch.dtype,
    device: torch.device,
    expected: check.Expected,
    budget: Budget,
    peers: Sequence[Peer],
) -> Row:
    layer, data = case.module(dtype).to(device), case.data(dtype, device)
    training = mode == "training"

    def unit(peer: Peer) -> measure.Unit:
        return measure.Unit(peer.build(layer), data, training, case.input_grad)

    units: dict[str, measure.Unit] = {}
    problems: dict[str, str] = {}
    for peer in peers:
        try:
            made = unit(peer)
            wrong = None if peer is peers[0] else check.problem(made.results(), expected)
        except RuntimeError as error:  # what torch's ops raise
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        if wrong is None:
            units[peer.name] = made
        else:
            problems[peer.name] = wrong

    matmul = measure.Matmul(dtype, device)
    *times, matmul_times, again = measure.interleave(
        [*units.values(), matmul, unit(peers[0])], budget
    )
    rate = measure.MATMUL_FLOPS / Summary.of(matmul_times).median
    results = {name: Result(name, problem=wrong) for name, wrong in problems.items()}
    for name, seconds in zip(units, times, strict=True):
        summary = Summary.of(seconds)
        results[name] = Result(
            peer=name,
            seconds=summary,
            tokens_per_second=case.tokens / summary.median,
            speedup=measure.speedup(times[0], seconds),
            matmul_fraction=case.flops(training) / summary.median / rate,
        )
    return Row(
        case=case.name,
        shape=case.shape,
        mode=mode,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        device=str(device),
        matmul_flops=rate,
        noise=measure.speedup(times[0], again),
        results=[results[peer.name] for peer in peers],
    )


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
