"""What is measured: recurrent layers in the sizes that people use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
QUICK_STEPS = 20


@dataclass(frozen=True)
class Data:
    """What one repetition reads: the layer's input, and the gradient of its output."""

    input: Tensor | PackedSequence
    output_grad: Tensor

    def double(self) -> Data:
        """The same values in float64 on the CPU."""
        return Data(self.input.cpu().double(), self.output_grad.cpu().double())


@dataclass(frozen=True)
class Case:
    """One stack of layers on one batch.

    ``shortest`` above 0 makes the batch a PackedSequence, its lengths spread evenly between that
    and ``steps``. Without ``input_grad`` the input is data, such as one-hot characters, and needs
    no gradient; an embedding does.
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
        """Steps of every row of the batch, in no order."""
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
        """For tables."""
        words = [f"{self.cell} {self.input_size}->{self.hidden_size}"]
        if self.layers > 1:
            words.append(f"x{self.layers}")
        if self.bidirectional:
            words.append("bidirectional")
        steps = f"{self.shortest}..{self.steps}" if self.shortest else f"{self.steps}"
        return f"{' '.join(words)}, T={steps}, B={self.batch}"

    def flops(self, training: bool) -> int:
        """Operations of the matrix products alone.

        Backward needs two products for each of forward's, one for the gradient of the weight and
        one for that of what it was multiplied with.
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

    def shortened(self) -> Case:
        """This case with few steps, for a quick look."""
        steps = min(self.steps, QUICK_STEPS)
        return dataclasses.replace(self, steps=steps, shortest=min(self.shortest, steps // 4))

    def module(self, dtype: torch.dtype) -> nn.RNNBase:
        """torch.nn's layer on the CPU, the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made: nn.RNNBase = getattr(nn, self.cell)(
                self.input_size,
                self.hidden_size,
                num_layers=self.layers,
                bidirectional=self.bidirectional,
                dtype=dtype,
            )
        return made

    def data(self, dtype: torch.dtype, device: torch.device) -> Data:
        """Normally distributed, the same values every time."""
        generator = torch.Generator().manual_seed(1)
        width = self.directions * self.hidden_size

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, dtype)

        x = normal(self.steps, self.batch, self.input_size)
        if not self.shortest:
            return Data(x, normal(self.steps, self.batch, width))
        packed = pack_padded_sequence(x, torch.tensor(self.lengths), enforce_sorted=False)
        return Data(packed, normal(self.tokens, width))


def _text(name: str, cell: str, characters: int, hidden: int, layers: int = 1) -> Case:
    """Character language models as a textbook trains them: one-hot, 35 steps of 32."""
    return Case(name, cell, characters, hidden, layers, 35, 32, input_grad=False)


CASES = (
    _text("book-rnn-256", "RNN", 28, 256),
    _text("book-gru-256", "GRU", 28, 256),
    _text("book-lstm-256x2", "LSTM", 28, 256, layers=2),
    _text("book-rnn-512x2", "RNN", 28, 512, layers=2),
    _text("book-rnn-1027-256", "RNN", 1027, 256),
    Case("stack-lstm-512x3", "LSTM", 512, 512, layers=3, steps=100, batch=32),
    Case("stack-gru-512x2", "GRU", 512, 512, layers=2, steps=100, batch=64),
    Case("single-lstm-256x2", "LSTM", 256, 256, layers=2, steps=100, batch=1),
    Case("tagger-lstm-256", "LSTM", 128, 256, layers=1, steps=40, batch=32, bidirectional=True),
    Case("packed-lstm-256", "LSTM", 64, 256, layers=1, steps=200, batch=32, shortest=50),
)


def select(patterns: Sequence[str]) -> list[Case]:
    """The cases that have any of ``patterns`` in their names, all where there is no pattern.

    Raises:
        ValueError: a pattern fits no case.
    """
    for pattern in patterns:
        if not any(pattern in case.name for case in CASES):
            names = ", ".join(case.name for case in CASES)
            raise ValueError(f"no case has '{pattern}' in its name; there are {names}")
    return [c for c in CASES if not patterns or any(p in c.name for p in patterns)]
