"""Tables of a report: for the terminal, and as Markdown."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
from rich.box import SIMPLE_HEAD
from rich.markup import escape

from benchmarks.measure import Summary
from benchmarks.suite import Result, Row
from benchmarks.sweeps import Point
from benchmarks.training import REPORTED, Training

WRONG = "wrong: "
OURS = "fusedrnn"
NOTE = (
    "tokens/s: at the median time of a repetition. faster: fusedrnn's speed divided by torch.nn's, "
    "the median and quartiles of paired repetitions; a tie is within the noise. us/step: "
    "fusedrnn's median time divided by T. graph: faster, for replays of CUDA graphs. floor: the "
    "time that the layer's matrix products would take at the rate of a large product, or its "
    "bytes at the rate of a large copy, whichever is longer, as a part of fusedrnn's time. saved: "
    "bytes that fusedrnn's forward saves for backward, divided by torch.nn's. noise: quartiles "
    "of torch.nn's speed divided by its own, measured in the same rounds. ahead: what "
    "is faster than fusedrnn beyond the noise, and how many times as fast; torch int8 is compared "
    "with fusedrnn int8."
)
DETAILS_NOTE = (
    "product, bandwidth: the rate of the layer's matrix products as a part of that of a large "
    "product, and the rate of its bytes as a part of that of a large copy. saved: megabytes saved "
    "for backward besides input, output and weights. peak: additional megabytes in use during a "
    "repetition. first: seconds until the first result, including the build. error: the largest "
    "error, divided by torch.nn's in the same dtype."
)
TRAINING_NOTE = (
    "The whole training loop: data, forward, loss, backward, clipping, update. reported: tokens/s "
    "that readers of the book reported for its loop, measured on other machines with unnamed GPUs; "
    "they show what people get and do not compare machines."
)
TIMES = "times as fast as torch.nn"


@dataclass(frozen=True)
class Table:
    """Cells as text; the first ``left`` columns are words."""

    title: str
    header: list[str]
    cells: list[list[str]]
    left: int = 2
    spare: int | None = None  # the column that a narrow terminal drops first

    def without_empty_columns(self) -> Table:
        kept = [i for i in range(len(self.header)) if any(line[i] for line in self.cells)]
        return Table(
            self.title,
            [self.header[i] for i in kept],
            [[line[i] for i in kept] for line in self.cells],
            sum(i < self.left for i in kept),
            kept.index(self.spare) if self.spare in kept else None,
        )

    def markdown(self) -> str:
        lines = [
            self.header,
            ["---"] * self.left + ["---:"] * (len(self.header) - self.left),
            *([cell.replace("|", "\\|") for cell in cells] for cells in self.cells),
        ]
        title = filled(f"**{self.title[0].upper()}{self.title[1:]}**")
        return title + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def rich(self, width: int) -> rich.table.Table:
        """For a terminal of ``width`` characters; columns that do not fit are dropped."""
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
        """Headers may break between words, and problems may take several lines."""
        cells = (line[i] for line in self.cells if not line[i].startswith(WRONG))
        wrong = any(line[i].startswith(WRONG) for line in self.cells)
        return max(2 * len(WRONG) * wrong, *map(len, (*self.header[i].split(), *cells)))


def filled(text: str) -> str:
    """Text in lines of at most 100 columns."""
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def cases(rows: Sequence[Row]) -> Table:
    """The shape of every case."""
    shapes = {row.case: row.shape for row in rows if not grid_point(row)}
    return Table("cases", ["case", "layers, T steps, B rows"], [[*item] for item in shapes.items()])


def headlines(rows: Sequence[Row], shapes: bool = True) -> list[Table]:
    """torch.nn and fusedrnn: a line for each case, except the points of the grid."""
    lines = [row for row in rows if not grid_point(row)]
    return [_headline(title, group, shapes) for title, group in _groups(lines)]


def grids(rows: Sequence[Row]) -> list[Table]:
    """The speed as a multiple of torch.nn's: a line for each cell and size, a column for each B."""
    made = []
    for title, group in _groups([row for row in rows if grid_point(row)]):
        found: dict[tuple[str, int], dict[int, str]] = {}
        for row in group:
            cell, size, batch = grid_point(row)  # type: ignore[misc]
            found.setdefault((cell, size), {})[batch] = _short(of_peer(row, OURS))
        batches = sorted({batch for line in found.values() for batch in line})
        cells = [
            [f"{cell.upper()} {size}", *(line.get(batch, "") for batch in batches)]
            for (cell, size), line in sorted(found.items())
        ]
        header = ["cell, H", *(f"B={batch}" for batch in batches)]
        made.append(Table(f"{title}; {TIMES}, T=20", header, cells, left=1))
    return made


def others(rows: Sequence[Row]) -> list[Table]:
    """The speed of every other implementation as a multiple of torch.nn's."""
    made = []
    for title, group in _groups([row for row in rows if not grid_point(row)]):
        peers = list(dict.fromkeys(r.peer for row in group for r in row.results[1:]))
        if set(peers) > {OURS}:
            lines = [[row.case, *(_short(of_peer(row, peer)) for peer in peers)] for row in group]
            made.append(Table(f"{title}; {TIMES}", ["case", *peers], lines, left=1))
    return made


def sweeps(points: Sequence[Point]) -> list[Table]:
    """How time grows: a line for each value of what was varied."""
    header = ["varied", "torch.nn ms", f"{OURS} ms", "floor ms", "faster", "noise"]
    groups: dict[str, list[Point]] = {}
    for p in points:
        cell = p.row.shape.partition(" ")[0]
        groups.setdefault(f"sweep of {cell}, {p.row.mode}, {p.row.dtype}", []).append(p)
    made = []
    for title, group in groups.items():
        cells = []
        for p in group:
            first, ours = p.row.results[0], of_peer(p.row, OURS)
            seconds = [r.seconds.median if r.seconds else None for r in (first, ours)]
            times = [_number(s, _milliseconds) for s in (*seconds, p.row.floor_seconds)]
            ratio = _ratio(ours.speedup, ours.verdict)
            cells.append([f"{p.axis}={p.value}", *times, ratio, _noise(p.row)])
        made.append(Table(title, header, cells, left=1))
    return made


def of_peer(row: Row, peer: str) -> Result:
    """A peer's part of a row, empty where it has none."""
    return next((r for r in row.results if r.peer == peer), Result(peer))


def _short(result: Result) -> str:
    if result.problem:
        return f"{WRONG}{result.problem}"
    if result.speedup is None:
        return ""
    return f"{'tie, ' if result.verdict == 'tie' else ''}{result.speedup.median:.2f}"


def _noise(row: Row) -> str:
    return f"{row.noise.lower:.2f}..{row.noise.upper:.2f}"


def grid_point(row: Row) -> tuple[str, int, int] | None:
    """Cell, hidden size and batch, of a case of the grid."""
    found = re.fullmatch(r"grid-(\w+)-h(\d+)-b(\d+)", row.case)
    return (found[1], int(found[2]), int(found[3])) if found else None


def _headline(title: str, rows: list[Row], shapes: bool) -> Table:
    reference = rows[0].results[0].peer
    header = ["case", "layers, T steps, B rows", f"{reference} tokens/s", f"{OURS} tokens/s"]
    header += ["faster", "us/step", "graph", "floor", "saved", "noise", "ahead"]
    cells = []
    for row in rows:
        first = row.results[0]
        ours = next((r for r in row.results if r.peer == OURS), Result(OURS, "not measured"))
        cells.append(
            [
                row.case,
                row.shape if shapes else "",
                _speed(first),
                _speed(ours),
                _ratio(ours.speedup, ours.verdict),
                _number(ours.step_seconds, lambda s: _significant(s * 1e6)),
                _ratio(ours.graph_speedup, None),
                _number(_floor(ours), "{:.0%}".format),
                _number(_saved(first, ours), "{:.2f}".format),
                _noise(row),
                ", ".join(_ahead(row)),
            ]
        )
    if mean := geometric_mean(rows):
        title = f"{title}, geometric mean {mean:.2f} times as fast"
    # The name of a case hints at its shape.
    return Table(title, header, cells, spare=1).without_empty_columns()


def speeds(row: Row) -> list[str]:
    """tokens/s of the first peer and of fusedrnn."""
    return [_speed(row.results[0]), _speed(of_peer(row, OURS))]


def ratio(row: Row) -> str:
    """fusedrnn's speed as a multiple of the first peer's, and who is faster than fusedrnn."""
    first = row.results[0].peer  # which the number tells about
    return ", ".join([_short(of_peer(row, OURS)), *_ahead(row, first)])


def _ahead(row: Row, but: str = "") -> list[str]:
    found = [(r.peer, r.lead) for r in row.ahead() if r.peer != but]
    return [f"{peer} {1 / lead.median:.2f}" for peer, lead in found if lead]


def geometric_mean(rows: Sequence[Row]) -> float | None:
    """Of fusedrnn's speed as a multiple of torch.nn's, over two rows or more."""
    ratios = [s.median for row in rows if (s := of_peer(row, OURS).speedup)]
    return statistics.geometric_mean(ratios) if len(ratios) > 1 else None


def _saved(first: Result, ours: Result) -> float | None:
    if not first.saved_bytes or ours.saved_bytes is None:
        return None
    return ours.saved_bytes / first.saved_bytes


def details(rows: Sequence[Row]) -> list[Table]:
    """All that was measured: a line for each peer of each case."""
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


def training(jobs: Sequence[Training], shapes: bool = True) -> list[Table]:
    """The book's loop, beside the speeds that its readers reported."""
    groups: dict[str, list[Training]] = {}
    for job in jobs:
        where = _threads(job.threads) if job.device == "cpu" else job.device
        groups.setdefault(f"the book's training loop, float32, {where}", []).append(job)
    return [_training(title, group, shapes) for title, group in groups.items()]


def _training(title: str, jobs: Sequence[Training], shapes: bool) -> Table:
    header = ["job", "layers, T steps, B rows", "torch.nn tokens/s", f"{OURS} tokens/s", "faster"]
    header += ["reported"]
    cells = []
    for job in jobs:
        speeds = [f"{speed:,.0f}" for speed in job.tokens_per_second]
        if job.problem:
            speeds[1] = f"{WRONG}{job.problem}"
        ratio = "" if job.problem else _ratio(job.speedup, job.verdict)
        reported = ", ".join(f"{n:,}" for n in REPORTED.get(job.job, ()))
        cells.append([job.job, job.shape if shapes else "", *speeds, ratio, reported])
    return Table(title, header, cells, spare=1).without_empty_columns()


def _threads(number: int) -> str:
    return f"{number} thread{'s' * (number > 1)}"


def _groups(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of one mode, dtype, device and number of threads, with a title."""
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


def _milliseconds(seconds: float) -> str:
    return _significant(seconds * 1e3)


def _significant(value: float) -> str:
    """Three significant digits, and all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
