"""The command line: ``python -m benchmarks``, in a clone, with the extra ``[bench]`` installed."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import report
from benchmarks.cases import CASES, select
from benchmarks.measure import QUICK, Budget
from benchmarks.suite import MODES, Row, rows

DTYPES = ("float32", "float64", "bfloat16", "float16")
OUTPUTS = ("results.json", "results.md")


def one_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
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
        epilog=f"cases: {', '.join(case.name for case in CASES)}",
    )
    add = parser.add_argument
    add(
        "--case",
        action="append",
        default=[],
        metavar="TEXT",
        help="only cases with TEXT in their names; may be repeated",
    )
    add(
        "--mode",
        type=one_of(MODES),
        default=list(MODES),
        metavar="LIST",
        help=f"default: {','.join(MODES)}",
    )
    add(
        "--dtype",
        type=one_of(DTYPES),
        default=["float32"],
        metavar="LIST",
        help=f"of {', '.join(DTYPES)} (default: float32)",
    )
    add(
        "--threads",
        type=positive_integers,
        metavar="LIST",
        help="numbers of CPU threads, such as 1,2 (default: torch's choice)",
    )
    add("--device", default="cpu", metavar="NAME", help="such as cuda:0 (default: cpu)")
    add(
        "--seconds",
        type=positive_seconds,
        metavar="X",
        help=f"for each measurement (default: {Budget().seconds:g}, quick: {QUICK.seconds:g})",
    )
    add("--quick", action="store_true", help="short sequences, few repetitions: a first look")
    add(
        "--from",
        type=Path,
        dest="source",
        metavar="FILE",
        help="measure nothing: report the results.json of an earlier run",
    )
    add("--out", type=Path, metavar="DIR", help=f"write {' and '.join(OUTPUTS)} there")
    add(
        "--readme",
        type=Path,
        metavar="FILE",
        help=f"put the tables between {report.BEGIN} and {report.END} in FILE",
    )
    return parser


def command_of(options: argparse.Namespace) -> str:
    """The command that repeats a measurement: what goes where is left out."""
    words = ["python", "-m", "benchmarks"]
    for pattern in options.case:
        words += ["--case", pattern]
    for name in ("mode", "dtype", "threads"):
        value = getattr(options, name)
        if value != make_parser().get_default(name):
            words += [f"--{name}", ",".join(map(str, value))]
    if options.device != "cpu":
        words += ["--device", options.device]
    if options.seconds:
        words += ["--seconds", f"{options.seconds:g}"]
    if options.quick:
        words.append("--quick")
    return shlex.join(words)


def run(options: argparse.Namespace, console: Console) -> report.Report:
    """Measures what ``options`` ask for."""
    cases = select(options.case)
    budget = QUICK if options.quick else Budget()
    if options.quick:
        cases = [case.shortened() for case in cases]
    if options.seconds:
        budget = dataclasses.replace(budget, seconds=options.seconds)
    device = torch.device(options.device)
    environment = report.environment(device)  # first, for the load is that of others
    dtypes = [getattr(torch, name) for name in options.dtype]
    threads = options.threads or [torch.get_num_threads()]
    done: list[Row] = []
    for row in rows(cases, options.mode, dtypes, threads, device, budget):
        done.append(row)
        console.print(summary_of(row), style="dim", markup=False, highlight=False)
    return report.Report(environment, command_of(options), done)


def summary_of(row: Row) -> str:
    """One line as soon as a row is there."""
    parts = []
    for result in row.results[1:]:
        if result.speedup:
            parts.append(f"{result.peer} {result.speedup.median:.2f} times as fast")
        else:
            parts.append(f"{result.peer} wrong")
    return f"{row.case}, {row.mode}, {row.dtype}, threads={row.threads}: {', '.join(parts)}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 if anything was computed wrong, 2 for unusable arguments."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    console = Console()
    try:
        if options.readme:  # before the long part
            report.fill(options.readme.read_text(), "")
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
        result = report.Report.load(options.source) if options.source else run(options, console)
    except (OSError, ValueError) as error:
        parser.error(str(error))

    for table in report.rich_tables(result.rows, console.width):
        console.print(table)
    console.print(report.caption(result), markup=False, highlight=False)
    console.print(report.note(result), style="dim", markup=False, highlight=False)
    text = report.markdown(result)
    if options.out:
        result.save(options.out / OUTPUTS[0])
        (options.out / OUTPUTS[1]).write_text(text)
    if options.readme:
        options.readme.write_text(report.fill(options.readme.read_text(), text))
    return 1 if any(r.problem for row in result.rows for r in row.results) else 0


if __name__ == "__main__":
    sys.exit(main())
