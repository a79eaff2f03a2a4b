"""Times points and writes a journal: a process for ``supervise``.

python -m benchmarks.gpu.worker POINTS.json JOURNAL --device cuda
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedrnn
from benchmarks import check, measure
from benchmarks.cases import MODES, Case, Data
from benchmarks.gpu import supervise
from benchmarks.gpu.points import CHECK_STEPS, UNFIT, Point, Work
from benchmarks.measure import Budget, Replay, Unit
from benchmarks.peers import PEERS

BUILD = {peer.name: peer.build for peer in PEERS}


class Clerk:
    """Measures points on one device and checks each case once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._checked: dict[Work, tuple[float, str | None]] = {}

    def measure(self, point: Point) -> dict[str, Any]:
        """Seconds of every work in each round; incorrect works have a problem and no times."""
        found: list[dict[str, Any]] = []
        timed: list[tuple[dict[str, Any], str, measure.Work]] = []
        inputs: dict[tuple[Case, str], tuple[nn.RNNBase, Data]] = {}
        for work in point.works:
            key = work.case, work.dtype
            if key not in inputs:
                inputs[key] = self._inputs(*key)
            unit, module = self._unit(work, *inputs[key])
            entry: dict[str, Any] = {"peer": work.peer, "problem": None}
            entry |= {"steps": work.case.steps, "layers": work.case.layers}
            found.append(entry)
            if work.peer == "fusedrnn":
                entry["plan"] = _plan(module, inputs[key][1])
                entry["error"], entry["problem"] = self._check(work, point.backend)
                entry["problem"] = entry["problem"] or self._not_ours(entry["plan"], point.backend)
            if entry["problem"] is None and not _finite(unit):
                entry["problem"] = "not finite"
            if entry["problem"] is not None:
                continue
            if work.mode != "inference":
                entry["saved_bytes"] = unit.saved_bytes()
            timed.append((entry, "seconds", unit))
            if point.graph and self._device.type == "cuda":
                replay, why, lost = supervise.attempt(partial(Replay, unit), self.lost)
                if lost:
                    raise RuntimeError(f"the GPU was lost in a capture: {why}")
                if replay is not None:
                    why = differences(replay.results(), unit.results())
                entry["graph_problem"] = why
                if why is None:
                    timed.append((entry, "graph_seconds", replay))
        if timed:
            budget = Budget(seconds=point.seconds, rounds=point.rounds, turn=0.003)
            times = measure.interleave([work for _, _, work in timed], budget)
            for (entry, key_of_times, _), seconds in zip(timed, times, strict=True):
                entry[key_of_times] = seconds
        return {"works": found}

    def _not_ours(self, plan: str, backend: str | None) -> str | None:
        """The reason if other kernels than those of the point would run."""
        if self._device.type != "cuda":  # a dry run: nothing is forced
            return None
        by_plan = "would be stepwise" in plan  # torch.nn's kernels are what the module runs then
        other = "torch.nn's own kernels" in plan and not by_plan
        if other or (backend is not None and backend not in plan):
            return f"something else would run: {plan}"
        return None

    def lost(self) -> bool:
        """Whether this process can no longer use the GPU."""
        try:
            measure.synchronize(self._device)
        except Exception:
            return True
        return False

    def _inputs(self, case: Case, dtype: str) -> tuple[nn.RNNBase, Data]:
        kind = getattr(torch, dtype)
        return case.module(kind, self._device), case.data(kind, self._device)

    def _unit(self, work: Work, layer: nn.RNNBase, data: Data) -> tuple[Unit, nn.RNNBase]:
        module: Any = BUILD[work.peer](layer, data.input)
        setting = _setting(work)
        return Unit(module, data, work.mode, work.case.input_grad, setting), module

    def _check(self, work: Work, backend: str | None) -> tuple[float, str | None]:
        """The error of a case against float64, and its problem, if any.

        Long sequences are shortened: the kernels are the same, and float64 would take too long. The
        tests check long ones.
        """
        steps = min(work.case.steps, CHECK_STEPS)
        shortest = min(work.case.shortest, steps // 4)
        case = dataclasses.replace(work.case, name="", steps=steps, shortest=shortest)
        work = dataclasses.replace(work, case=case)
        if work not in self._checked:
            dtype = getattr(torch, work.dtype)
            expected = check.expect(case, dtype, self._device, _setting(work))
            # All modes share the expected results, which cost the most. A forced backend may
            # support forward only.
            for mode in (work.mode,) if backend else MODES:
                asked = dataclasses.replace(work, mode=mode)
                results = self._unit(asked, *self._inputs(case, work.dtype))[0].results()
                problem = check.problem(results, expected, mode)
                self._checked[asked] = check.error(results, expected), problem
        return self._checked[work]


def _setting(work: Work) -> measure.Setting:
    return nullcontext if work.tf32 else measure.no_tf32


def _plan(module: nn.RNNBase, data: Data) -> str:
    try:
        return fusedrnn.explain(module, data.input)
    except ValueError as error:  # the forced backend does not support it; the call raises too
        return str(error)


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """A result of a replay that differs from the same call by more than rounding."""
    for name, t in expected.items():
        if not (found[name] - t).norm() <= 1e-2 * t.norm():  # unlike >, true for NaN
            return f"{name} of the replayed graph differs"
    return None


def _finite(unit: Unit) -> bool:
    return all(bool(t.isfinite().all()) for t in unit.results().values())


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("points", type=Path)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    journal = supervise.Journal(options.journal)
    clerk = Clerk(device)
    for data in json.loads(options.points.read_text()):
        point = Point.of(data)
        if point.id in journal.done:
            continue
        journal.start(point.id)
        found, problem, lost = supervise.attempt(partial(clerk.measure, point), clerk.lost)
        if problem is not None:  # an unsupported shape is not a failure
            found = {"unfit" if UNFIT in problem else "problem": problem}
        journal.finish(point.id, **found)
        if lost:
            return supervise.LOST
    return 0


if __name__ == "__main__":
    sys.exit(main())
