"""Accuracy and speed of quantized layers: `python -m benchmarks.quantization`.

`errors` is also what the tests judge quantized layers by.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fusedrnn
from benchmarks.adapters import torch_int8
from benchmarks.measure import Budget, interleave, seconds_of, speedup

TORCH_INT8 = "torch int8"


@dataclass(frozen=True)
class Shape:
    cell: str
    input_size: int
    hidden_size: int
    layers: int
    steps: int
    batch: int
    bidirectional: bool = False

    def __str__(self) -> str:
        way = " bidirectional" if self.bidirectional else ""
        layers = f"{self.cell} {self.input_size}->{self.hidden_size} x{self.layers}{way}"
        return f"{layers}, T={self.steps}, B={self.batch}"

    def make(self, seed: int = 0) -> tuple[nn.RNNBase, Tensor, Any]:
        """torch.nn's layer in eval mode with weights as it draws them, an input and states."""
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        layer = getattr(nn, self.cell)(
            self.input_size, self.hidden_size, self.layers, bidirectional=self.bidirectional
        ).eval()
        x = torch.randn(self.steps, self.batch, self.input_size, generator=generator)
        states = [
            torch.randn(
                self.layers * (1 + self.bidirectional),
                self.batch,
                self.hidden_size,
                generator=generator,
            ).tanh()
            for _ in range(2)
        ]
        return layer, x, tuple(states) if self.cell == "LSTM" else states[0]


def implementations(layer: nn.RNNBase, names: Sequence[str] = ()) -> dict[str, nn.Module]:
    """The layer as torch.nn's, torch's int8, fusedrnn's and its quantized forms."""

    def quantized(weights: str) -> nn.Module:
        return fusedrnn.quantize(copy.deepcopy(layer), weights).model

    def low() -> nn.Module:
        return fusedrnn.swap(copy.deepcopy(layer)).model.bfloat16()

    builders: dict[str, Callable[[], nn.Module | None]] = {
        "torch.nn": lambda: layer,
        TORCH_INT8: lambda: None if isinstance(layer, nn.RNN) else torch_int8(layer),
        "fusedrnn": lambda: fusedrnn.swap(copy.deepcopy(layer)).model,
        "fusedrnn in bfloat16": low,
        "quantized int8": lambda: quantized("int8"),
        "quantized bfloat16": lambda: quantized("bfloat16"),
    }
    made = {n: build() for n, build in builders.items() if not names or n in names}
    return {name: module for name, module in made.items() if module is not None}


def cast(states: Any, dtype: torch.dtype) -> Any:
    return tuple(h.to(dtype) for h in states) if type(states) is tuple else states.to(dtype)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The root mean square of the error over that of the exact values."""
    return ((found.double() - exact).square().mean() / exact.square().mean()).sqrt().item()


def errors(shape: Shape, draws: int = 3) -> dict[str, float]:
    """The errors of each implementation's output against torch.nn in float64; means of draws."""
    found: dict[str, list[float]] = {}
    for seed in range(draws):
        layer, x, hx = shape.make(seed)
        wide = copy.deepcopy(layer).double()
        exact = wide(x.double(), cast(hx, torch.float64))
        for name, module in implementations(layer).items():
            low = torch.bfloat16 if name == "fusedrnn in bfloat16" else torch.float32
            states = cast(hx, low)
            with torch.no_grad():
                y = module(x.to(low), states)[0]
            found.setdefault(name, []).append(relative_error(y, exact[0].detach()))
    return {name: statistics.mean(values) for name, values in found.items()}


def times(shape: Shape, budget: Budget, names: Sequence[str] = ()) -> dict[str, list[float]]:
    """Seconds of a call of each implementation, in rounds in which all take turns.

    On one thread these are seconds of its processor, which other processes change least.
    """
    layer, x, hx = shape.make()
    made = implementations(layer, names)

    def work(name: str, module: nn.Module) -> Callable[[int], float]:
        low = torch.bfloat16 if name == "fusedrnn in bfloat16" else torch.float32
        given = x.to(low)
        states = cast(hx, low)

        def run(repeats: int) -> float:
            with torch.no_grad():
                if torch.get_num_threads() > 1:
                    return seconds_of(lambda: module(given, states), x.device, repeats)
                start = time.thread_time()
                for _ in range(repeats):
                    module(given, states)
                return (time.thread_time() - start) / repeats

        return run

    return dict(zip(made, interleave([work(*item) for item in made.items()], budget), strict=True))


STEPS = [Shape(cell, size, size, 2, 1, 1) for cell in ("LSTM", "GRU", "RNN") for size in (256, 512)]
BATCHES = [
    Shape("LSTM", 256, 256, 2, 35, 32),
    Shape("GRU", 28, 256, 1, 35, 32),
    Shape("RNN", 28, 512, 2, 35, 32),
    Shape("LSTM", 512, 512, 2, 100, 64),
    Shape("GRU", 512, 512, 2, 100, 64),
    Shape("LSTM", 128, 256, 1, 40, 32, bidirectional=True),
]
PEERS = ("torch.nn", TORCH_INT8, "fusedrnn", "fusedrnn in bfloat16")
OURS = ("quantized int8", "quantized bfloat16")


def speed_rows(shapes: Sequence[Shape], budget: Budget) -> Iterator[str]:
    yield "| | us a call | " + " | ".join(f"{o} / {p}" for o in OURS for p in PEERS) + " |"
    yield "|---" * (2 + len(OURS) * len(PEERS)) + "|"
    for shape in shapes:
        seconds = times(shape, budget)
        ratios = [
            f"{speedup(seconds[peer], seconds[ours]).median:.2f}" if peer in seconds else "-"
            for ours in OURS
            for peer in PEERS
        ]
        fastest = statistics.median(seconds[OURS[0]]) * 1e6
        yield f"| {shape} | {fastest:.0f} | " + " | ".join(ratios) + " |"


def error_rows(shapes: Sequence[Shape]) -> Iterator[str]:
    names = (TORCH_INT8, *PEERS[2:], *OURS)
    yield "| | " + " | ".join(names) + f" | {TORCH_INT8} / {OURS[0]} |"
    yield "|---" * (2 + len(names)) + "|"
    for shape in shapes:
        found = errors(shape)
        ratio = found[TORCH_INT8] / found[OURS[0]] if TORCH_INT8 in found else None
        cells = [f"{found[n]:.2g}" if n in found else "-" for n in names]
        yield (
            f"| {shape} | " + " | ".join(cells) + f" | {ratio:.1f} |"
            if ratio
            else (f"| {shape} | " + " | ".join(cells) + " | - |")
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each shape")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", choices=("errors", "steps", "batches"), action="append")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    budget = Budget(seconds=options.seconds)
    for part in options.part or ("errors", "steps", "batches"):
        print(f"\n{part}:\n")
        rows = {
            "errors": lambda: error_rows(STEPS + BATCHES),
            "steps": lambda: speed_rows(STEPS, budget),
            "batches": lambda: speed_rows(BATCHES, budget),
        }[part]()
        for row in rows:
            print(row, flush=True)


if __name__ == "__main__":
    main()
