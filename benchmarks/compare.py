"""Changes between runs that exceed the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import Summary
from benchmarks.report import Report
from benchmarks.suite import Result, Row, is_ours

LEAST = 1.02  # smaller changes are not reported, however quiet the machine


@dataclass(frozen=True)
class Change:
    """One figure that changed."""

    what: str
    before: str
    after: str
    regression: bool

    def __str__(self) -> str:
        kind = "REGRESSION" if self.regression else "better"
        return f"{kind}: {self.what}: {self.before} -> {self.after}"


Rows = dict[tuple[object, ...], Row]


def changes(old: Sequence[Report], new: Sequence[Report]) -> list[Change]:
    """Changes in the rows that both have.

    Speed is fusedrnn's as a multiple of torch.nn's in the same run, so that a slower machine is
    not a regression. A change counts if the ratio of the medians exceeds the product of the two
    largest of four ratios of quartiles: those of both figures, and those of torch.nn against itself
    in both runs. A result that turns incorrect is a regression, and so are more bytes saved for
    backward, and another implementation that is now ahead of ours beyond the noise.
    """
    before, after = _rows(old), _rows(new)
    return [c for key in after if key in before for c in _row_changes(before[key], after[key])]


def common(old: Sequence[Report], new: Sequence[Report]) -> bool:
    """Whether any row is in both."""
    return not _rows(old).keys().isdisjoint(_rows(new))


def _rows(runs: Sequence[Report]) -> Rows:
    return {(run.busy, *row.key): row for run in runs for row in run.rows}


def _row_changes(old: Row, new: Row) -> list[Change]:
    ours = {result.peer: result for result in old.results}
    where = f"{new.case}, {new.mode}, {new.dtype}, {new.device}, threads={new.threads}"
    found = []
    for result in new.results:
        previous = ours.get(result.peer)
        if previous is None:
            continue
        if not is_ours(result.peer):
            found += _lead(where, (old, previous), (new, result))
            continue
        what = f"{where}: {result.peer}"
        if result.problem or previous.problem:
            if bool(result.problem) != bool(previous.problem):
                a, b = previous.problem or "correct", result.problem or "correct"
                found.append(Change(what, a, b, bool(result.problem)))
            continue
        for speed, name in (("speedup", "speed"), ("graph_speedup", "speed as a graph")):
            a, b = getattr(previous, speed), getattr(result, speed)
            if a and b and _moved(a, b, old.noise, new.noise):
                slower = b.median < a.median
                found.append(
                    Change(f"{what}, {name}", f"{a.median:.2f}", f"{b.median:.2f}", slower)
                )
        found += _memory(previous, result, what)
    return found


def _lead(where: str, old: tuple[Row, Result], new: tuple[Row, Result]) -> list[Change]:
    """Whether another implementation has overtaken its rival among ours, or the reverse."""
    (_, before), (_, after) = old, new
    if not before.lead or not after.lead:
        return []
    behind, now = (result in row.ahead() for row, result in (old, new))
    if behind == now:
        return []
    what = f"{where}: ours as a multiple of {after.peer}"
    return [Change(what, f"{before.lead.median:.2f}", f"{after.lead.median:.2f}", now)]


def _moved(a: Summary, b: Summary, *noise: Summary) -> bool:
    change = max(a.median / b.median, b.median / a.median)
    *_, second, widest = sorted(s.spread for s in (a, b, *noise))
    return change > max(LEAST, second * widest)


def _memory(old: Result, new: Result, what: str) -> list[Change]:
    a, b = old.saved_bytes, new.saved_bytes
    if not a or not b or max(a / b, b / a) < LEAST:
        return []
    return [Change(f"{what}, saved for backward", f"{a:,} bytes", f"{b:,} bytes", b > a)]


def unlike(old: Sequence[Report], new: Sequence[Report]) -> list[str]:
    """Differences between the machines and versions, which may explain a change."""
    found = []
    for key in ("cpu", "gpu", "isa", "torch", "cudnn", "gpu_driver"):
        a, b = (sorted({str(run.environment.get(key)) for run in runs}) for runs in (old, new))
        if a != b:
            found.append(f"{key}: {', '.join(a)} -> {', '.join(b)}")
    return found


def unmatched(old: Sequence[Report], new: Sequence[Report]) -> int:
    """How many rows of the old runs the new ones lack."""
    return len(_rows(old).keys() - _rows(new).keys())
