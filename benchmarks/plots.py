"""Plots of runs: ratios of speed, and time against size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from benchmarks.report import Report
from benchmarks.suite import Row
from benchmarks.sweeps import Point
from benchmarks.tables import grid_point

COLORS = {"torch.nn": "#56b4e9", "fusedrnn": "#d55e00"}  # distinguishable for colour-blind readers
FLOOR, PIPELINE = "#666666", "#009e73"
FORMATS = ("png", "svg")
LABELS = {
    "T": "time steps T",
    "B": "batch B",
    "H": "hidden units H",
    "L": "layers L",
    "threads": "threads",
}


def save(runs: Sequence[Report], folder: Path) -> list[str]:
    """Draws ratios and sweeps; returns the names of the figures, without their extensions."""
    made: dict[str, Figure] = {}
    groups: dict[str, list[Row]] = {}
    curves: dict[str, list[Point]] = {}
    for run in runs:
        busy = f"-busy{run.busy}" if run.busy else ""
        for row in (row for row in run.rows if not grid_point(row)):
            where = f"{row.threads}-threads" if row.device == "cpu" else row.device.replace(":", "")
            groups.setdefault(f"faster-{row.dtype}-{where}{busy}", []).append(row)
        for point in run.sweeps:
            row = point.row
            cell = row.shape.partition(" ")[0].lower()
            curves.setdefault(f"sweep-{cell}-{row.mode}-{row.dtype}{busy}", []).append(point)
    made.update((name, ratios(rows)) for name, rows in groups.items())
    made.update((name, growth(points)) for name, points in curves.items())
    # Fixed ids and no date: the same figures make the same file.
    with matplotlib.rc_context({"svg.hashsalt": "fusedrnn", "svg.fonttype": "path"}):
        for name, figure in made.items():
            for ending in FORMATS:
                metadata = {"Date": None} if ending == "svg" else None
                figure.savefig(folder / f"{name}.{ending}", metadata=metadata)
    return list(made)


def ratios(rows: Sequence[Row]) -> Figure:
    """A bar for each case and mode: fusedrnn's speed by torch.nn's, with quartiles."""
    modes = list(dict.fromkeys(row.mode for row in rows))
    cases = list(dict.fromkeys(row.case for row in rows))
    size = (4 * len(modes) + 2, 0.32 * len(cases) + 1.6)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    for axes, mode in zip(figure.subplots(1, len(modes), sharey=True, squeeze=False)[0], modes):  # noqa: B905
        for row in (row for row in rows if row.mode == mode):
            ours = next((r for r in row.results if r.peer == "fusedrnn"), None)
            if ours is None or ours.speedup is None:
                continue
            s, y = ours.speedup, cases.index(row.case)
            tie = ours.verdict == "tie"
            axes.barh(y, s.median, color=COLORS["fusedrnn"], alpha=0.4 if tie else 1.0)
            axes.plot([s.lower, s.upper], [y, y], color="black", lw=1)
            axes.text(s.upper, y, f" {s.median:.2f}", va="center", fontsize=8)
        axes.axvline(1, color="black", lw=1)
        axes.set_yticks(range(len(cases)), cases)
        room = 1.15 * axes.dataLim.x1  # for the numbers
        axes.set(title=mode, xlabel="times as fast as torch.nn", xlim=(0, room))
        axes.grid(axis="x", alpha=0.3)
    figure.axes[0].invert_yaxis()
    row = rows[0]
    threads = f"{row.threads} thread{'s' * (row.threads > 1)}"
    where = threads if row.device == "cpu" else row.device
    figure.suptitle(f"{row.dtype}, {where}; pale: a tie")
    return figure


def growth(points: Sequence[Point]) -> Figure:
    """Milliseconds against each axis: both implementations and the floor."""
    names = list(dict.fromkeys(p.axis for p in points))
    figure = Figure(figsize=(4.2 * len(names), 3.6), dpi=110, layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(names), squeeze=False)[0], names):  # noqa: B905
        here = sorted((p for p in points if p.axis == axis), key=lambda p: p.value)
        _curves(axes, here)
        if axis == "L" and here[0].row.device != "cpu":
            _pipeline(axes, here)
        axes.set(xlabel=LABELS[axis], ylabel="ms", xscale="log", yscale="log")
        axes.set_xticks([p.value for p in here], [str(p.value) for p in here])
        axes.xaxis.set_minor_formatter(NullFormatter())
        for format_axis in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            format_axis(FuncFormatter(_plain))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    row = points[0].row
    figure.suptitle(f"{row.shape.partition(' ')[0]}, {row.mode}, {row.dtype}")
    return figure


def _plain(value: float, position: int) -> str:
    """Labels a logarithmic axis at 1, 2 and 5."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""


def _curves(axes: Axes, points: Sequence[Point]) -> None:
    for name, color in COLORS.items():
        found = [
            (p.value, r.seconds.median * 1e3)
            for p in points
            for r in p.row.results
            if r.peer == name and r.seconds
        ]
        axes.plot(*zip(*found, strict=True), "o-", ms=3, color=color, label=name) if found else None
    floor = [(p.value, p.row.floor_seconds * 1e3) for p in points if p.row.floor_seconds]
    if floor:
        axes.plot(*zip(*floor, strict=True), "--", color=FLOOR, label="floor")


def _pipeline(axes: Axes, points: Sequence[Point]) -> None:
    """The time of L layers if they took T + L - 1 steps of fusedrnn's single layer."""
    single = next((p for p in points if p.value == 1), points[0])
    ours = next((r for r in single.row.results if r.peer == "fusedrnn" and r.seconds), None)
    if ours is None or ours.seconds is None or ours.step_seconds is None:
        return
    steps = ours.seconds.median / ours.step_seconds
    values = [p.value for p in points]
    claimed = [ours.seconds.median * 1e3 * (steps + n - 1) / steps for n in values]
    axes.plot(values, claimed, ":", color=PIPELINE, label="T + L - 1 steps")
