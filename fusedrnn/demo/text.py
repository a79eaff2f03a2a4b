"""From a text to batches of character indices.

Shapes: T steps of a batch of B subsequences; an epoch has N batches.
"""

import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from fusedrnn.demo.options import DemoError

UNKNOWN = "<unk>"


def load(path: Path | None) -> str:
    """The text as lowercase letters and single spaces; ``None`` means Python's help topics."""
    if path is None:
        from pydoc_data.topics import topics

        name, raw = "Python's help topics", " ".join(topics.values())
    else:
        name = str(path)
        try:
            raw = path.read_text(encoding="utf-8-sig")
        except OSError as error:
            raise DemoError(f"cannot read {name}: {error.strerror or error}.") from error
        except UnicodeDecodeError as error:
            raise DemoError(f"{name} is not UTF-8 text (byte {error.start}).") from error
    text = re.sub("[^A-Za-z]+", " ", raw).strip().lower()
    if not text:
        raise DemoError(f"{name} holds no letter from A to Z.")
    return text


class Vocabulary:
    """Characters to indices and back: 0 is unknown, then the most frequent first."""

    def __init__(self, text: str) -> None:
        self.tokens = [UNKNOWN, *(token for token, _ in Counter(text).most_common())]
        self.index = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> Tensor:
        """Indices, (len(text),) int64."""
        return torch.tensor([self.index.get(token, 0) for token in text], dtype=torch.int64)

    def decode(self, indices: list[int]) -> str:
        return "".join(self.tokens[i] for i in indices)


def check_prefix(prefix: str, vocabulary: Vocabulary) -> str:
    """``prefix`` in lower case, if the model knows every character of it."""
    prefix = prefix.lower()
    if not prefix:
        raise DemoError("the prefix is empty.")
    unknown = sorted(set(prefix) - set(vocabulary.tokens))
    if unknown:
        raise DemoError(f"the prefix has characters that the text has not: {unknown}.")
    return prefix


def default_prefix(text: str, vocabulary: Vocabulary, own_file: bool) -> str:
    """The chapters' "time traveller" for a file with these letters, else the text's first words."""
    if own_file and set("time traveller") <= set(vocabulary.tokens):
        return "time traveller"
    return " ".join(text[:100].split()[:3])


def batches_per_epoch(tokens: int, batch: int, steps: int) -> int:
    """How many whole batches every epoch has, whichever offset below ``steps`` it draws."""
    count = (tokens - steps) // (batch * steps)
    if count < 1:
        raise DemoError(
            f"{tokens} characters are too few: a batch of {batch} with {steps} steps needs "
            f"{(batch + 1) * steps}."
        )
    return count


def draw_starts(
    tokens: int, batch: int, steps: int, sampling: str, generator: torch.Generator
) -> Tensor:
    """Where each subsequence of an epoch starts in the corpus, (N, B) int64.

    From a random offset below ``steps`` the corpus is cut into N*B adjacent subsequences, each of
    which is in exactly one batch. ``sequential`` puts them so that row b of batch n + 1 continues
    row b of batch n, ``random`` shuffles them.
    """
    count = batches_per_epoch(tokens, batch, steps)
    offset = torch.randint(steps, (1,), generator=generator)
    if sampling == "sequential":
        order = torch.arange(count * batch).view(batch, count).t()
    else:
        order = torch.randperm(count * batch, generator=generator).view(count, batch)
    return offset + steps * order


def gather(corpus: Tensor, starts: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets, both (N, T, B), for ``starts`` (N, B): targets are one token ahead."""
    where = starts[:, None, :] + torch.arange(steps, device=starts.device)[None, :, None]
    return corpus[where], corpus[where + 1]
