"""Calls for compute-sanitizer and Nsight Compute, without references or clocks.

By itself: small calls of every cell and dtype, forward and backward; odd sizes, lengths, two
directions and layers, one row and many. Calls that a forced backend does not support are left out.
With --points and --id: the calls of one point, twice. Prints the number of calls.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

import fusedrnn
from benchmarks.cases import GATES, Case
from benchmarks.gpu import process
from benchmarks.gpu.points import LEFT_OUT, Point
from benchmarks.measure import Unit, no_tf32

SHAPES = (  # input, hidden, layers, steps, batch, both directions, shortest
    (5, 33, 2, 4, 3, True, 0),
    (16, 64, 1, 5, 17, False, 0),
    (7, 128, 2, 4, 1, False, 0),
    (7, 40, 1, 6, 5, True, 2),
)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def every_kind(device: torch.device) -> int:
    """The number of small calls."""
    calls = 0
    for cell in GATES:
        for dtype in (getattr(torch, name) for name in DTYPES):
            for x, h, layers, steps, batch, both, shortest in SHAPES:
                case = Case("smoke", cell, x, h, layers, steps, batch, both, shortest)
                calls += sum(_call(case, dtype, device, mode) for mode in ("training", "inference"))
    return calls


def of_point(point: Point, device: torch.device) -> int:
    """The number of calls of a point."""
    os.environ["FUSEDRNN_PLAN"] = point.plan
    return sum(
        _call(work.case, getattr(torch, work.dtype), device, work.mode, work.tf32)
        for work in point.works
        for _ in range(2)
    )


def _call(
    case: Case, dtype: torch.dtype, device: torch.device, mode: str, tf32: bool = True
) -> bool:
    """Whether the kernels took the call."""
    module, data = case.module(dtype, device), case.data(dtype, device)
    setting = nullcontext if tf32 else no_tf32
    try:
        found = Unit(fusedrnn.swap(module).model, data, mode, True, setting).results()
    except RuntimeError as error:
        if not any(text in str(error) for text in LEFT_OUT):
            raise
        return False
    if not all(bool(t.isfinite().all()) for t in found.values()):
        raise SystemExit(f"not finite: {case.shape}, {dtype}, {mode}")
    return True


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    parser.add_argument("--points", type=Path)
    parser.add_argument("--id")
    options = parser.parse_args()
    device = process.begin(options.device)
    if options.points:
        items = json.loads(options.points.read_text())
        item = next(item for item in items if item["id"] == options.id)
        calls = of_point(Point.of(item["point"]), device)
    else:
        calls = every_kind(device)
    print(f"smoke: {calls} calls")
    return 0 if calls else 1


if __name__ == "__main__":
    sys.exit(main())
