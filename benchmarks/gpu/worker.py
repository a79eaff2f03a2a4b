"""Does items and writes a journal: a process for ``supervise``.

python -m benchmarks.gpu.worker ITEMS.json JOURNAL --device cuda

An item has an id and a kind: the driver's answers, a canary, a microbenchmark or a timed point.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
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
from benchmarks.gpu import canaries, micro, process, supervise
from benchmarks.gpu.points import CHECK_STEPS, LEFT_OUT, Point, Work
from benchmarks.measure import Budget, Replay, Unit
from benchmarks.peers import PEERS
from fusedrnn import cuda

BUILD = {peer.name: peer.build for peer in PEERS}
PLAN = "FUSEDRNN_PLAN"


class Clerk:
    """Measures points on one device and checks each case once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._checked: dict[tuple[Work, str], tuple[float, str | None]] = {}
        self._expected: dict[tuple[Case, str, bool], check.Expected] = {}

    def measure(self, point: Point) -> dict[str, Any]:
        """Seconds of every work in each round; incorrect works have a problem and no times."""
        os.environ[PLAN] = point.plan  # which the kernels read at every call; empty: their choice
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
                entry["error"], entry["problem"] = self._check(work, point.plan)
                entry["problem"] = entry["problem"] or self._not_ours(entry["plan"], point.plan)
            if entry["problem"] is None and not _finite(unit):
                entry["problem"] = "not finite"
            if entry["problem"] is not None:
                continue
            if work.mode != "inference" and not point.plan:
                entry["saved_bytes"] = unit.saved_bytes()
            timed.append((entry, "seconds", unit))
            if point.graph and self._device.type == "cuda":
                replay, why = self._replay(unit)
                entry["graph_problem"] = why
                if replay is not None and why is None:
                    timed.append((entry, "graph_seconds", replay))
        if timed:
            budget = Budget(seconds=point.seconds, rounds=point.rounds, turn=0.003)
            times = measure.interleave([work for _, _, work in timed], budget)
            for (entry, key_of_times, _), seconds in zip(timed, times, strict=True):
                entry[key_of_times] = seconds
        return {"works": found}

    def _replay(self, unit: Unit) -> tuple[Replay | None, str | None]:
        replay, why, lost = supervise.attempt(
            partial(Replay, unit), partial(measure.lost, self._device)
        )
        if lost:
            raise RuntimeError(f"the GPU was lost in a capture: {why}")
        if replay is not None:
            why = differences(replay.results(), unit.results())
        return replay, why

    def _not_ours(self, plan: str, forced: str) -> str | None:
        """The reason if other kernels than those of the point would run.

        A call that would be stepwise, or of families that are struck out, is torch.nn's by intent,
        unless a plan is forced.
        """
        if self._device.type != "cuda":  # under the emulator, explain tells of the CPU's plan
            return None
        theirs = "torch.nn's own kernels" in plan
        meant = "would be stepwise" in plan or "found wrong on this device" in plan
        if theirs and (forced or not meant):
            return f"something else would run: {plan}"
        return None

    def _inputs(self, case: Case, dtype: str) -> tuple[nn.RNNBase, Data]:
        kind = getattr(torch, dtype)
        return case.module(kind, self._device), case.data(kind, self._device)

    def _unit(self, work: Work, layer: nn.RNNBase, data: Data) -> tuple[Unit, nn.RNNBase]:
        module: Any = BUILD[work.peer](layer, data.input)
        setting = _setting(work)
        return Unit(module, data, work.mode, work.case.input_grad, setting), module

    def _check(self, work: Work, plan: str) -> tuple[float, str | None]:
        """The error of a case against float64, and its problem, if any.

        Long sequences are shortened: the kernels are the same, and float64 would take too long. The
        tests check long ones.
        """
        steps = min(work.case.steps, CHECK_STEPS)
        shortest = min(work.case.shortest, steps // 4)
        case = dataclasses.replace(work.case, name="", steps=steps, shortest=shortest)
        work = dataclasses.replace(work, case=case)
        if (work, plan) not in self._checked:
            dtype = getattr(torch, work.dtype)
            key = case, work.dtype, work.tf32
            if key not in self._expected:
                self._expected[key] = check.expect(case, dtype, self._device, _setting(work))
            for mode in (work.mode,) if plan else MODES:
                asked = dataclasses.replace(work, mode=mode)
                results = self._unit(asked, *self._inputs(case, work.dtype))[0].results()
                problem = check.problem(results, self._expected[key], mode)
                self._checked[asked, plan] = check.error(results, self._expected[key]), problem
        return self._checked[work, plan]


def _setting(work: Work) -> measure.Setting:
    return nullcontext if work.tf32 else measure.no_tf32


def _plan(module: nn.RNNBase, data: Data) -> str:
    try:
        return fusedrnn.explain(module, data.input)
    except ValueError as error:  # the forced plan does not support it; the call raises too
        return str(error)


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str | None:
    """A result of a replay that differs from the same call by more than rounding."""
    for name, t in expected.items():
        if not (found[name] - t).norm() <= 1e-2 * t.norm():  # unlike >, true for NaN
            return f"{name} of the replayed graph differs"
    return None


def _finite(unit: Unit) -> bool:
    return all(bool(t.isfinite().all()) for t in unit.results().values())


def driver(device: torch.device, emulated: bool) -> dict[str, Any]:
    """What the planner asks of the device."""
    return {"spec": process.stand_in().SPEC if emulated else cuda.spec(device)}


def clusters(emulated: bool) -> dict[str, Any]:
    """Which clusters fit, as the driver says."""
    few: dict[str, Any] = {"sizes": (1, 2), "shared": (1024,), "most": 2} if emulated else {}
    return micro.fitting(micro.Library(), **few)


def do(items: list[dict[str, Any]], journal: supervise.Journal, device: str) -> int:
    """Works through the items that the journal does not have; returns the exit code."""
    where = process.begin(device)
    clerk = Clerk(where)
    kinds: dict[str, Any] = {
        "driver": lambda item: driver(where, device == process.EMULATOR),
        "clusters": lambda item: clusters(device == process.EMULATOR),
        "micro": lambda item: micro.Library().run(micro.Micro(**item["micro"])),
        "point": lambda item: clerk.measure(Point.of(item["point"])),
    }
    for item in items:
        if item["id"] in journal.done:
            continue
        journal.start(item["id"])
        work = partial(kinds[item["kind"]], item)
        found, problem, lost = supervise.attempt(work, partial(measure.lost, where))
        if problem is not None:
            # An unsupported shape and a family that is struck out are no failures of this item.
            left_out = next((text for text in LEFT_OUT if text in problem), None)
            found = {"left_out" if left_out else "problem": problem}
        journal.finish(item["id"], **found)
        if lost:
            return supervise.LOST
    return 0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("items", type=Path)
    parser.add_argument("journal", type=Path)
    parser.add_argument("--device", required=True)
    options = parser.parse_args()
    journal = supervise.Journal(options.journal)
    items = json.loads(options.items.read_text())
    birds = [item for item in items if item["kind"] == "canary"]
    if birds:
        canaries.run(birds, journal, options.device)
        return 0
    return do(items, journal, options.device)


if __name__ == "__main__":
    sys.exit(main())
