"""Time against steps, batch, hidden units, layers and threads."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.measure import Budget
from benchmarks.suite import Row, rows

AXES = ("T", "B", "H", "L", "threads")
FIELDS = {"T": "steps", "B": "batch", "H": "hidden_size", "L": "layers"}
CPU_VALUES = {
    "T": (8, 32, 128, 512),
    "B": (1, 4, 16, 64),
    "H": (64, 128, 256, 512),
    "L": (1, 2, 3, 4),
}
CUDA_VALUES = {
    "T": (32, 128, 512, 2048),
    "B": (1, 4, 16, 64, 256),
    "H": (128, 256, 512, 768, 1024),
    "L": (1, 2, 3, 4, 6, 8),
}
CPU_STEPS, CUDA_STEPS = 64, 512  # unless T is varied


@dataclass(frozen=True)
class Point:
    axis: str
    value: int
    row: Row


def thread_counts(cpus: int) -> list[int]:
    """Powers of two up to the CPUs of this process, and their number."""
    return sorted({cpus, *(2**k for k in range(cpus.bit_length()))})


def points(
    axes: Sequence[str],
    cells: Sequence[str],
    modes: Sequence[str],
    dtypes: Sequence[torch.dtype],
    threads: int,
    device: torch.device,
    budget: Budget,
    values: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[Point]:
    """Measures one layer of 256 units and a batch of 32 with one size varied.

    Threads are varied on a CPU only.
    """
    cuda = device.type == "cuda"
    chosen: Mapping[str, Sequence[int]] = values or (CUDA_VALUES if cuda else CPU_VALUES)
    for axis in axes:
        if axis == "threads":
            if cuda:
                continue
            grid: Sequence[int] = thread_counts(len(os.sched_getaffinity(0)))
        else:
            grid = chosen[axis]
        for cell in cells:
            base = Case("sweep", cell, 256, 256, 1, CUDA_STEPS if cuda else CPU_STEPS, 32)
            for value in grid:
                case = dataclasses.replace(base, name=f"sweep-{axis}-{cell.lower()}-{value}")
                if axis in FIELDS:
                    changed: dict[str, Any] = {FIELDS[axis]: value}
                    case = dataclasses.replace(case, **changed)
                if axis == "H":
                    case = dataclasses.replace(case, input_size=value)
                number = value if axis == "threads" else threads
                for row in rows([case], modes, dtypes, [number], device, budget):
                    yield Point(axis, value, row)
