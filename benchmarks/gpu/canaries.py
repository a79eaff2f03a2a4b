"""A small case of every kernel family, in processes that may crash or hang.

Families are the package's own: `fusedrnn.families`. Those that differ by the cell alone are one
kernel and share a process; a family that fails is struck out of everything that follows.
"""

from __future__ import annotations

import itertools
import os
import signal
import traceback
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from benchmarks import measure
from benchmarks.gpu import process, supervise
from fusedrnn import families
from fusedrnn.families import Family, problem


def items(spec: Any = None, only: str = "") -> list[dict[str, Any]]:
    """Work of ``worker`` for the families that a GPU of this ``spec`` has; without it, for all.

    ``only`` is a part of their names.
    """
    ordered = sorted(families.cuda_families(), key=_kernel)
    return [
        {"kind": "canary", "id": f.name, "number": f.number}
        for f in ordered
        if only in f.name and (spec is None or families.runs_on(f, spec))
    ]


def _kernel(family: Family) -> tuple[str, str, bool, bool]:
    return family.exchange, family.arithmetic, family.backward, family.chained


def verdicts(found: dict[str, dict[str, Any]]) -> str:
    """What ``process.obey_canaries`` reads: the families that were right, and those that failed."""
    return "\n".join(f"{'-' if line.get('problem') else '+'}{name}" for name, line in found.items())


def run(todo: Iterable[dict[str, Any]], journal: supervise.Journal, device: str) -> None:
    """Each kernel's families in a process of its own, forked before this one has used the GPU."""
    for _, group in itertools.groupby((families.by_number(i["number"]) for i in todo), _kernel):
        left = [family for family in group if family.name not in journal.done]
        while left:
            child = os.fork()
            if child == 0:
                _child(left, journal, device)
            _, status = os.waitpid(child, 0)
            lines = supervise.read(journal.path)
            over = {line["id"] for line in lines if "start" not in line}
            if lines and lines[-1]["id"] not in over:
                journal.finish(lines[-1]["id"], problem=f"the process {_how(status)}")
                over.add(lines[-1]["id"])
            elif not over & {family.name for family in left}:
                raise RuntimeError(f"a process {_how(status)} before its first family")
            left = [family for family in left if family.name not in over]


def _child(group: list[Family], journal: supervise.Journal, device: str) -> None:
    code = 1
    try:
        where = process.begin(device)
        ops = process.stand_in().ops() if device == process.EMULATOR else torch.ops.fusedrnn
        for family in group:
            journal.start(family.name)
            work = partial(problem, family, ops, where)  # not what earlier canaries said
            wrong, error, lost = supervise.attempt(work, partial(measure.lost, where))
            journal.finish(family.name, problem=error or wrong)
            if lost:
                break
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _how(status: int) -> str:
    if os.WIFSIGNALED(status):
        return f"died of {signal.Signals(os.WTERMSIG(status)).name}"
    return f"ended with code {os.WEXITSTATUS(status)}"
