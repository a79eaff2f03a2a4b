"""The command line: ``python -m benchmarks``, in a clone, with the extra ``[bench]`` installed."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import compare, machine, pages, peers, plots, sweeps, tables, training
from benchmarks.cases import CASES, GATES, MODES, select
from benchmarks.measure import QUICK, Budget
from benchmarks.report import Report, caption
from benchmarks.suite import Row, rows

DTYPES = ("float32", "float64", "bfloat16", "float16")
PARTS = ("cases", "sweeps", "training")
OUTPUTS = ("results.json", "results.md")


def some_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: some of ``choices``, separated by commas."""

    def parse(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in choices:
                raise argparse.ArgumentTypeError(f"'{word}' is none of {', '.join(choices)}")
        return words

    return parse


def positive_integers(text: str) -> list[int]:
    """An argparse type: integers of at least 1, separated by commas."""
    numbers = [int(word) for word in text.split(",")]
    if min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {min(numbers)}")
    return numbers


def positive_seconds(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text}")
    return value


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Checks fusedrnn and its peers against float64, then times them in turns.",
        epilog=f"cases: {', '.join(case.name for case in CASES)}, grid. "
        f"peers: {'; '.join(peer.name for peer in peers.PEERS)}.",
    )
    what = parser.add_argument_group("what is measured")
    add = what.add_argument
    add(
        "--case",
        action="append",
        default=[],
        metavar="TEXT",
        help="only cases with TEXT in their names; may be repeated",
    )
    lists = {
        "cell": (tuple(GATES), "RNN,GRU,LSTM; sweeps: LSTM"),
        "mode": (MODES, f"{','.join(MODES)}; quick: {','.join(MODES[:2])}"),
        "dtype": (DTYPES, "float32,bfloat16; quick: float32"),
        "part": (PARTS, "cases,sweeps,training; with --case or --quick: cases"),
        "sweep": (sweeps.AXES, "all of them"),
    }
    for name, (choices, default) in lists.items():
        text = f"of {', '.join(choices)} (default: {default})"
        add(f"--{name}", type=some_of(choices), metavar="LIST", help=text)
    add(
        "--peer",
        action="append",
        default=[],
        metavar="NAME",
        help="besides torch.nn; may be repeated (default: all that are installed; "
        "quick and sweeps: fusedrnn)",
    )
    add(
        "--threads",
        type=positive_integers,
        metavar="LIST",
        help="numbers of CPU threads, such as 1,2 (default: torch's choice)",
    )
    add(
        "--busy",
        type=int,
        default=0,
        metavar="N",
        help="beside other processes that keep N of the CPUs busy (default: none)",
    )
    add("--device", metavar="NAME", help="such as cuda:0 (default: a GPU if there is one)")
    add(
        "--seconds",
        type=positive_seconds,
        metavar="X",
        help=f"for each measurement (default: {Budget().seconds:g}, quick: {QUICK.seconds:g})",
    )
    add("--quick", action="store_true", help="short sequences, few repetitions: under a minute")
    add(
        "--from",
        type=Path,
        action="append",
        dest="sources",
        metavar="FILE",
        help="measure nothing: report the results.json of an earlier run, or of several as one",
    )
    add = parser.add_argument_group("what comes of it").add_argument
    add("--out", type=Path, metavar="DIR", help=f"write {' and '.join(OUTPUTS)} and plots there")
    add(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="print what moved beyond noise since then; exit code 1 if anything got worse",
    )
    add(
        "--docs",
        action="store_true",
        help="measure nothing: make docs/results.md and the README's tables of benchmarks/results/",
    )
    return parser


def command_of(options: argparse.Namespace) -> str:
    """The command that repeats a measurement: what goes where is left out."""
    words = ["python", "-m", "benchmarks"]
    for name in ("case", "peer"):
        for value in getattr(options, name):
            words += [f"--{name}", value]
    for name in ("cell", "mode", "dtype", "part", "sweep", "threads"):
        if value := getattr(options, name):
            words += [f"--{name}", ",".join(map(str, value))]
    if options.busy:
        words += ["--busy", str(options.busy)]
    if options.device:
        words += ["--device", options.device]
    if options.seconds:
        words += ["--seconds", f"{options.seconds:g}"]
    if options.quick:
        words.append("--quick")
    return shlex.join(words)


def run(options: argparse.Namespace, console: Console) -> Report:
    """Measures what ``options`` ask for."""
    budget = QUICK if options.quick else Budget()
    if options.seconds:
        budget = dataclasses.replace(budget, seconds=options.seconds)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch finds no GPU")
    chosen = peers.choose(options.peer)
    if not options.peer and options.quick:
        chosen = list(peers.QUICK_PEERS)
    dtypes = options.dtype or (["float32"] if options.quick else ["float32", "bfloat16"])
    dtypes = [getattr(torch, name) for name in dtypes]
    modes = options.mode or list(MODES[:2] if options.quick else MODES)
    threads = options.threads or [torch.get_num_threads()]
    parts = options.part or (["cases"] if options.case or options.quick else list(PARTS))
    cases = select(options.case, options.cell or (), device.type, options.quick)
    jobs = [job for job in training.JOBS if not options.cell or job.cell in options.cell]
    environment = machine.environment(device, options.busy)  # first: the load is that of others
    report = Report(environment, command_of(options))
    steps = {
        "cases": rows(cases, modes, dtypes, threads, device, budget, chosen),
        "sweeps": sweeps.points(
            options.sweep or sweeps.AXES,
            options.cell or ["LSTM"],
            modes,
            dtypes[:1],
            threads[0],
            device,
            budget,
        ),
        "training": training.train(jobs, threads, device, budget),
    }
    found = {"cases": report.rows, "sweeps": report.sweeps, "training": report.training}
    totals: dict[str, int | None] = dict.fromkeys(PARTS)
    totals["cases"] = len(cases) * len(modes) * len(dtypes) * len(threads)
    totals["training"] = len(jobs) * len(threads)
    with machine.kept_busy(options.busy):
        for part in parts:
            for item in _with_progress(steps[part], part, totals[part], console):
                found[part].append(item)  # type: ignore[attr-defined]
    return report


def _with_progress(
    items: Iterator[object], part: str, total: int | None, console: Console
) -> Iterator[object]:
    """``items``, with a bar below the line that each gets as soon as it is there."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(part, total=total)
        for item in items:
            progress.console.print(line_of(item), style="dim", markup=False, highlight=False)
            progress.advance(task)
            yield item


def line_of(item: object) -> str:
    """One line for what has just been measured."""
    if isinstance(item, training.Training):
        return f"{item.job}, training loop, threads={item.threads}: {item.speedup.median:.2f}"
    row = item.row if isinstance(item, sweeps.Point) else item
    assert isinstance(row, Row)
    words = []
    for result in row.results[1:]:
        if result.speedup and result.verdict:
            words.append(f"{result.peer} {result.speedup.median:.2f} ({result.verdict})")
        else:
            words.append(f"{result.peer} {result.problem or 'without a ratio'}")
    return f"{row.case}, {row.mode}, {row.dtype}, threads={row.threads}: {', '.join(words)}"


def show(report: Report, console: Console) -> None:
    shown = tables.headlines(report.rows) + tables.grids(report.rows)
    if any(len(row.results) > 2 for row in report.rows):
        shown += tables.details(report.rows)
    shown += tables.training(report.training)
    for table in shown:
        console.print(table.rich(console.width))
    notes = [tables.NOTE] if report.rows else []
    notes += [tables.TRAINING_NOTE] if report.training else []
    for text, style in ((caption(report.environment), None), *((note, "dim") for note in notes)):
        console.print(text, style=style, markup=False, highlight=False)
    for problem in report.problems():
        console.print(f"WRONG: {problem}", style="bold red", markup=False, highlight=False)


def write(report: Report, folder: Path) -> None:
    report.save(folder / OUTPUTS[0])
    figures = plots.save(report, folder)
    (folder / OUTPUTS[1]).write_text(pages.page(report, figures))


def compared(old: Report, new: Report, console: Console) -> bool:
    """Prints what moved; whether anything got worse."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    for difference in compare.unlike(old, new):
        say(f"not the same: {difference}")
    if missing := compare.unmatched(old, new):
        say(f"{missing} rows of the old report are not in this one")
    found = compare.changes(old, new)
    for change in found:
        say(str(change))
    if not found:
        say("nothing moved beyond the noise")
    return any(change.regression for change in found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if anything is wrong or got worse, 2 for unusable arguments."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.docs:
            pages.write_docs()
            return 0
        old = Report.load(options.compare) if options.compare else None  # before the long part
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
        if options.sources:
            report = Report.join([Report.load(path) for path in options.sources])
        else:
            report = run(options, console)
        if old and not {row.key for row in old.rows} & {row.key for row in report.rows}:
            raise ValueError("the two runs have no row in common, so there is nothing to compare")
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    if options.out:
        write(report, options.out)
    show(report, console)
    worse = compared(old, report, console) if old else False
    return 1 if worse or report.problems() else 0


if __name__ == "__main__":
    sys.exit(main())
