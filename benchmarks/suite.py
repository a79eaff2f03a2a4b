"""Rows of the result: a case in one mode, dtype and number of threads, checked and timed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from benchmarks import check, measure
from benchmarks.cases import Case
from benchmarks.machine import Copy, Matmul, peak_bytes
from benchmarks.measure import Budget, Replay, Summary, Unit
from benchmarks.peers import PEERS, Peer, Question


@dataclass(frozen=True)
class Result:
    """One peer's part of a row; with a ``problem``, all other fields are None.

    Fractions compare with rates measured in the same rounds: the layer's operations with the rate
    of a large matrix product, and its minimal bytes with the bandwidth of a large copy.
    """

    peer: str
    problem: str | None = None
    seconds: Summary | None = None
    tokens_per_second: float | None = None
    speedup: Summary | None = None  # over the first peer
    verdict: str | None = None  # faster, slower or tie
    matmul_fraction: float | None = None
    bandwidth_fraction: float | None = None
    step_seconds: float | None = None
    error: float | None = None  # the largest error, as a multiple of torch.nn's
    saved_bytes: int | None = None  # for backward
    peak_bytes: int | None = None
    first_call_seconds: float | None = None  # includes the build
    graph_seconds: Summary | None = None  # replays of a CUDA graph
    graph_speedup: Summary | None = None
    graph_problem: str | None = None
    lead: Summary | None = None  # the speed of its rival among ours (see Peer) over this one's


def is_ours(peer: str) -> bool:
    return peer.startswith("fusedrnn")


@dataclass(frozen=True)
class Row:
    case: str
    shape: str
    mode: str
    dtype: str
    threads: int
    device: str
    matmul_flops: float  # per second; with TF32 where permitted
    noise: Summary  # the first peer's speed as a multiple of its own
    results: list[Result] = field(default_factory=list)
    bandwidth: float | None = None  # bytes per second
    floor_seconds: float | None = None  # operations or bytes, whichever takes longer

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the measurement: rows of two runs with the same key are comparable."""
        return (self.case, self.shape, self.mode, self.dtype, str(self.threads), self.device)

    def ahead(self) -> list[Result]:
        """The peers that are faster than their rivals among ours, beyond the noise."""
        leads = [(r, r.lead) for r in self.results if r.lead]
        return [r for r, lead in leads if measure.verdict(lead, self.noise) == "slower"]


def rows(
    cases: Sequence[Case],
    modes: Sequence[str],
    dtypes: Sequence[torch.dtype],
    threads: Sequence[int],
    device: torch.device,
    budget: Budget,
    peers: Sequence[Peer] = PEERS[:2],
) -> Iterator[Row]:
    """Measures every combination lazily."""
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        copying = Copy(device)
        for dtype in dtypes:
            machine = _Machine(
                Matmul(dtype, device), Matmul(dtype, device, tf32_permitted=False), copying
            )
            for case in cases:
                expectations = _Expectations(case, dtype, device)
                for mode in modes:
                    asked = [p for p in peers if p.can(Question(case, mode, dtype, device))]
                    for number in threads:
                        with _threads(number):
                            measured = _Measurement(
                                case, mode, expectations, budget, asked, machine
                            )
                            yield measured.row()


@dataclass(frozen=True)
class _Machine:
    """Work that measures the rates of the machine."""

    matmul: Matmul
    exact_matmul: Matmul  # without TF32
    copying: Copy


class _Expectations:
    """The expected results of a case, computed once for each setting and used in all modes."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device, self._case = dtype, device, case
        self._known: dict[bool, check.Expected] = {}

    def under(self, setting: measure.Setting) -> check.Expected:
        exact = setting is measure.no_tf32
        if exact not in self._known:
            chosen = setting if exact else contextlib.nullcontext
            # One thread: this is not timed, and a busy core cannot delay it.
            with _threads(1):
                self._known[exact] = check.expect(self._case, self.dtype, self.device, chosen)
        return self._known[exact]


class _Measurement:
    """Checks and times one row."""

    def __init__(
        self,
        case: Case,
        mode: str,
        expectations: _Expectations,
        budget: Budget,
        peers: Sequence[Peer],
        machine: _Machine,
    ) -> None:
        self._machine = machine
        self._case, self._mode, self._budget, self._peers = case, mode, budget, peers
        self._dtype, self._device = expectations.dtype, expectations.device
        self._expectations = expectations
        self._layer = case.module(self._dtype, self._device)
        self._data = case.data(self._dtype, self._device)

    def row(self) -> Row:
        case, device = self._case, self._device
        units: dict[str, Unit] = {}
        made: dict[str, Result] = {}
        matmuls, copying = {False: self._machine.matmul}, self._machine.copying
        for work in (matmuls[False], copying):  # torch's first calls, not charged to a peer
            work(1)
        for peer in self._peers:
            made[peer.name], unit = self._checked(peer)
            if unit is not None:
                units[peer.name] = unit
        again = self._checked(self._peers[0])[1]
        works: dict[Any, measure.Work] = dict(units)
        for name, unit in units.items():
            replay, why = self._replay(name, unit)
            if replay is not None:
                works["graph", name] = replay
            made[name] = replace(made[name], graph_problem=why)
        if any(unit.setting is measure.no_tf32 for unit in units.values()):
            matmuls[True] = self._machine.exact_matmul
        works.update({("matmul", exact): work for exact, work in matmuls.items()})
        works["copy"] = copying
        if again is not None:
            works["again"] = again

        times = dict(
            zip(works, measure.interleave(list(works.values()), self._budget), strict=True)
        )
        rates = {
            exact: work.flops / Summary.of(times["matmul", exact]).median
            for exact, work in matmuls.items()
        }
        bandwidth = copying.bytes / Summary.of(times["copy"]).median
        training = self._mode == "training"
        flops = case.flops(training)
        moved = case.least_bytes(training, self._dtype.itemsize)
        first = times.get(self._peers[0].name)
        noise = Summary(1.0, 1.0, 1.0, 0)
        if first is not None and again is not None:
            noise = measure.speedup(first, times["again"])
        for name, unit in units.items():
            rate = rates[unit.setting is measure.no_tf32]
            made[name] = replace(made[name], lead=self._lead(name, times))
            made[name] = _timed(
                made[name],
                case,
                times[name],
                first,
                noise,
                flops / rate,
                moved / bandwidth,
                times.get(("graph", name)),
                times.get(("graph", self._peers[0].name)),
            )
        return Row(
            case=case.name,
            shape=case.shape,
            mode=self._mode,
            dtype=str(self._dtype).removeprefix("torch."),
            threads=torch.get_num_threads(),
            device=str(device),
            matmul_flops=rates[False],
            noise=noise,
            results=[made[peer.name] for peer in self._peers],
            bandwidth=bandwidth,
            floor_seconds=max(flops / rates[False], moved / bandwidth),
        )

    def _lead(self, name: str, times: dict[Any, list[float]]) -> Summary | None:
        """How many times as fast as a peer its rival among ours is."""
        rival = next(peer.rival for peer in self._peers if peer.name == name)
        ours = times.get(rival)
        return None if ours is None or is_ours(name) else measure.speedup(times[name], ours)

    def _checked(self, peer: Peer) -> tuple[Result, Unit | None]:
        """A peer's first call: its time and its correctness."""
        try:
            start = time.perf_counter()
            module = peer.build(self._layer, self._data.input)
            call = (module, self._data, self._mode, self._case.input_grad)
            unit = Unit(*call, peer.setting, peer.rest)
            results = unit.results()
            measure.synchronize(self._device)
            seconds = time.perf_counter() - start
            expected = self._expectations.under(peer.setting)
            bounds = peer.factor, peer.relative
            wrong = check.problem(results, expected, self._mode, *bounds)
            if wrong is not None:
                return Result(peer.name, wrong), None
            off = check.error(results, expected)
        except Exception as error:  # a peer's exception is reported in its row
            return Result(peer.name, _first_line(error)), None
        saved = _unless_it_fails(unit.saved_bytes) if self._mode != "inference" else None
        peak = _unless_it_fails(lambda: peak_bytes(unit.run, self._device))
        return (
            Result(
                peer.name,
                error=off,
                saved_bytes=saved,
                peak_bytes=peak,
                first_call_seconds=seconds,
            ),
            unit,
        )

    def _replay(self, name: str, unit: Unit) -> tuple[Replay | None, str | None]:
        """The unit as a CUDA graph, if it can be captured and is correct; else the reason."""
        if self._device.type != "cuda":
            return None, None
        peer = next(p for p in self._peers if p.name == name)
        try:
            replay = Replay(unit)
            expected = self._expectations.under(peer.setting)
            wrong = check.problem(replay.results(), expected, self._mode, peer.factor)
        except Exception as error:
            torch.cuda.synchronize(self._device)
            return None, _first_line(error)
        return (replay, None) if wrong is None else (None, wrong)


def _timed(
    result: Result,
    case: Case,
    seconds: list[float],
    first: list[float] | None,
    noise: Summary,
    matmul_seconds: float,
    copy_seconds: float,
    graph: list[float] | None,
    first_graph: list[float] | None,
) -> Result:
    """``result`` with the figures that follow from the times."""
    summary = Summary.of(seconds)
    ratio = measure.speedup(first, seconds) if first is not None else None
    return replace(
        result,
        seconds=summary,
        tokens_per_second=case.tokens / summary.median,
        speedup=ratio,
        verdict=measure.verdict(ratio, noise) if ratio is not None else None,
        matmul_fraction=matmul_seconds / summary.median,
        bandwidth_fraction=copy_seconds / summary.median,
        step_seconds=summary.median / case.steps,
        graph_seconds=Summary.of(graph) if graph else None,
        graph_speedup=measure.speedup(first_graph, graph) if graph and first_graph else None,
    )


Value = TypeVar("Value")


def _unless_it_fails(get: Callable[[], Value]) -> Value | None:
    """An optional figure: None where the peer cannot provide it."""
    try:
        return get()
    except Exception:
        return None


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
