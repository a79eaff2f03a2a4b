"""What moved between two runs, beyond what chance moves."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.measure import Summary
from benchmarks.report import Report
from benchmarks.suite import Result, Row

LEAST = 1.02  # a smaller change is not worth a line, however quiet the machine
OURS = "fusedrnn"


@dataclass(frozen=True)
class Change:
    """One figure that moved."""

    what: str
    before: str
    after: str
    regression: bool

    def __str__(self) -> str:
        kind = "REGRESSION" if self.regression else "better"
        return f"{kind}: {self.what}: {self.before} -> {self.after}"


def changes(old: Report, new: Report) -> list[Change]:
    """What moved in the rows that both have.

    Speed is fusedrnn's as a multiple of torch.nn's in the same run, so that a slower machine is no
    regression. It moved if the medians differ by more than the quartiles are apart in two of these
    four, multiplied: either run's figure, and torch.nn against itself in either. What is right and
    turns wrong is a regression, and so are more bytes saved for backward.
    """
    before = {row.key: row for row in old.rows}
    found = []
    for row in new.rows:
        if row.key in before:
            found += _row_changes(before[row.key], row)
    return found


def _row_changes(old: Row, new: Row) -> list[Change]:
    ours = {result.peer: result for result in old.results}
    where = f"{new.case}, {new.mode}, {new.dtype}, {new.device}, threads={new.threads}"
    found = []
    for result in new.results:
        previous = ours.get(result.peer)
        if previous is None or not result.peer.startswith(OURS):
            continue
        what = f"{where}: {result.peer}"
        if result.problem or previous.problem:
            if bool(result.problem) != bool(previous.problem):
                a, b = previous.problem or "right", result.problem or "right"
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


def _moved(a: Summary, b: Summary, *noise: Summary) -> bool:
    change = max(a.median / b.median, b.median / a.median)
    *_, second, widest = sorted(s.spread for s in (a, b, *noise))
    return change > max(LEAST, second * widest)


def _memory(old: Result, new: Result, what: str) -> list[Change]:
    a, b = old.saved_bytes, new.saved_bytes
    if not a or not b or max(a / b, b / a) < LEAST:
        return []
    return [Change(f"{what}, saved for backward", f"{a:,} bytes", f"{b:,} bytes", b > a)]


def unlike(old: Report, new: Report) -> list[str]:
    """In what the two runs' machines and versions differ, which a change may come from."""
    return [
        f"{key}: {old.environment.get(key)} -> {new.environment.get(key)}"
        for key in ("cpu", "gpu", "isa", "torch", "cudnn", "gpu_driver")
        if old.environment.get(key) != new.environment.get(key)
    ]


def unmatched(old: Report, new: Report) -> int:
    """How many of the old run's rows the new one has not."""
    return len({row.key for row in old.rows} - {row.key for row in new.rows})
