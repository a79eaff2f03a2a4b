"""How calls of common shapes would be divided on common GPUs, as a Markdown table.

    python -m benchmarks.plans > docs/plans.md

Runs on any machine: plans are a pure function of the shape and of what is known of a GPU. Needs the
packages of `[test]`, as it asks the planner through tests/bindings.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fusedrnn.cuda import Spec

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

import bindings

# Clusters do not cross the groups of 16 or 18 processors of which an H200 has 8; that no other
# limit applies is an assumption, the module asks the driver.
_H200_CLUSTERS = (132, 66, *(8 * (16 // n) for n in range(3, 17)))
DEVICES = {
    "H200": Spec(capability=90, processors=132, shared_bytes=232448, clusters=_H200_CLUSTERS),
    "A100": Spec(capability=80, processors=108, shared_bytes=166912, clusters=()),
    "L4": Spec(capability=89, processors=58, shared_bytes=101376, clusters=()),
    "RTX 4090": Spec(capability=89, processors=128, shared_bytes=101376, clusters=()),
}

# (cell, dtype, hidden_size, layers, bidirectional, steps, batch)
SHAPES = [
    ("RNN_TANH", "float32", 256, 1, False, 35, 32),
    ("GRU", "float32", 256, 1, False, 35, 32),
    ("LSTM", "float32", 256, 2, False, 35, 32),
    ("RNN_TANH", "float32", 512, 2, False, 35, 32),
    ("LSTM", "float32", 512, 3, False, 100, 32),
    ("LSTM", "float32", 1024, 1, False, 512, 16),
    ("GRU", "float32", 256, 1, False, 512, 1),
    ("LSTM", "float32", 256, 2, True, 100, 64),
    ("LSTM", "bfloat16", 256, 4, False, 512, 16),
    ("LSTM", "bfloat16", 768, 1, False, 1024, 16),
    ("LSTM", "bfloat16", 1024, 3, False, 512, 64),
    ("LSTM", "float64", 256, 1, False, 35, 32),
]

HEAD = """\
# Plans

Which kernels would run common shapes on common GPUs, forward / backward, and how they divide them:
written by `python -m benchmarks.plans`, a pure function of shape and device. A team is the blocks
that together run one layer for some rows of the batch; several layers a launch overlap.

The choice follows from a model of what a step costs (`csrc/plan/cuda_plan.cpp`), made of published
figures. **No GPU has confirmed it yet.** `fusedrnn.explain` shows the plan of a call on the GPU at
hand, and `FUSEDRNN_PLAN` overrides it: a backend (`stepwise`, `grid`, `cluster`) and, after commas,
any of `units=N`, `rows=N`, `layers=N`.
"""


def plan(shape: tuple, backward: bool, device: Spec) -> str:
    mode, dtype, hidden, layers, bidirectional, steps, batch = shape
    problem = bindings.Problem(
        cell=bindings.Cell[mode],
        dtype=bindings.DType[dtype],
        hidden_size=hidden,
        num_layers=layers,
        num_directions=2 if bidirectional else 1,
    )
    request = bindings.CudaRequest(steps=steps, batch=batch, backward=backward)
    return str(bindings.plan_cuda(problem, request, bindings.DeviceSpec(**device)))


def table() -> str:
    lines = [HEAD]
    for name, device in DEVICES.items():
        lines += [f"## {name}", "", "| shape | forward | backward |", "|---|---|---|"]
        for shape in SHAPES:
            mode, dtype, hidden, layers, bidirectional, steps, batch = shape
            size = f"{mode} {hidden} x{layers}{' bidirectional' if bidirectional else ''}"
            text = f"{size}, T={steps}, B={batch}, {dtype}"
            plans = [plan(shape, backward, device) for backward in (False, True)]
            lines.append(f"| {text} | {' | '.join(plans)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(), end="")
