"""What comes out: tables for the terminal, Markdown, JSON, and the tables in the README."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.table
import torch
from rich.box import SIMPLE_HEAD
from rich.markup import escape

import fusedrnn
from benchmarks.measure import Summary
from benchmarks.suite import Result, Row

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
WRONG = "wrong: "
WIDE = 118  # characters that a table with shapes takes
NOTE = (
    "tokens/s: of the median repetition. faster: how many times as fast as {reference}, median and "
    "quartiles over paired repetitions. product rate: what part of the speed of a large matrix "
    "product, measured in between, the layer's own products reach. noise: quartiles of {reference} "
    "against itself."
)


@dataclass(frozen=True)
class Report:
    """A run: where, how, and its rows."""

    environment: dict[str, Any]
    command: str
    rows: list[Row]

    @classmethod
    def load(cls, path: Path) -> Report:
        """Reads what ``save`` wrote."""
        data = json.loads(path.read_text())
        return cls(data["environment"], data["command"], [_row(row) for row in data["rows"]])

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n")


def _row(data: dict[str, Any]) -> Row:
    def summary(value: dict[str, Any] | None) -> Summary | None:
        return None if value is None else Summary(**value)

    results = [
        Result(**{**r, "seconds": summary(r["seconds"]), "speedup": summary(r["speedup"])})
        for r in data["results"]
    ]
    return Row(**{**data, "noise": Summary(**data["noise"]), "results": results})


# ---- where ----


def environment(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "isa": fusedrnn.info()["cpu kernels"].partition(",")[0],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedrnn": fusedrnn.__version__,
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _commit() -> str | None:
    """The commit of this clone, None where there is no clone or no git."""

    def git(*arguments: str) -> str:
        root = Path(__file__).resolve().parent.parent
        run = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit} with changes" if changed else commit


def caption(report: Report) -> str:
    """One sentence on where the figures come from."""
    e = report.environment
    where = f"{e['gpu']} and {e['cpu']}" if e["gpu"] else e["cpu"]
    what = f"torch {e['torch']}, fusedrnn {e['fusedrnn']}"
    if e["commit"]:
        what += f" at {e['commit']}"
    return f"{where}, {e['isa']} kernels, {e['cpus']} CPUs, {what}, {e['date'][:10]}"


# ---- tables ----


@dataclass(frozen=True)
class Table:
    title: str
    header: list[str]
    cells: list[list[str]]


def tables(rows: Sequence[Row]) -> list[Table]:
    """One for each mode, dtype, device and number of threads."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        threads = f"{row.threads} thread{'s' * (row.threads > 1)}"
        where = threads if row.device == "cpu" else f"{row.device}, {threads}"
        groups.setdefault(f"{row.mode}, {row.dtype}, {where}", []).append(row)
    return [_table(title, group) for title, group in groups.items()]


def _table(title: str, rows: list[Row]) -> Table:
    rates = [row.matmul_flops for row in rows]
    low, high = min(rates) / 1e9, max(rates) / 1e9
    span = f"{low:,.0f}" if f"{low:,.0f}" == f"{high:,.0f}" else f"{low:,.0f} to {high:,.0f}"
    title += f", product rate {span} GFLOP/s"
    return Table(title, _header(rows), [_cells(row) for row in rows])


def _header(rows: Sequence[Row]) -> list[str]:
    reference, *others = [result.peer for result in rows[0].results]
    header = ["case", "layers, T steps, B rows", f"{reference} tokens/s"]
    for peer in others:
        header += [f"{peer} tokens/s", "faster"]
    return [*header, "product rate", "noise"]


def _cells(row: Row) -> list[str]:
    def number(value: Any, form: Callable[[Any], str]) -> str:
        return "" if value is None else form(value)

    def quartiles(s: Summary) -> str:
        return f"{s.median:.2f} ({s.lower:.2f}..{s.upper:.2f})"

    cells = [row.case, row.shape]
    for i, result in enumerate(row.results):
        if result.problem:
            cells.append(f"{WRONG}{result.problem}")
        else:
            cells.append(number(result.tokens_per_second, "{:,.0f}".format))
        if i > 0:
            cells.append(number(result.speedup, quartiles))
    fractions = [number(r.matmul_fraction, "{:.0%}".format) or "none" for r in row.results]
    return [*cells, ", ".join(fractions), f"{row.noise.lower:.2f}..{row.noise.upper:.2f}"]


def note(report: Report) -> str:
    return NOTE.format(reference=report.rows[0].results[0].peer) if report.rows else ""


def rich_tables(rows: Sequence[Row], width: int) -> list[rich.table.Table]:
    """For the terminal; a narrow one is not shown the shapes, which the names hint at."""
    columns = range(len(_header(rows)) if rows else 0)
    shown = [i for i in columns if i != 1 or width >= WIDE]
    made = []
    for table in tables(rows):
        out = rich.table.Table(
            title=escape(table.title), title_justify="left", box=SIMPLE_HEAD, padding=0
        )
        for i in shown:
            column = [*table.header[i].split(), *(cells[i] for cells in table.cells)]
            out.add_column(
                escape(table.header[i]),
                justify="left" if i < 2 else "right",
                width=max(len(c) if not c.startswith(WRONG) else 2 * len(WRONG) for c in column),
            )
        for cells in table.cells:
            out.add_row(*(escape(cells[i]) for i in shown))
        made.append(out)
    return made


def markdown(report: Report) -> str:
    """Caption, tables and how to make them again."""
    parts = [f"{caption(report)}. Made by `{report.command}`."]
    for table in tables(report.rows):
        lines = [
            table.header,
            ["---", "---", *["---:"] * (len(table.header) - 2)],
            *([cell.replace("|", "\\|") for cell in cells] for cells in table.cells),
        ]
        parts.append(f"**{table.title[0].upper()}{table.title[1:]}**")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    parts.append(note(report))
    return "\n\n".join(parts) + "\n"


def fill(text: str, content: str) -> str:
    """``text`` with ``content`` in place of what stood between the two markers.

    Raises:
        ValueError: there is not one pair of markers, in that order.
    """
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end or BEGIN in old + after or END in before + after:
        raise ValueError(f"expected one '{BEGIN}' and, behind it, one '{END}'")
    return f"{before}{BEGIN}\n\n{content.strip()}\n\n{END}{after}"
