"""Tables of a report: for the terminal, and as Markdown."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.box import SIMPLE_HEAD
from rich.markup import escape

from benchmarks.measure import Summary
from benchmarks.suite import Result, Row
from benchmarks.training import REPORTED, Training

WRONG = "wrong: "
OURS = "fusedrnn"
NOTE = (
    "tokens/s: of the median repetition. us/step: microseconds of that for each time step. faster: "
    "how many times as fast as torch.nn, median and quartiles over paired repetitions; a tie is "
    "within the noise. graph: the same for replays of CUDA graphs. floor: what part of the time "
    "the operations or the bytes alone would take at the measured rates. noise: quartiles of "
    "torch.nn against itself."
)
DETAILS_NOTE = (
    "product, bandwidth: the part of the rate of a large matrix product that the layer's own "
    "products reach, and of the bandwidth of a large copy that its inputs and results do. saved: "
    "megabytes kept for backward beside input, output and weights. peak: megabytes more in use "
    "during a repetition. first: seconds until the first result, building included. error: the "
    "largest, by torch.nn's in the same dtype."
)
TRAINING_NOTE = (
    "Whole training: data, forward, loss, backward, clipping, update. reported: tokens/s that "
    "readers of the book reported of its loop, on other machines with GPUs they did not name; they "
    "say what people get, not how machines compare."
)


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``left`` columns are words."""

    title: str
    header: list[str]
    cells: list[list[str]]
    left: int = 2
    spare: int | None = None  # the column that a narrow terminal can do without, before the last

    def without_empty_columns(self) -> Table:
        kept = [i for i in range(len(self.header)) if any(line[i] for line in self.cells)]
        return Table(
            self.title,
            [self.header[i] for i in kept],
            [[line[i] for i in kept] for line in self.cells],
            sum(i < self.left for i in kept),
            None if self.spare is None else kept.index(self.spare),
        )

    def markdown(self) -> str:
        lines = [
            self.header,
            ["---"] * self.left + ["---:"] * (len(self.header) - self.left),
            *([cell.replace("|", "\\|") for cell in cells] for cells in self.cells),
        ]
        title = f"**{self.title[0].upper()}{self.title[1:]}**"
        return title + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def rich(self, width: int) -> rich.table.Table:
        """For a terminal of so many characters; what does not fit goes."""
        shown = list(range(len(self.header)))
        if self.spare is not None and self._width(shown) > width:
            shown.remove(self.spare)
        while self._width(shown) > width and len(shown) > 4:
            shown.pop()
        out = rich.table.Table(
            title=escape(self.title), title_justify="left", box=SIMPLE_HEAD, padding=0
        )
        for i in shown:
            justify = "left" if i < self.left else "right"
            out.add_column(escape(self.header[i]), justify=justify, width=self._width_of(i))  # type: ignore[arg-type]
        for cells in self.cells:
            out.add_row(*(escape(cells[i]) for i in shown))
        return out

    def _width(self, shown: Sequence[int]) -> int:
        return sum(self._width_of(i) + 1 for i in shown) + 2

    def _width_of(self, i: int) -> int:
        """Headers may be broken between words, and what is wrong may take several lines."""
        cells = (line[i] for line in self.cells if not line[i].startswith(WRONG))
        wrong = any(line[i].startswith(WRONG) for line in self.cells)
        return max(2 * len(WRONG) * wrong, *map(len, (*self.header[i].split(), *cells)))


def headlines(rows: Sequence[Row]) -> list[Table]:
    """torch.nn and fusedrnn, a line for each case that is no point of the grid."""
    lines = [row for row in rows if not grid_point(row)]
    return [_headline(title, group) for title, group in _groups(lines)]


def grids(rows: Sequence[Row]) -> list[Table]:
    """How many times as fast as torch.nn, a line for each hidden size, a column for each batch."""
    made = []
    for title, group in _groups([row for row in rows if grid_point(row)]):
        found: dict[str, dict[tuple[int, int], str]] = {}
        for row in group:
            cell, size, batch = grid_point(row)  # type: ignore[misc]
            ours = next((r for r in row.results if r.peer == OURS), Result(OURS, "not measured"))
            text = f"{WRONG}{ours.problem}"
            if ours.speedup:
                tie = "tie, " if ours.verdict == "tie" else ""
                text = f"{tie}{ours.speedup.median:.2f}"
            found.setdefault(cell, {})[size, batch] = text
        for cell, of_cell in found.items():
            sizes, batches = (sorted({key[i] for key in of_cell}) for i in (0, 1))
            cells = [
                [f"H={size}", *(of_cell.get((size, batch), "") for batch in batches)]
                for size in sizes
            ]
            header = [cell.upper(), *(f"B={batch}" for batch in batches)]
            made.append(Table(f"{title}, times as fast as torch.nn, T=20", header, cells, left=1))
    return made


def grid_point(row: Row) -> tuple[str, int, int] | None:
    """Cell, hidden size and batch, of a case of the grid."""
    found = re.fullmatch(r"grid-(\w+)-h(\d+)-b(\d+)", row.case)
    return (found[1], int(found[2]), int(found[3])) if found else None


def _headline(title: str, rows: list[Row]) -> Table:
    reference = rows[0].results[0].peer
    header = ["case", "layers, T steps, B rows", f"{reference} tokens/s", f"{OURS} tokens/s"]
    header += ["faster", "us/step", "graph", "floor", "noise"]
    cells = []
    for row in rows:
        first = row.results[0]
        ours = next((r for r in row.results if r.peer == OURS), Result(OURS, "not measured"))
        cells.append(
            [
                row.case,
                row.shape,
                _speed(first),
                _speed(ours),
                _ratio(ours.speedup, ours.verdict),
                _number(ours.step_seconds, lambda s: _significant(s * 1e6)),
                _ratio(ours.graph_speedup, None),
                _number(_floor(ours), "{:.0%}".format),
                f"{row.noise.lower:.2f}..{row.noise.upper:.2f}",
            ]
        )
    ratios = [r.speedup.median for row in rows for r in row.results if r.peer == OURS and r.speedup]
    if len(ratios) > 1:
        title = f"{title}, geometric mean {statistics.geometric_mean(ratios):.2f} times as fast"
    # The name hints at the shape.
    return Table(title, header, cells, spare=1).without_empty_columns()


def details(rows: Sequence[Row]) -> list[Table]:
    """Everything that was measured, a line for each peer of each case."""
    header = ["case", "peer", "tokens/s", "us/step", "faster", "graph us/step", "graph faster"]
    header += ["product", "bandwidth", "saved", "peak", "first", "error"]
    made = []
    for title, group in _groups([row for row in rows if not grid_point(row)]):
        cells = []
        for row in group:
            for r in row.results:
                first = r is row.results[0]
                steps = r.seconds.median / r.step_seconds if r.seconds and r.step_seconds else 1
                graph = r.graph_seconds.median / steps * 1e6 if r.graph_seconds else None
                cells.append(
                    [
                        row.case,
                        r.peer,
                        _speed(r),
                        _number(r.step_seconds, lambda s: _significant(s * 1e6)),
                        "" if first else _ratio(r.speedup, r.verdict),
                        r.graph_problem or _number(graph, _significant),
                        "" if first else _ratio(r.graph_speedup, None),
                        _number(r.matmul_fraction, "{:.0%}".format),
                        _number(r.bandwidth_fraction, "{:.1%}".format),
                        _number(r.saved_bytes, lambda b: _significant(b / 1e6)),
                        _number(r.peak_bytes, lambda b: _significant(b / 1e6)),
                        _number(r.first_call_seconds, "{:.3f}".format),
                        _number(r.error, "{:.2f}".format),
                    ]
                )
        made.append(Table(title, header, cells).without_empty_columns())
    return made


def training(jobs: Sequence[Training]) -> list[Table]:
    """The book's loop, with what was reported of it elsewhere."""
    groups: dict[str, list[Training]] = {}
    for job in jobs:
        where = _threads(job.threads) if job.device == "cpu" else job.device
        groups.setdefault(f"the book's training loop, float32, {where}", []).append(job)
    return [_training(title, group) for title, group in groups.items()]


def _training(title: str, jobs: Sequence[Training]) -> Table:
    header = ["job", "layers, T steps, B rows", "torch.nn tokens/s", f"{OURS} tokens/s", "faster"]
    header += ["reported (other machines)"]
    cells = []
    for job in jobs:
        speeds = [f"{speed:,.0f}" for speed in job.tokens_per_second]
        if job.problem:
            speeds[1] = f"{WRONG}{job.problem}"
        ratio = "" if job.problem else _ratio(job.speedup, job.verdict)
        reported = ", ".join(f"{n:,}" for n in REPORTED.get(job.job, ()))
        cells.append([job.job, job.shape, *speeds, ratio, reported])
    return Table(title, header, cells, spare=1).without_empty_columns()


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of one mode, dtype, device and number of threads, and how to call them."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        where = _threads(row.threads) if row.device == "cpu" else row.device
        groups.setdefault(f"{row.mode}, {row.dtype}, {where}", []).append(row)
    for title, group in groups.items():
        rates = [row.matmul_flops for row in group]
        title = f"{title}, product rate {_span(rates, 1e9)} GFLOP/s"
        bandwidths = [row.bandwidth for row in group if row.bandwidth]
        if bandwidths:
            title += f", bandwidth {_span(bandwidths, 1e9)} GB/s"
        yield title, group


def _span(values: Sequence[float], unit: float) -> str:
    low, high = f"{min(values) / unit:,.0f}", f"{max(values) / unit:,.0f}"
    return low if low == high else f"{low} to {high}"


def _speed(result: Result) -> str:
    if result.problem:
        return f"{WRONG}{result.problem}"
    return _number(result.tokens_per_second, "{:,.0f}".format)


def _floor(result: Result) -> float | None:
    parts = [p for p in (result.matmul_fraction, result.bandwidth_fraction) if p is not None]
    return max(parts, default=None)


def _ratio(ratio: Summary | None, verdict: str | None) -> str:
    if ratio is None:
        return ""
    text = f"{ratio.median:.2f} ({ratio.lower:.2f}..{ratio.upper:.2f})"
    return f"tie, {text}" if verdict == "tie" else text


def _number(value: Any, form: Callable[[Any], str]) -> str:
    return "" if value is None else form(value)


def _significant(value: float) -> str:
    """Three digits that count, and no more before the point than there are."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
