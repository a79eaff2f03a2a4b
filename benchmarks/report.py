"""Runs as data: files of JSON, each with one run or several."""

from __future__ import annotations

import dataclasses
import functools
import json
import typing
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import compact
from benchmarks.measure import Summary
from benchmarks.suite import Row
from benchmarks.sweeps import Point
from benchmarks.training import Training

LEVELS = 4  # of the file that are spread over lines: the file, its runs, a run, its lists
ITEMS = ("rows", "sweeps", "training")


@dataclass(frozen=True)
class Report:
    """One run: the machine, the command and what was measured."""

    environment: dict[str, Any]
    command: str
    rows: list[Row] = field(default_factory=list)
    sweeps: list[Point] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)

    @property
    def busy(self) -> int:
        """How many CPUs other processes kept busy meanwhile."""
        return int(self.environment.get("busy") or 0)

    def items(self) -> Iterator[tuple[str, int, Hashable]]:
        """(list, index, key) of every item; items of two runs with the same key are comparable."""
        for i, row in enumerate(self.rows):
            yield "rows", i, (self.busy, row.key)
        for i, point in enumerate(self.sweeps):
            yield "sweeps", i, (self.busy, point.axis, point.value, point.row.key)
        for i, job in enumerate(self.training):
            yield "training", i, (self.busy, job.job, job.threads, job.device)

    def problems(self) -> list[str]:
        """Incorrect results of fusedrnn and torch.nn; failures of other peers do not count."""
        found = [
            f"{row.case}, {row.mode}, {row.dtype}: {result.peer}: {result.problem}"
            for row in [*self.rows, *(point.row for point in self.sweeps)]
            for result in row.results
            if result.problem and result.peer.startswith(("fusedrnn", "torch.nn"))
        ]
        return found + [f"{t.job}: {t.problem}" for t in self.training if t.problem]


def latest(reports: Sequence[Report]) -> list[Report]:
    """The runs, each without the items that a later run measured again."""
    seen: set[tuple[str, Hashable]] = set()
    found = []
    for report in reversed(reports):
        kept: dict[str, list[Any]] = {name: [] for name in ITEMS}
        here = set()
        for name, i, key in report.items():
            here.add((name, key))
            if (name, key) not in seen:
                kept[name].append(getattr(report, name)[i])
        seen |= here
        if any(kept.values()):
            found.append(Report(report.environment, report.command, **kept))
    return found[::-1]


def save(reports: Sequence[Report], path: Path) -> None:
    path.write_text(compact.dumps({"runs": [_plain(report) for report in reports]}, LEVELS))


def load(path: Path) -> list[Report]:
    """Reads what ``save`` wrote.

    Raises:
        ValueError: the file holds something else.
    """
    try:
        data = json.loads(path.read_text())
        return [_revived(Report, run) for run in data.get("runs") or [data]]
    except (AttributeError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no runs of this program: {error}") from error


def _plain(value: Any) -> Any:
    """A dataclass as a dict without its Nones; a summary as [median, lower, upper, count]."""
    if isinstance(value, Summary):
        return list(dataclasses.astuple(value))
    if dataclasses.is_dataclass(value):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {name: _plain(v) for name, v in items if v is not None}
    return [_plain(v) for v in value] if isinstance(value, list) else value


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _revived(kind: Any, value: Any) -> Any:
    """The inverse of ``_plain``, for a value of type ``kind``."""
    for option in typing.get_args(kind):  # Summary | None, list[Row]
        if option is Summary or dataclasses.is_dataclass(option):
            many = typing.get_origin(kind) is list
            return [_revived(option, v) for v in value] if many else _revived(option, value)
    if kind is Summary:  # an object in files of earlier versions
        return Summary(**value) if isinstance(value, dict) else Summary(*value)
    if dataclasses.is_dataclass(kind):
        return _instance(kind, value)
    return value


def _instance(kind: Any, fields: dict[str, Any]) -> Any:
    hints = _hints(kind)
    return kind(**{k: _revived(hints[k], v) for k, v in fields.items() if v is not None})


def machine(environment: dict[str, Any]) -> str:
    """The hardware that figures were measured on."""
    e = environment
    where = f"{e['gpu']} and {e['cpu']}" if e["gpu"] else e["cpu"]
    busy = f", {e['busy']} of them kept busy by other processes" if e.get("busy") else ""
    return f"{where}, {e['cpus']} CPUs{busy}"


def versions(environment: dict[str, Any]) -> str:
    """The software that figures were measured with, and the date."""
    e = environment
    words = [f"driver {e['gpu_driver']}, cuDNN {e['cudnn']}"] if e.get("gpu_driver") else []
    commit = f" at {e['commit']}" if e["commit"] else ""
    words += [f"torch {e['torch']}", f"fusedrnn {e['fusedrnn']}{commit}"]
    return ", ".join([*words, f"{e['isa']} kernels", e["date"][:10]])


def caption(environment: dict[str, Any]) -> str:
    return f"{machine(environment)}, {versions(environment)}"
