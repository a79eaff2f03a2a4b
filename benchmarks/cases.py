"""The cases: recurrent layers in sizes that people use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
CPU = torch.device("cpu")
MODES = ("training", "inference", "forward")  # forward: the forward pass of training
QUICK_STEPS = 20
QUICK_FLOPS = 4e9  # one training repetition
GRID_FLOPS = 4e10  # the same, for a point of the grid
CPU_FLOPS = 2e11  # larger cases take a CPU seconds and are measured there only by name


@dataclass(frozen=True)
class Data:
    """Data of a repetition: the layer's input and the gradient of its output."""

    input: Tensor | PackedSequence
    output_grad: Tensor

    def double(self) -> Data:
        """The same values in float64."""
        return self.map(lambda t: t.double())

    def map(self, change: Callable[[Tensor], Tensor]) -> Data:
        """Both tensors changed."""
        if isinstance(self.input, PackedSequence):
            x: Any = self.input._replace(data=change(self.input.data))
        else:
            x = change(self.input)
        return Data(x, change(self.output_grad))


@dataclass(frozen=True)
class Case:
    """One stack of layers on one batch.

    ``shortest`` above 0 makes the batch a PackedSequence with lengths spread evenly between it and
    ``steps``. Without ``input_grad`` the input requires no gradient, as one-hot characters do not
    and embeddings do.
    """

    name: str
    cell: str  # the class's name in torch.nn
    input_size: int
    hidden_size: int
    layers: int
    steps: int
    batch: int
    bidirectional: bool = False
    shortest: int = 0
    input_grad: bool = True

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def lengths(self) -> list[int]:
        """Steps of every row of the batch, unsorted."""
        if not self.shortest:
            return [self.steps] * self.batch
        even = torch.linspace(self.shortest, self.steps, self.batch).round().long()
        mixed = even[torch.randperm(self.batch, generator=torch.Generator().manual_seed(0))]
        return [int(n) for n in mixed]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def shape(self) -> str:
        """A description for tables."""
        words = [f"{self.cell} {self.input_size}->{self.hidden_size}"]
        if self.layers > 1:
            words.append(f"x{self.layers}")
        if self.bidirectional:
            words.append("bidirectional")
        steps = f"{self.shortest}..{self.steps}" if self.shortest else f"{self.steps}"
        return f"{' '.join(words)}, T={steps}, B={self.batch}"

    def flops(self, training: bool) -> int:
        """Operations of the matrix products.

        Backward has two products for each of forward's: for the gradients of both factors.
        """
        total = 0
        for layer in range(self.layers):
            width = self.hidden_size * self.directions if layer else self.input_size
            rows = GATES[self.cell] * self.hidden_size
            from_input, from_state = 2 * rows * width, 2 * rows * self.hidden_size
            total += from_input + from_state
            if training:
                wanted = 2 if layer or self.input_grad else 1
                total += wanted * from_input + 2 * from_state
        return total * self.directions * self.tokens

    def least_bytes(self, training: bool, itemsize: int) -> int:
        """Minimal traffic between processor and memory: each input and result once."""
        states = self.layers * self.directions * self.batch * self.hidden_size
        states *= 2 if self.cell == "LSTM" else 1
        x, y = self.tokens * self.input_size, self.tokens * self.hidden_size * self.directions
        elements = self.weights + x + y + states
        if training:  # the gradients of y in, of the weights and x out
            elements += y + self.weights + (x if self.input_grad else 0)
        return elements * itemsize

    @property
    def weights(self) -> int:
        """The number of parameters."""
        total, width = 0, self.input_size
        for _ in range(self.layers):
            total += (
                self.directions
                * GATES[self.cell]
                * self.hidden_size
                * (width + self.hidden_size + 2)
            )
            width = self.hidden_size * self.directions
        return total

    def shortened(self) -> Case:
        """This case with few steps, for --quick."""
        steps = min(self.steps, QUICK_STEPS)
        return dataclasses.replace(self, steps=steps, shortest=min(self.shortest, steps // 4))

    def module(self, dtype: torch.dtype, device: torch.device = CPU) -> nn.RNNBase:
        """torch.nn's layer, with the same weights every time on the same kind of device."""
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            made: nn.RNNBase = getattr(nn, self.cell)(
                self.input_size,
                self.hidden_size,
                num_layers=self.layers,
                bidirectional=self.bidirectional,
                dtype=dtype,
                device=device,
            )
        return made

    def data(self, dtype: torch.dtype, device: torch.device) -> Data:
        """Normally distributed data, the same every time on the same kind of device."""
        generator = torch.Generator(device).manual_seed(1)
        width = self.directions * self.hidden_size

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        x = normal(self.steps, self.batch, self.input_size)
        if not self.shortest:
            return Data(x, normal(self.steps, self.batch, width))
        packed = pack_padded_sequence(x, torch.tensor(self.lengths), enforce_sorted=False)
        return Data(packed, normal(self.tokens, width))


def _text(name: str, cell: str, characters: int, hidden: int, layers: int = 1) -> Case:
    """A textbook's character language model: one-hot input, 35 steps, batches of 32."""
    return Case(name, cell, characters, hidden, layers, 35, 32, input_grad=False)


def _for_each_cell(name: str, *arguments: Any, **options: Any) -> tuple[Case, ...]:
    """A case for each cell, whose name replaces the {} in ``name``."""
    return tuple(Case(name.format(c.lower()), c, *arguments, **options) for c in GATES)


# The first word of a name is the origin of the case: a textbook, FlashRNN's paper, ...
CASES = (
    _text("book-rnn-256", "RNN", 28, 256),
    _text("book-gru-256", "GRU", 28, 256),
    _text("book-lstm-256x2", "LSTM", 28, 256, layers=2),
    _text("book-rnn-512x2", "RNN", 28, 512, layers=2),
    _text("book-rnn-1027-256", "RNN", 1027, 256),
    *_for_each_cell("flashrnn-{}-768", 768, 768, layers=1, steps=1024, batch=16),
    *_for_each_cell("stack-{}-512x3", 512, 512, layers=3, steps=100, batch=32),
    Case("stack-gru-512x2", "GRU", 512, 512, layers=2, steps=100, batch=64),
    *_for_each_cell("stack-{}-1024x4", 1024, 1024, layers=4, steps=100, batch=64),
    *_for_each_cell("tagger-{}-256", 128, 256, layers=1, steps=40, batch=32, bidirectional=True),
    # Recordings of 0.5 to 2 seconds at 100 frames a second.
    *_for_each_cell("speech-{}-256", 64, 256, layers=1, steps=200, batch=32, shortest=50),
    *_for_each_cell("streaming-{}-64", 64, 64, layers=1, steps=1, batch=1),
    *_for_each_cell("streaming-{}-256x2", 256, 256, layers=2, steps=1, batch=1),
    *_for_each_cell("streaming-{}-512x2", 512, 512, layers=2, steps=1, batch=1),
    *_for_each_cell("long-{}-256", 64, 256, layers=1, steps=2000, batch=1),
    Case("long-lstm-256x2", "LSTM", 256, 256, layers=2, steps=100, batch=1),
)

# The smallest to the largest layers and batches; measured only by name.
GRID_SIZES = (8, 32, 128, 512, 2048)
GRID_BATCHES = (1, 8, 64, 512)
GRID = tuple(
    case
    for size in GRID_SIZES
    for batch in GRID_BATCHES
    for case in _for_each_cell(f"grid-{{}}-h{size}-b{batch}", size, size, 1, 20, batch)
    if case.flops(training=True) <= GRID_FLOPS
)


def select(
    names: Sequence[str] = (), cells: Sequence[str] = (), device: str = "cuda", quick: bool = False
) -> list[Case]:
    """The cases whose names contain any of ``names``, of these ``cells``.

    Without ``names``, cases that take seconds are left out on a CPU. ``quick`` shortens sequences
    and leaves out cases that are still slow.

    Raises:
        ValueError: a name matches no case, or no case is left.
    """
    pool = (*CASES, *GRID) if names else CASES
    for name in names:
        if not any(name in case.name for case in pool):
            known = ", ".join(case.name for case in CASES)
            raise ValueError(f"no case has '{name}' in its name; there are {known}, grid")
    found = [c for c in pool if not names or any(name in c.name for name in names)]
    found = [c for c in found if not cells or c.cell in cells]
    if not names and device == "cpu":
        found = [c for c in found if c.flops(training=True) <= CPU_FLOPS]
    if quick:
        found = [case.shortened() for case in found]
        if not names:
            found = [c for c in found if c.flops(training=True) <= QUICK_FLOPS]
    if not found:
        raise ValueError("no case is left")
    return found
