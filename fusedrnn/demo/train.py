"""Two models trained side by side on the same batches.

Shapes: an epoch has N batches of T steps; this process takes B rows of each.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from fusedrnn.demo.model import CharModel, State, detach
from fusedrnn.demo.ranks import Ranks
from fusedrnn.demo.result import Epoch, perplexity
from fusedrnn.demo.text import draw_starts, gather

# One model's turn. Short, so that what else the machine does meets both models alike; long enough
# that waiting for a GPU at its end costs little.
BATCHES_PER_TURN = 8
LARGEST_GRADIENT_NORM = 1.0


class Learner:
    """One model, its optimizer, and the state it carries from batch to batch."""

    def __init__(
        self, model: CharModel, optimizer: Optimizer, carry_state: bool, ranks: Ranks
    ) -> None:
        self.model = model
        self.carry_state = carry_state
        self.state: State = None
        self._parallel = ranks.parallel(model)
        self._parameters = list(model.parameters())
        self._optimizer = optimizer

    def _backward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Leaves the gradients of the mean loss over a batch (T, B), and returns that loss."""
        logits, state = self._parallel(inputs, self.state)
        if self.carry_state:
            self.state = detach(state)
        # Half precision has too few digits for the sum inside a softmax.
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = cross_entropy(logits, targets.flatten())
        loss.backward()
        return loss.detach()

    def warm_up(self, inputs: Tensor, targets: Tensor) -> None:
        """Allocates and initialises whatever the first batch does, and learns nothing."""
        self._backward(inputs, targets)
        self._optimizer.zero_grad()
        self.state = None

    def train(self, inputs: Tensor, targets: Tensor) -> float:
        """One update for each batch of (N, T, B); returns the sum of their losses."""
        total = torch.zeros((), device=inputs.device)
        for x, y in zip(inputs, targets, strict=True):
            total = total + self._backward(x, y)
            clip_grad_norm_(self._parameters, LARGEST_GRADIENT_NORM)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return float(total)  # waits for the device, once a turn


def race(
    learners: Sequence[Learner],
    corpus: Tensor,
    *,
    batch: int,
    steps: int,
    epochs: int,
    sampling: str,
    seed: int,
    ranks: Ranks,
    after_turn: Callable[[int], None],
) -> Iterator[Epoch]:
    """Train both learners on the same batches of ``corpus`` (tokens,), turn by turn.

    Yields each epoch's measurements; ``after_turn`` is told how many batches both have just done.
    """
    generator = torch.Generator().manual_seed(seed)
    turn = 0
    for epoch in range(epochs):
        # All ranks draw the same epoch, and each takes its columns of it.
        starts = draw_starts(len(corpus), batch, steps, sampling, generator)
        starts = ranks.share(starts).to(corpus.device)
        count = len(starts)
        if epoch == 0:
            for learner in learners:
                learner.warm_up(*(part[0] for part in gather(corpus, starts[:1], steps)))
        for learner in learners:
            learner.state = None
        losses = [0.0, 0.0]
        turns: list[tuple[float, float]] = []
        for part in starts.tensor_split(-(-count // BATCHES_PER_TURN)):
            seconds = [0.0, 0.0]
            for who in (0, 1) if turn % 2 == 0 else (1, 0):
                # The same dropout for both models, another on each rank.
                torch.manual_seed(seed + turn * ranks.size + ranks.rank)
                began = time.perf_counter()
                losses[who] += learners[who].train(*gather(corpus, part, steps))
                seconds[who] = time.perf_counter() - began
            turns.append((seconds[0], seconds[1]))
            turn += 1
            after_turn(len(part))
        reference, fused = ranks.mean([loss / count for loss in losses], corpus.device)
        yield Epoch(
            tokens=count * batch * steps,
            perplexity=(perplexity(reference), perplexity(fused)),
            turns=turns,
        )
