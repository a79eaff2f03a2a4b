"""How calls of common shapes would be divided on common GPUs, as a Markdown table.

    python -m benchmarks.plans > docs/plans.md

Runs on any machine: plans are a pure function of the shape and of what is known of a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

from fusedrnn import _C


class Device(NamedTuple):
    """What csrc/plan/cuda_plan.h's DeviceSpec holds."""

    capability: int
    processors: int
    shared_bytes: int  # of a block
    clusters: tuple[int, ...] = ()  # of 1, 2, ... 16 blocks: how many run at once


# Clusters do not cross the groups of 16 or 18 processors of which an H200 has 8; that no other
# limit applies is an assumption, the module asks the driver.
_H200_CLUSTERS = (132, 66, *(8 * (16 // n) for n in range(3, 17)))
DEVICES = {
    "H200": Device(90, 132, 232448, _H200_CLUSTERS),
    "A100": Device(80, 108, 166912),
    "L4": Device(89, 58, 101376),
    "RTX 4090": Device(89, 128, 101376),
}

# (cell, dtype, hidden_size, layers, bidirectional, steps, batch)
SHAPES = [
    ("GRU", "float32", 64, 1, False, 35, 32),
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
that together run one layer for some rows of the batch; one block alone exchanges nothing. Several
layers a launch overlap.

The choice follows from a model of what a step costs (`csrc/plan/cuda_plan.cpp`), made of published
figures. **No GPU has confirmed it yet.** `fusedrnn.explain` shows the plan of a call on the GPU at
hand, and `FUSEDRNN_PLAN` overrides it: a backend (`stepwise`, `grid`, `cluster`) and, after commas,
any of `units=N`, `rows=N`, `layers=N`.
"""


def plan(shape: tuple, backward: bool, device: Device, forced: str = "", tf32: bool = False) -> str:
    mode, dtype, hidden, layers, bidirectional, steps, batch = shape
    arguments = (mode, dtype, hidden, 0, layers, bidirectional, steps, batch, backward, tf32)
    return _C.cuda_plan(*arguments, *device, forced)[-1]


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
