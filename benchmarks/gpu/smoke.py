"""Small calls of every cell and dtype, forward and backward, for compute-sanitizer.

Odd sizes, lengths, two directions and layers, one row and many. Calls that a forced backend does
not support are left out. Prints the number of calls.
"""

from __future__ import annotations

import argparse
import sys

import torch

import fusedrnn
from benchmarks.cases import GATES, Case
from benchmarks.gpu.points import UNFIT
from benchmarks.measure import Unit

SHAPES = (  # input, hidden, layers, steps, batch, both directions, shortest
    (5, 33, 2, 4, 3, True, 0),
    (16, 64, 1, 5, 17, False, 0),
    (7, 128, 2, 4, 1, False, 0),
    (7, 40, 1, 6, 5, True, 2),
)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", required=True)
    device = torch.device(parser.parse_args().device)
    calls = 0
    for cell in GATES:
        for dtype in (getattr(torch, name) for name in DTYPES):
            for x, h, layers, steps, batch, both, shortest in SHAPES:
                case = Case("smoke", cell, x, h, layers, steps, batch, both, shortest)
                module, data = case.module(dtype, device), case.data(dtype, device)
                for mode in ("training", "inference"):
                    try:
                        found = Unit(fusedrnn.swap(module).model, data, mode, True).results()
                    except RuntimeError as error:
                        if UNFIT not in str(error):
                            raise
                        continue
                    if not all(bool(t.isfinite().all()) for t in found.values()):
                        print(f"not finite: {case.shape}, {dtype}, {mode}")
                        return 1
                    calls += 1
    print(f"smoke: {calls} calls")
    return 0 if calls else 1


if __name__ == "__main__":
    sys.exit(main())
