"""A syntax highlighter: tags every character of a line of Python, lines of any length a batch."""

import io
import keyword
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from compare import Figure, compare
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import fusedrnn

MODULES = (
    "argparse ast copy dataclasses datetime difflib enum inspect json/decoder textwrap".split()
)
TAGS = {tokenize.NUMBER: 3, tokenize.STRING: 4, tokenize.COMMENT: 5, tokenize.OP: 6}  # 0: none
NAME, KEYWORD, COUNT = 1, 2, 7
B, HIDDEN, LONGEST = 64, 96, 120


def tagged_lines(source: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Characters and tags of each line, except where a string continues from line to line."""
    lines = source.splitlines()
    tags = [torch.zeros(len(line), dtype=torch.int64) for line in lines]
    continued = set()
    for kind, text, (row, start), (end_row, end), _ in tokenize.generate_tokens(
        io.StringIO(source).readline
    ):
        if row != end_row:
            continued |= set(range(row, end_row + 1))
        elif kind == tokenize.NAME:
            tags[row - 1][start:end] = KEYWORD if keyword.iskeyword(text) else NAME
        elif kind in TAGS:
            tags[row - 1][start:end] = TAGS[kind]
    for number, (line, tag) in enumerate(zip(lines, tags, strict=True), 1):
        if line.strip() and number not in continued and len(line) <= LONGEST and line.isascii():
            yield torch.tensor([ord(c) for c in line]), tag


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    """Characters (T, B), lengths (B,) and tags (T, B), -1 past a length."""
    folder = Path(sysconfig.get_path("stdlib"))
    sources = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    lines = [line for source in sources for line in tagged_lines(source)]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for start in range(0, len(lines) - B + 1, B):
        texts, tags = map(list, zip(*(lines[i] for i in order[start : start + B]), strict=True))
        lengths = torch.tensor([len(text) for text in texts])
        found.append((pad_sequence(texts), lengths, pad_sequence(tags, padding_value=-1)))
    return found


class Tagger(nn.Module):
    def __init__(self, library: ModuleType) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 32)
        self.lstm = library.LSTM(32, HIDDEN, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, COUNT)

    def forward(self, characters: Tensor, lengths: Tensor) -> Tensor:
        """(T, B), (B,) -> logits (T, B, tags)."""
        x = self.embedding(characters)
        if isinstance(self.lstm, fusedrnn.LSTM):
            output, _ = self.lstm(x, lengths=lengths)
        else:
            packed, _ = self.lstm(pack_padded_sequence(x, lengths, enforce_sorted=False))
            output, _ = pad_packed_sequence(packed)
        logits: Tensor = self.head(output)
        return logits


def main(updates: int = 80) -> Figure:
    data = batches()
    test, training = data[:10], data[10:]

    def train(model: Tagger) -> Iterator[None]:
        optimizer = torch.optim.Adam(model.parameters(), 4e-3)
        for update in range(updates):
            characters, lengths, tags = training[update % len(training)]
            logits = model(characters, lengths)
            cross_entropy(logits.flatten(0, 1), tags.flatten(), ignore_index=-1).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            yield

    @torch.no_grad()
    def score(model: Tagger) -> dict[str, float]:
        right = total = 0
        for characters, lengths, tags in test:
            best = model(characters, lengths).argmax(-1)
            right += int((best == tags).sum())
            total += int(lengths.sum())
        return {"test accuracy, %": 100 * right / total}

    title = f"tagging: bidirectional LSTM of {HIDDEN}, {len(data) * B} lines of Python"
    return compare(title, Tagger, train, score)


if __name__ == "__main__":
    main()
