"""``python -m fusedrnn check``: every kernel family against plain PyTorch in float64.

Each family runs in a process of its own, with a time limit: one that crashes, or never returns,
costs the others nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from fusedrnn import _C, cuda, families

SECONDS = 120.0  # that a family may take, on a machine that is busy too
JOBS = 4  # processes at once, at most


class Task(NamedTuple):
    """A family, and a function of its arguments that says what is wrong with it, or None."""

    group: str  # the line of the table
    name: str
    function: Callable[..., str | None]
    arguments: tuple[Any, ...]


class Result(NamedTuple):
    task: Task
    problem: str | None
    seconds: float


def check_cpu(family: families.CpuFamily) -> str | None:
    """In a new process: the instruction set is chosen at the first call."""
    os.environ["FUSEDRNN_CPU"] = family.variant
    if _C.cpu_variant() != family.variant:
        return f"did not run: this processor runs {_C.cpu_variant()}"
    return families.cpu_problem(family)


def check_cuda(number: int, index: int) -> str | None:
    os.environ[cuda.SWITCH] = "on"
    os.environ.pop("FUSEDRNN_PLAN", None)
    device = torch.device("cuda", index)
    with torch.cuda.device(device):
        return families.problem(families.by_number(number), cuda.OPS, device)


def cpu_tasks() -> list[Task]:
    return [Task(f"CPU {f.variant}", f.name, check_cpu, (f,)) for f in families.cpu_families()]


def cuda_tasks() -> list[Task]:
    """Of every GPU that torch finds and the binary has code for."""
    tasks = []
    for index in range(torch.cuda.device_count()):
        if cuda.missing(torch.device("cuda", index)):
            continue
        spec = cuda.spec(torch.device("cuda", index))
        for f in families.cuda_families():
            if families.runs_on(f, spec):
                group = f"cuda:{index} {f.exchange}"
                tasks.append(Task(group, f"cuda:{index} {f.name}", check_cuda, (f.number, index)))
    return tasks


def cuda_reasons() -> list[str]:
    """Why a GPU of this machine is not checked."""
    indices = range(torch.cuda.device_count())
    if not indices:
        return ["no GPU: torch finds none"]
    os.environ.pop(cuda.SWITCH, None)
    reasons = [(i, cuda.missing(torch.device("cuda", i))) for i in indices]
    return [f"cuda:{i}: {reason}" for i, reason in reasons if reason]


def _nothing() -> None:
    pass


def _work(connection: Connection, task: Task) -> None:
    torch.set_num_threads(2)  # two threads meet wherever more do
    try:
        problem = task.function(*task.arguments)
    except Exception as error:
        problem = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
    connection.send(problem)


class _Running(NamedTuple):
    task: Task
    process: Any
    connection: Connection
    since: float

    def result(self, problem: str | None) -> Result:
        return Result(self.task, problem, time.monotonic() - self.since)

    def end(self, seconds: float) -> Result | None:
        """What came of it, and the end of its process; None while it may go on."""
        if self.connection.poll():
            with contextlib.suppress(EOFError):
                problem = self.connection.recv()
                self.process.join(5)
                return self._stopped(problem)
            self.process.join(5)
            return self._stopped(f"crashed with exit code {self.process.exitcode}")
        if time.monotonic() - self.since > seconds:
            return self._stopped(f"hangs: no result within {seconds:g} s")
        return None

    def _stopped(self, problem: str | None) -> Result:
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
        self.connection.close()
        return self.result(problem)


def run(tasks: Sequence[Task], seconds: float = SECONDS, jobs: int = JOBS) -> Iterator[Result]:
    """The results as they come. Processes are forked from one that has imported torch only."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusedrnn.check"])
    todo, running = list(reversed(tasks)), list[_Running]()
    first = context.Process(target=_nothing)  # the imports take no family's time
    first.start()
    first.join()
    try:
        while todo or running:
            while todo and len(running) < jobs:
                receiving, sending = context.Pipe(duplex=False)
                task = todo.pop()
                process = context.Process(target=_work, args=(sending, task), daemon=True)
                process.start()
                sending.close()  # so that the end of the process ends the pipe
                running.append(_Running(task, process, receiving, time.monotonic()))
            wait([r.connection for r in running], timeout=0.2)
            for r in list(running):
                result = r.end(seconds)
                if result is not None:
                    running.remove(r)
                    yield result
    finally:
        for r in running:
            r.process.kill()


def table(results: Sequence[Result]) -> str:
    """A line for each group, and one for each family that failed."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.task.group, []).append(result)
    width = max(map(len, groups), default=0)
    lines = []
    for group, found in groups.items():
        failed = [r for r in found if r.problem]
        verdict = f"{len(failed)} WRONG" if failed else "right"
        slowest = max(r.seconds for r in found)
        lines.append(f"{group:{width}}  {len(found):4} families  {verdict}  (to {slowest:.1f} s)")
        lines += [f"  {r.task.name}: {r.problem}" for r in failed]
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("all", "cpu", "cuda"), default="all", help="(default: all)")
    add("--only", default="", metavar="TEXT", help="families whose name has this in it")
    add("--seconds", type=float, default=SECONDS, help=f"of a family (default: {SECONDS:g})")
    add("--jobs", type=int, default=min(JOBS, os.cpu_count() or 1), help="processes at once")


def main(options: argparse.Namespace) -> int:
    """Returns the exit code: 1 where a family is wrong, 2 where there is nothing to check."""
    tasks = cpu_tasks() if options.device != "cuda" else []
    if options.device != "cpu":
        reasons = cuda_reasons()
        print("\n".join(reasons), flush=True) if reasons else None
        tasks += cuda_tasks()
    tasks = [task for task in tasks if options.only in task.name]
    if not tasks:
        print("there is nothing to check")
        return 2
    print(f"{len(tasks)} kernel families, each in a process of its own", flush=True)
    results = []
    for result in run(tasks, options.seconds, options.jobs):
        results.append(result)
        if result.problem:
            print(f"{result.task.name}: {result.problem}", flush=True)
    print(table(results))
    return 1 if any(r.problem for r in results) else 0
