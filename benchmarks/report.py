"""A run as data: kept as JSON, and read back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.measure import Summary, verdict
from benchmarks.suite import Result, Row
from benchmarks.sweeps import Point
from benchmarks.training import Training

SAME = ("cpu", "gpu", "torch", "commit", "busy")  # what reports that are put together agree in


@dataclass(frozen=True)
class Report:
    """A run: where, how, and what it found."""

    environment: dict[str, Any]
    command: str
    rows: list[Row] = field(default_factory=list)
    sweeps: list[Point] = field(default_factory=list)
    training: list[Training] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path) -> Report:
        """Reads what ``save`` wrote.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            data = json.loads(path.read_text())
            return cls(
                data["environment"],
                data["command"],
                [_row(row) for row in data["rows"]],
                [Point(p["axis"], p["value"], _row(p["row"])) for p in data.get("sweeps", ())],
                [_revive(Training, t) for t in data.get("training", ())],
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not a report of this program: {error}") from error

    @classmethod
    def join(cls, reports: Sequence[Report]) -> Report:
        """Parts that were run one by one on one machine, as one.

        Raises:
            ValueError: they were not.
        """
        first = reports[0]
        for other in reports[1:]:
            for key in SAME:
                if other.environment.get(key) != first.environment.get(key):
                    raise ValueError(f"the reports differ in their {key} and stay apart")
        return cls(
            first.environment,
            "; ".join(report.command for report in reports),
            [row for report in reports for row in report.rows],
            [point for report in reports for point in report.sweeps],
            [job for report in reports for job in report.training],
        )

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, allow_nan=True) + "\n")

    def problems(self) -> list[str]:
        """What was computed wrong by fusedrnn or by torch.nn; other peers' failures are theirs."""
        found = [
            f"{row.case}, {row.mode}, {row.dtype}: {result.peer}: {result.problem}"
            for row in [*self.rows, *(point.row for point in self.sweeps)]
            for result in row.results
            if result.problem and result.peer.startswith(("fusedrnn", "torch.nn"))
        ]
        return found + [f"{t.job}: {t.problem}" for t in self.training if t.problem]


Kind = TypeVar("Kind")


def _revive(kind: type[Kind], data: dict[str, Any]) -> Kind:
    """An instance of a dataclass from its fields, the summaries among them made objects again."""
    keys = {f.name for f in dataclasses.fields(Summary)}
    return kind(
        **{
            name: Summary(**value) if isinstance(value, dict) and value.keys() == keys else value
            for name, value in data.items()
        }
    )


def _row(data: dict[str, Any]) -> Row:
    row = _revive(Row, {**data, "results": [_revive(Result, r) for r in data["results"]]})
    for i, r in enumerate(row.results):
        if r.speedup is not None and r.verdict is None:  # written before there were verdicts
            row.results[i] = dataclasses.replace(r, verdict=verdict(r.speedup, row.noise))
    return row


def caption(environment: dict[str, Any]) -> str:
    """One sentence on where figures come from."""
    e = environment
    where = f"{e['gpu']} and {e['cpu']}" if e["gpu"] else e["cpu"]
    what = f"torch {e['torch']}, fusedrnn {e['fusedrnn']}"
    if e["commit"]:
        what += f" at {e['commit']}"
    driver = f"driver {e['gpu_driver']}, cuDNN {e['cudnn']}, " if e.get("gpu_driver") else ""
    busy = f", {e['busy']} of them kept busy by other processes" if e.get("busy") else ""
    return f"{where}, {driver}{e['isa']} kernels, {e['cpus']} CPUs{busy}, {what}, {e['date'][:10]}"
