"""The book's whole training loop: data, forward, loss, backward, clipping, update.

Both implementations train the same model from the same weights on the same batches in turns. The
loop is the demo's (`fusedrnn.demo.train`).
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import fusedrnn
from benchmarks import measure
from benchmarks.cases import CASES, Case
from benchmarks.measure import Budget, Summary
from fusedrnn.demo.model import CharModel
from fusedrnn.demo.ranks import Ranks
from fusedrnn.demo.result import Epoch
from fusedrnn.demo.text import Vocabulary, load
from fusedrnn.demo.train import Learner, race

JOBS = tuple(case for case in CASES if case.name.startswith("book-"))
TOKENS = 10_000  # of the text, as in the book: an epoch has few batches
# Tokens/s that readers of the book reported for its loop on unnamed GPUs; not comparable in detail.
REPORTED = {
    "book-rnn-256": (404_414,),
    "book-gru-256": (230_591,),
    "book-lstm-256x2": (224_250, 116_174),
    "book-rnn-512x2": (63_514,),
}
SAME = 1e-3  # relative: how far perplexities may be apart after the first epoch


@dataclass(frozen=True)
class Training:
    """One job; pairs are in the order torch.nn, fusedrnn."""

    job: str
    shape: str
    threads: int
    device: str
    tokens_per_second: list[float]
    perplexity: list[float]  # of the last epoch
    epochs: int
    speedup: Summary
    verdict: str
    problem: str | None = None


def corpus_of(case: Case) -> Tensor:
    """The text's first tokens as indices below ``case.input_size``; 0 is unknown.

    Characters where the vocabulary has that size, else words by frequency.
    """
    text = load(None)
    vocabulary = Vocabulary(text)
    if case.input_size == len(vocabulary):
        return vocabulary.encode(text[:TOKENS])
    words = text.split()
    index = {w: i + 1 for i, (w, _) in enumerate(Counter(words).most_common(case.input_size - 1))}
    return torch.tensor([index.get(word, 0) for word in words[:TOKENS]])


def train(
    jobs: Sequence[Case], threads: Sequence[int], device: torch.device, budget: Budget
) -> Iterator[Training]:
    """Trains each job in float32 within ``budget``; a round is an epoch."""
    for case in jobs:
        for number in threads:
            before = torch.get_num_threads()
            torch.set_num_threads(number)
            try:
                yield _train(case, device, budget)
            finally:
                torch.set_num_threads(before)


def _train(case: Case, device: torch.device, budget: Budget) -> Training:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = CharModel(case.module(torch.float32)).to(device)
    fused = copy.deepcopy(plain)
    fusedrnn.swap(fused)
    corpus = corpus_of(case).to(device)
    learners = [
        Learner(model, torch.optim.SGD(model.parameters(), 1.0), carry_state=False, ranks=Ranks())
        for model in (plain, fused)
    ]
    epochs: list[Epoch] = []
    start = time.perf_counter()
    for epoch in race(
        learners,
        corpus,
        batch=case.batch,
        steps=case.steps,
        epochs=2**31,
        sampling="random",
        seed=0,
        ranks=Ranks(),
        after_turn=lambda batches: None,
    ):
        epochs.append(epoch)
        if budget.spent(len(epochs), time.perf_counter() - start):
            break
    turns = [turn for epoch in epochs for turn in epoch.turns]
    ratio = measure.speedup([a for a, _ in turns], [b for _, b in turns])
    reference, ours = epochs[0].perplexity
    apart = abs(ours / reference - 1)
    tokens = sum(epoch.tokens for epoch in epochs)
    return Training(
        job=case.name,
        shape=case.shape,
        threads=torch.get_num_threads(),
        device=str(device),
        tokens_per_second=[tokens / sum(turn[who] for turn in turns) for who in (0, 1)],
        perplexity=list(epochs[-1].perplexity),
        epochs=len(epochs),
        speedup=ratio,
        verdict=measure.verdict(ratio, Summary(1.0, 1.0, 1.0, 0)),
        problem=None if apart <= SAME else f"perplexities are {apart:.1e} apart after one epoch",
    )
