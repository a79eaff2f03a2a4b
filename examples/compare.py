"""Trains a model with torch.nn's layer and with fusedrnn's, in turns, and prints a figure."""

import time
from collections.abc import Callable, Iterator
from statistics import median
from types import ModuleType
from typing import TypeVar

import torch
from torch import nn

import fusedrnn

Model = TypeVar("Model", bound=nn.Module)
Figure = dict[str, tuple[float, float]]  # by name: torch.nn's and fusedrnn's


def compare(
    title: str,
    build: Callable[[ModuleType], Model],
    train: Callable[[Model], Iterator[None]],
    score: Callable[[Model], dict[str, float]],
) -> Figure:
    """The figure of a task, which is also printed.

    `build` makes a model of torch.nn's or fusedrnn's layers, and both get the same weights. `train`
    yields after every update: the two take turns, so that both meet the same load of the machine.
    `score` measures the trained model; names that end in "s" after a comma are times.
    """
    torch.manual_seed(0)
    models = [build(torch.nn), build(fusedrnn)]
    models[1].load_state_dict(models[0].state_dict())
    runs = [train(model) for model in models]
    seconds: tuple[list[float], list[float]] = ([], [])
    running, turn = True, 0
    while running:
        for who in (0, 1) if turn % 2 == 0 else (1, 0):
            torch.manual_seed(turn)  # the same dropout and samples for both
            start = time.perf_counter()
            running = next(runs[who], runs) is None
            if running and turn:  # the first turn also allocates and initialises
                seconds[who].append(time.perf_counter() - start)
        turn += 1
    figure = {"training, s": (sum(seconds[0]), sum(seconds[1]))}
    theirs, ours = (score(model.eval()) for model in models)
    figure |= {name: (theirs[name], ours[name]) for name in theirs}

    print(f"{title}\n{'':28}{'torch.nn':>10}{'fusedrnn':>10}")
    for name, (a, b) in figure.items():
        # Of training the median turn: what disturbs one turn moves no other.
        pairs = zip(*seconds, strict=True) if name == "training, s" else [(a, b)]
        times = name.endswith("s") and "," in name
        ratio = f"   {median(x / y for x, y in pairs):.2f} times as fast" if times else ""
        print(f"{name:28}{a:10.4g}{b:10.4g}{ratio}")
    return figure
