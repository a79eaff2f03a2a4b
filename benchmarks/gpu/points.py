"""What is timed on a GPU, as data: each point has a few implementations and cases in turns.

A process returns the times of a point; ``summary`` interprets them.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import GATES, Case, select

BACKENDS = ("cluster", "grid", "stepwise")  # as FUSEDRNN_PLAN names them
UNFIT = "cannot run this shape on this device"  # in the error of a forced backend
CHECK_STEPS = 35  # steps that are checked against float64 before a case is timed


@dataclass(frozen=True)
class Work:
    """An implementation on a case, as one of the turns."""

    peer: str  # torch.nn or fusedrnn
    case: Case
    mode: str
    dtype: str
    tf32: bool = True


@dataclass(frozen=True)
class Point:
    id: str
    works: list[Work]
    backend: str | None = None  # forced; None: the plan's choice
    graph: bool = False  # also as replays of CUDA graphs
    seconds: float = 0.3
    rounds: int = 5

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Point:
        works = [Work(**{**work, "case": Case(**work["case"])}) for work in data["works"]]
        return cls(**{**data, "works": works})


@dataclass(frozen=True)
class Sizes:
    """Sizes of all points: for a GPU, or small ones to try the command on a CPU."""

    latency_hidden: tuple[int, ...] = (128, 256, 512, 768, 1024)
    latency_batch: tuple[int, ...] = (1, 16, 32, 64)
    latency_steps: tuple[int, int] = (128, 640)
    latency_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    layers: tuple[int, ...] = (1, 2, 3, 4, 8)
    layers_steps: int = 512
    grid_hidden: tuple[int, ...] = (128, 256, 512, 1024)
    grid_layers: tuple[int, ...] = (1, 2, 3)
    grid_batch: tuple[int, ...] = (1, 16, 64)
    grid_steps: tuple[int, ...] = (35, 512)
    grid_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    named_scale: int = 1  # divides the hidden size and steps of named cases


CUDA = Sizes()
TRY = Sizes(
    latency_hidden=(8, 16),
    latency_batch=(1, 3),
    latency_steps=(4, 12),
    latency_dtypes=("float32",),
    layers=(1, 2),
    layers_steps=8,
    grid_hidden=(8,),
    grid_layers=(1, 2),
    grid_batch=(3,),
    grid_steps=(5,),
    grid_dtypes=("float32",),
    named_scale=16,
)


def pair(case: Case, mode: str, dtype: str, tf32_ours: bool = True) -> list[Work]:
    ours = Work("fusedrnn", case, mode, dtype, tf32_ours)
    return [Work("torch.nn", case, mode, dtype), ours]


def latency(sizes: Sizes, backends: tuple[str | None, ...] = (None, *BACKENDS)) -> Iterator[Point]:
    """Two lengths of the same forward: their difference excludes the cost of a call."""
    short, long = sizes.latency_steps
    for backend in backends:
        for dtype in sizes.latency_dtypes:
            for hidden in sizes.latency_hidden:
                for batch in sizes.latency_batch:
                    base = Case("step", "LSTM", hidden, hidden, 1, short, batch)
                    cases = [base, dataclasses.replace(base, steps=long)]
                    works = [Work("fusedrnn", case, "inference", dtype) for case in cases]
                    if backend is None:
                        works += [Work("torch.nn", case, "inference", dtype) for case in cases]
                    name = f"step/{backend or 'plan'}/{dtype}/{hidden}/{batch}"
                    yield Point(name, works, backend, graph=True, seconds=0.1, rounds=3)


def named(sizes: Sizes) -> Iterator[Point]:
    """The cases with a target."""
    book, speech = select(["book-lstm-256x2"])[0], select(["speech-lstm-256"])[0]
    flash = select(["flashrnn-lstm-768"])[0]
    long = Case("step", "LSTM", 256, 256, 1, sizes.layers_steps, 32)
    book, speech, flash, long = (
        _divided(c, sizes.named_scale) for c in (book, speech, flash, long)
    )
    yield Point("book", pair(book, "training", "float32"), graph=True)
    yield Point("book/no-tf32", pair(book, "training", "float32", False), graph=True)
    for mode in ("forward", "training"):
        yield Point(f"flashrnn/{mode}", pair(flash, mode, "bfloat16"), graph=True)
    for mode in ("inference", "training"):
        works = [
            Work("fusedrnn", dataclasses.replace(long, layers=n), mode, "float32")
            for n in sizes.layers
        ]
        yield Point(f"layers/{mode}", works, graph=True)
    for mode in ("inference", "training"):
        yield Point(f"speech/{mode}", pair(speech, mode, "float32"))


def _divided(case: Case, by: int) -> Case:
    if by == 1:
        return case
    return dataclasses.replace(
        case,
        hidden_size=case.hidden_size // by,
        input_size=max(1, case.input_size // by),
        steps=max(4, case.steps // by),
        shortest=case.shortest and 2,
        batch=min(case.batch, 4),
    )


def grid(sizes: Sizes) -> list[Point]:
    """The cases of the geometric mean, in a fixed random order.

    Cut off by a deadline, they are a fair sample.
    """
    found = []
    for cell in GATES:
        for hidden in sizes.grid_hidden:
            for layers in sizes.grid_layers:
                for batch in sizes.grid_batch:
                    for steps in sizes.grid_steps:
                        for dtype in sizes.grid_dtypes:
                            for mode in ("training", "inference"):
                                name = f"{cell.lower()}/{hidden}x{layers}/B{batch}/T{steps}"
                                case = Case(name, cell, hidden, hidden, layers, steps, batch)
                                works = pair(case, mode, dtype)
                                identity = f"grid/{mode}/{dtype}/{name}"
                                found.append(Point(identity, works, seconds=0.03, rounds=3))
    random.Random(0).shuffle(found)
    return found
