"""``python -m benchmarks.gpu --out DIR``, on a machine with a GPU and fusedrnn installed.

It installs nothing and needs torch alone; the tests need pytest and hypothesis.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import compact, machine
from benchmarks.gpu import checks, points, summary, supervise
from benchmarks.gpu.points import BACKENDS, Point, Sizes
from fusedrnn.demo.options import positive_number

# Stages in order, with their shares of the time; later stages get what earlier ones leave.
SHARES = {"tests": 3.0, "sanitizer": 1.5, "latency": 1.2, "targets": 2.3}
SILENCE = 60.0  # seconds that a point may take
RESERVE = 10.0  # seconds for the summary


class Command:
    """One run: its folder, device, clock and findings."""

    def __init__(self, folder: Path, device: str, stages: Sequence[str], minutes: float) -> None:
        self._folder, self._device, self._stages = folder, device, list(stages)
        self._logs = folder / "logs"
        self._logs.mkdir(parents=True, exist_ok=True)
        for old in self._logs.iterdir():  # journals of an earlier run would be resumed
            old.unlink()
        self._end = time.monotonic() + minutes * 60 - RESERVE
        self._sizes: Sizes = points.TRY if device == "cpu" else points.CUDA
        self.data: dict[str, Any] = {
            "environment": machine.environment(torch.device(device)),
            "minutes": minutes,
        }

    def run(self) -> None:
        """Runs the stages; a stage that fails does not stop the next, and findings are saved."""
        stages: dict[str, Callable[[float], dict[str, Any]]] = {
            "tests": lambda deadline: checks.tests(self._logs, deadline),
            "sanitizer": lambda deadline: checks.sanitizer(self._logs, deadline, self._device),
            "latency": self._latency,
            "targets": self._targets,
        }
        order = [name for name in SHARES if name in self._stages]
        for i, name in enumerate(order):
            start = time.monotonic()
            share = SHARES[name] / sum(SHARES[later] for later in order[i:])
            deadline = start + max(0.0, self._end - start) * share
            print(f"{name}: up to {deadline - start:.0f} s", flush=True)
            try:
                found = stages[name](deadline)
            except Exception as error:  # including errors of this command
                found = {**summary.NOTHING, "incomplete": f"{type(error).__name__}: {error}"}
            self.data[name] = {**found, "wall_seconds": time.monotonic() - start}
            self.save()

    def save(self) -> None:
        path = self._folder / "gpu.json"
        path.write_text(compact.dumps(self.data, 3))
        (self._folder / "gpu.md").write_text(summary.markdown(path))

    def _latency(self, deadline: float) -> dict[str, Any]:
        found: dict[str, Any] = {}
        incomplete, planned = [], 0
        kinds = (None, *BACKENDS)
        for i, backend in enumerate(kinds):
            todo = list(points.latency(self._sizes, (backend,)))
            planned += len(todo)
            now = time.monotonic()
            until = now + max(0.0, deadline - now) / (len(kinds) - i)
            outcome = self._work(f"latency-{backend or 'plan'}", todo, until, backend)
            found |= outcome.found
            if outcome.incomplete:
                incomplete.append(f"{backend or 'plan'}: {outcome.incomplete}")
        return {"found": found, "planned": planned, "incomplete": "; ".join(incomplete) or None}

    def _targets(self, deadline: float) -> dict[str, Any]:
        named, grid = list(points.named(self._sizes)), points.grid(self._sizes)
        outcome = self._work("targets", [*named, *grid], deadline)
        return {
            "found": outcome.found,
            "planned": len(named) + len(grid),
            "grid": len(grid),
            "incomplete": outcome.incomplete,
        }

    def _work(
        self, name: str, todo: Sequence[Point], deadline: float, backend: str | None = None
    ) -> supervise.Outcome:
        given = self._logs / f"{name}.points.json"
        given.write_text(json.dumps([point.as_json() for point in todo]))
        journal = self._logs / f"{name}.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu.worker", str(given), str(journal)]
        outcome = supervise.supervise(
            [*command, "--device", self._device],
            journal,
            self._logs / f"{name}.log",
            deadline,
            SILENCE,
            {**checks.python_path(), **({"FUSEDRNN_PLAN": backend} if backend else {})},
        )
        if len(outcome.found) == len(todo):  # complete, however the process ended
            outcome.incomplete = None
        return outcome


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Runs GPU tests, compute-sanitizer, latencies of a step, and targets against "
        "torch.nn within minutes.",
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="for gpu.json, gpu.md and logs/")
    add("--device", default="cuda", help="default: cuda; cpu tries the command on tiny sizes")
    add("--minutes", type=positive_number, default=8.0, help="total duration (default: 8)")
    add(
        "--only",
        default=",".join(SHARES),
        metavar="LIST",
        help=f"of {', '.join(SHARES)} (default: all)",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 for failed, incorrect or omitted work, 2 for wrong usage."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    stages = options.only.split(",")
    if unknown := [name for name in stages if name not in SHARES]:
        parser.error(f"'{unknown[0]}' is none of {', '.join(SHARES)}")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error("torch finds no GPU; --device cpu tries the command on tiny sizes")
    words = ["python", "-m", "benchmarks.gpu"]
    words += ["--device", options.device] if options.device != "cuda" else []
    words += ["--only", options.only] if options.only != ",".join(SHARES) else []
    words += ["--minutes", f"{options.minutes:g}"] if options.minutes != 8 else []
    command = Command(options.out, options.device, stages, options.minutes)
    command.data["command"] = shlex.join(words)
    try:
        command.run()
    except KeyboardInterrupt:
        print("interrupted; findings so far:", flush=True)
    command.save()
    print(summary.text(command.data))
    return 0 if summary.good(command.data) else 1


if __name__ == "__main__":
    sys.exit(main())
