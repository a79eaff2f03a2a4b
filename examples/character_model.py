"""A character model of Python's documentation, with integers in place of one-hot vectors."""

import re
from collections.abc import Iterator
from pydoc_data.topics import topics
from types import ModuleType

import torch
from compare import Figure, compare
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

import fusedrnn

TEXT = re.sub(r"\s+", " ", " ".join(topics.values()).encode("ascii", "ignore").decode())
CHARACTERS = sorted(set(TEXT))
TOKENS = torch.tensor([CHARACTERS.index(c) for c in TEXT])
TRAINING, TEST = TOKENS[:-20_000], TOKENS[-20_000:]
T, B, HIDDEN = 64, 32, 256


class CharacterModel(nn.Module):
    def __init__(self, library: ModuleType) -> None:
        super().__init__()
        self.gru = library.GRU(len(CHARACTERS), HIDDEN)
        self.head = nn.Linear(HIDDEN, len(CHARACTERS))

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """tokens (T, B) -> logits (T, B, characters) and the state."""
        if not isinstance(self.gru, fusedrnn.GRU):  # ours takes the integers as they are
            tokens = one_hot(tokens, len(CHARACTERS)).float()
        # The state says that these are tokens, not features that were not converted.
        state = torch.zeros(1, tokens.shape[1], HIDDEN) if state is None else state
        output, state = self.gru(tokens, state)
        return self.head(output), state


def train(model: CharacterModel, updates: int) -> Iterator[None]:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    columns = TRAINING[: len(TRAINING) // B * B].view(B, -1).t()  # each continues down a column
    state = None
    for update in range(updates):
        start = update * T % (len(columns) - T - 1)
        piece = columns[start : start + T + 1]
        logits, state = model(piece[:-1], state)
        state = state.detach()
        cross_entropy(logits.flatten(0, 1), piece[1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield


@torch.no_grad()
def score(model: CharacterModel) -> dict[str, float]:
    columns = TEST.view(4, -1).t()
    logits, _ = model(columns[:-1])
    return {
        "test perplexity": cross_entropy(logits.flatten(0, 1), columns[1:].flatten()).exp().item()
    }


@torch.no_grad()
def sample(model: CharacterModel, start: str, count: int) -> str:
    torch.manual_seed(0)
    tokens = torch.tensor([[CHARACTERS.index(c)] for c in start])
    text, state = start, None
    for _ in range(count):
        logits, state = model(tokens, state)
        tokens = torch.multinomial((logits[-1] / 0.5).softmax(-1), 1)
        text += CHARACTERS[int(tokens)]
    return text


def main(updates: int = 200) -> Figure:
    def score_and_sample(model: CharacterModel) -> dict[str, float]:
        print(f"sample of {type(model.gru).__module__.split('.')[0]}:", sample(model, "The ", 120))
        return score(model)

    title = f"character model: GRU of {HIDDEN}, {len(TEXT):,} characters"
    return compare(title, CharacterModel, lambda model: train(model, updates), score_and_sample)


if __name__ == "__main__":
    main()
