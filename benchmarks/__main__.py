"""The command line: ``python -m benchmarks``, in a clone, with the extra ``[bench]`` installed."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import compare, machine, pages, peers, plots, report, sweeps, tables, training
from benchmarks.cases import CASES, GATES, MODES, select
from benchmarks.measure import QUICK, Budget
from benchmarks.report import Report
from benchmarks.suite import Row, rows
from fusedrnn.demo.options import positive, positive_number

DTYPES = ("float32", "float64", "bfloat16", "float16")
PARTS = ("cases", "sweeps", "training")


def some_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
    """An argparse type: words of ``choices``, separated by commas."""

    def parse(text: str) -> list[str]:
        words = text.split(",")
        for word in words:
            if word not in choices:
                raise argparse.ArgumentTypeError(f"'{word}' is none of {', '.join(choices)}")
        return words

    return parse


def positive_integers(text: str) -> list[int]:
    """An argparse type: integers of at least 1, separated by commas."""
    return [positive(word) for word in text.split(",")]


def whole_numbers(text: str) -> list[int]:
    """An argparse type: integers of at least 0, separated by commas."""
    found = [int(word) for word in text.split(",")]
    if min(found) < 0:
        raise argparse.ArgumentTypeError(f"'{text}' has a number below 0")
    return found


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Checks fusedrnn and its peers against float64 and times them in turns.",
        epilog=f"cases: {', '.join(case.name for case in CASES)}, grid. "
        f"peers: {'; '.join(peer.name for peer in peers.PEERS)}.",
    )
    what = parser.add_argument_group("measurement")
    add = what.add_argument
    add(
        "--case",
        action="append",
        default=[],
        metavar="TEXT",
        help="only cases with TEXT in their names; repeatable",
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
        help="measured against torch.nn; repeatable (default: all that are installed; "
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
        type=whole_numbers,
        default=[0],
        metavar="LIST",
        help="measure while other processes keep N CPUs busy, for each N (default: 0)",
    )
    add("--device", metavar="NAME", help="such as cuda:0 (default: a GPU if there is one)")
    add(
        "--seconds",
        type=positive_number,
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
        help="measure nothing: report earlier runs; of rows measured twice the later one is shown",
    )
    add = parser.add_argument_group("output").add_argument
    add("--out", type=Path, metavar="FILE.json", help="save the runs")
    add("--plots", type=Path, metavar="DIR", help="draw ratios and sweeps, as PNG and SVG")
    add(
        "--compare",
        type=Path,
        metavar="OLD.json",
        help="print changes beyond the noise since then; exit code 1 for a regression",
    )
    add(
        "--docs",
        action="store_true",
        help="measure nothing: update docs/results.md and the README from benchmarks/results/",
    )
    return parser


def command_of(options: argparse.Namespace) -> str:
    """The command that repeats a measurement, without its outputs."""
    words = ["python", "-m", "benchmarks"]
    for name in ("case", "peer"):
        for value in getattr(options, name):
            words += [f"--{name}", value]
    for name in ("cell", "mode", "dtype", "part", "sweep", "threads"):
        if value := getattr(options, name):
            words += [f"--{name}", ",".join(map(str, value))]
    if options.busy != [0]:
        words += ["--busy", ",".join(map(str, options.busy))]
    if options.device:
        words += ["--device", options.device]
    if options.seconds:
        words += ["--seconds", f"{options.seconds:g}"]
    if options.quick:
        words.append("--quick")
    return shlex.join(words)


def run(options: argparse.Namespace, console: Console, busy: int = 0) -> Report:
    """Measures what ``options`` ask for while ``busy`` CPUs are kept busy."""
    budget = QUICK if options.quick else Budget()
    if options.seconds:
        budget = dataclasses.replace(budget, seconds=options.seconds)
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:  # which lists every device that torch has heard of
        raise ValueError(f"torch has no device {name!r}: write cpu or cuda") from None
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
    environment = machine.environment(device, busy)  # first: it records the load
    if not options.peer and not options.quick and "cases" in parts:
        asked = itertools.product(cases, modes, dtypes)
        environment["absent"] = peers.absent(peers.Question(*q, device) for q in asked)
        for name in environment["absent"]:
            console.print(f"not installed, and not measured: {name}", markup=False)
    made = Report(environment, command_of(options))
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
    found = {"cases": made.rows, "sweeps": made.sweeps, "training": made.training}
    totals: dict[str, int | None] = dict.fromkeys(PARTS)
    totals["cases"] = len(cases) * len(modes) * len(dtypes) * len(threads)
    totals["training"] = len(jobs) * len(threads)
    with machine.kept_busy(busy):
        for part in parts:
            for item in _with_progress(steps[part], part, totals[part], console):
                found[part].append(item)  # type: ignore[attr-defined]
    return made


def _with_progress(
    items: Iterator[object], part: str, total: int | None, console: Console
) -> Iterator[object]:
    """``items``; prints a line for each as it arrives, above a progress bar."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        task = progress.add_task(part, total=total)
        for item in items:
            progress.console.print(line_of(item), style="dim", markup=False, highlight=False)
            progress.advance(task)
            yield item


def line_of(item: object) -> str:
    """One line for a new result."""
    if isinstance(item, training.Training):
        return f"{item.job}, training loop, threads={item.threads}: {item.speedup.median:.2f}"
    row = item.row if isinstance(item, sweeps.Point) else item
    assert isinstance(row, Row)
    words = []
    for result in row.results[1:]:
        if result.speedup and result.verdict:
            words.append(f"{result.peer} {result.speedup.median:.2f} ({result.verdict})")
        else:
            words.append(f"{result.peer} {result.problem or 'no ratio'}")
    return f"{row.case}, {row.mode}, {row.dtype}, threads={row.threads}: {', '.join(words)}"


def show(run: Report, console: Console) -> None:
    shown = tables.headlines(run.rows) + tables.grids(run.rows)
    if any(len(row.results) > 2 for row in run.rows):
        shown += tables.details(run.rows)
    shown += tables.training(run.training) + tables.sweeps(run.sweeps)
    for table in shown:
        console.print(table.rich(console.width))
    notes = [tables.NOTE] if run.rows else []
    notes += [tables.TRAINING_NOTE] if run.training else []
    for text, style in ((report.caption(run.environment), None), *((n, "dim") for n in notes)):
        console.print(text, style=style, markup=False, highlight=False)
    for problem in run.problems():
        console.print(f"INCORRECT: {problem}", style="bold red", markup=False, highlight=False)


def compared(old: Sequence[Report], new: Sequence[Report], console: Console) -> bool:
    """Prints what changed; returns whether there is a regression."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False)

    for difference in compare.unlike(old, new):
        say(f"the runs differ in {difference}")
    if missing := compare.unmatched(old, new):
        say(f"rows of the old runs that were not measured now: {missing}")
    found = compare.changes(old, new)
    for change in found:
        say(str(change))
    if not found:
        say("no change beyond the noise")
    return any(change.regression for change in found)


def measured(options: argparse.Namespace, console: Console) -> list[Report]:
    """The runs that ``options`` ask for: a new one, or those of files."""
    if not options.sources:
        return [run(options, console, busy) for busy in options.busy]
    return report.latest([r for path in options.sources for r in report.load(path)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 for incorrect results or a regression, 2 for unusable arguments."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.docs:
            pages.write_docs()
            return 0
        if options.out and options.out.suffix != ".json":
            raise ValueError(f"--out is the name of a file, such as {options.out}.json")
        old = report.load(options.compare) if options.compare else []  # before the long part
        for folder in filter(None, (options.plots, options.out and options.out.parent)):
            folder.mkdir(parents=True, exist_ok=True)
        runs = measured(options, console)
        if options.compare and not compare.common(old, runs):
            raise ValueError("the runs have no row in common: there is nothing to compare")
    except (OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    if options.out:
        report.save(runs, options.out)
    if options.plots:
        plots.save(runs, options.plots)
    for each in runs:
        show(each, console)
    worse = compared(old, runs, console) if options.compare else False
    return 1 if worse or any(each.problems() for each in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
