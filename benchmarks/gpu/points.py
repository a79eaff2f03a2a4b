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
from benchmarks.gpu.process import FAILED

BACKENDS = ("cluster", "grid", "stepwise")  # as FUSEDRNN_PLAN names them
# In the errors of a forced plan that does not support a shape, or whose family failed as a canary.
LEFT_OUT = ("cannot run this shape on this device", FAILED)
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
    plan: str = ""  # FUSEDRNN_PLAN; empty: the planner's choice
    graph: bool = False  # also as replays of CUDA graphs
    seconds: float = 0.3
    rounds: int = 5

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Point:
        works = [Work(**{**work, "case": Case(**work["case"])}) for work in data["works"]]
        return cls(**{**data, "works": works})

    def item(self) -> dict[str, Any]:
        """For ``worker``."""
        return {"kind": "point", "id": self.id, "point": self.as_json()}


@dataclass(frozen=True)
class Sizes:
    """Sizes of all points: for a GPU, or small ones to try the command under the emulator."""

    step_steps: tuple[int, int] = (128, 640)
    layers: tuple[int, ...] = (1, 2, 3, 4, 8)
    layers_steps: int = 512
    grid_cells: tuple[str, ...] = tuple(GATES)
    grid_hidden: tuple[int, ...] = (128, 256, 512, 1024)
    grid_layers: tuple[int, ...] = (1, 2, 3)
    grid_batch: tuple[int, ...] = (1, 16, 64)
    grid_steps: tuple[int, ...] = (35, 512)
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    divide: int = 1  # the hidden size and steps of named cases
    best: int = 6  # plans of a sweep, besides the neighbours of the first
    neighbours: bool = True
    micro_repeats: int = 1024
    micro_blocks: int = 128


CUDA = Sizes()
TRY = Sizes(
    step_steps=(2, 4),
    layers=(1, 2),
    layers_steps=3,
    grid_cells=("GRU",),
    grid_hidden=(8,),
    grid_layers=(1,),
    grid_batch=(3,),
    grid_steps=(3,),
    dtypes=("float32",),
    divide=16,
    best=2,
    neighbours=False,
    micro_repeats=2,
    micro_blocks=4,
)


def pair(case: Case, mode: str, dtype: str, tf32_ours: bool = True) -> list[Work]:
    ours = Work("fusedrnn", case, mode, dtype, tf32_ours)
    return [Work("torch.nn", case, mode, dtype), ours]


def named(sizes: Sizes) -> Iterator[Point]:
    """The cases with a target."""
    book, speech = select(["book-lstm-256x2"])[0], select(["speech-lstm-256"])[0]
    flash = select(["flashrnn-lstm-768"])[0]
    long = Case("step", "LSTM", 256, 256, 1, sizes.layers_steps, 32)
    book, speech, flash, long = (divided(c, sizes.divide) for c in (book, speech, flash, long))
    yield Point("book", pair(book, "training", "float32"), graph=True)
    yield Point("book/no-tf32", pair(book, "training", "float32", False), graph=True)
    for dtype in sizes.dtypes[1:] or sizes.dtypes:
        for mode in ("forward", "training"):
            yield Point(f"flashrnn/{dtype}/{mode}", pair(flash, mode, dtype), graph=True)
    for dtype in sizes.dtypes:
        yield _step(long, dtype, sizes.step_steps)
    for mode in ("inference", "training"):
        works = [
            Work("fusedrnn", dataclasses.replace(long, layers=n), mode, "float32")
            for n in sizes.layers
        ]
        yield Point(f"layers/{mode}", works, graph=True)
    for mode in ("inference", "training"):
        yield Point(f"speech/{mode}", pair(speech, mode, "float32"))


def _step(case: Case, dtype: str, steps: tuple[int, int]) -> Point:
    """Two lengths of the same forward: their difference excludes the cost of a call."""
    works = [
        Work(peer, dataclasses.replace(case, steps=n), "inference", dtype)
        for peer in ("fusedrnn", "torch.nn")
        for n in steps
    ]
    return Point(f"step/{dtype}", works, graph=True)


def divided(case: Case, by: int) -> Case:
    """A small case of the same kind."""
    if by == 1:
        return case
    return dataclasses.replace(
        case,
        hidden_size=case.hidden_size // by,
        input_size=max(1, case.input_size // by),
        steps=max(3, case.steps // by // 8),
        shortest=case.shortest and 1,
        batch=min(case.batch, 3),
    )


def grid(sizes: Sizes) -> list[Point]:
    """The cases of the geometric mean, in a fixed random order.

    Cut off by a deadline, they are a fair sample.
    """
    found = []
    for cell in sizes.grid_cells:
        for hidden in sizes.grid_hidden:
            for layers in sizes.grid_layers:
                for batch in sizes.grid_batch:
                    for steps in sizes.grid_steps:
                        for dtype in sizes.dtypes:
                            for mode in ("training", "inference"):
                                name = f"{cell.lower()}/{hidden}x{layers}/B{batch}/T{steps}"
                                case = Case(name, cell, hidden, hidden, layers, steps, batch)
                                works = pair(case, mode, dtype)
                                identity = f"grid/{mode}/{dtype}/{name}"
                                found.append(Point(identity, works, seconds=0.03, rounds=3))
    random.Random(0).shuffle(found)
    return found
