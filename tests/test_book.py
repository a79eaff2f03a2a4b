"""The training loop of a textbook on its text: a character model with a swapped recurrent layer.

What the loop asks of the layer: `isinstance` decides between one state and two, states are made by
hand, handed from batch to batch and detached in place, gradients are clipped.
"""

import math
import os
import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

import fusedrnn

TIME_MACHINE = Path(__file__).resolve().parents[1] / "../shared/data/timemachine.txt"
CHARACTERS = 10_000


class RNNModel(nn.Module):
    """One-hot characters, a recurrent layer, and a linear one to the next character."""

    def __init__(self, rnn, vocabulary):
        super().__init__()
        self.rnn = rnn
        self.vocabulary = vocabulary
        self.linear = nn.Linear(rnn.hidden_size * (2 if rnn.bidirectional else 1), vocabulary)

    def forward(self, inputs, state):
        """inputs (batch, steps) -> logits (steps * batch, vocabulary), state."""
        x = one_hot(inputs.T, self.vocabulary).to(self.linear.weight.dtype)
        y, state = self.rnn(x, state)
        return self.linear(y.reshape(-1, y.shape[-1])), state

    def begin_state(self, batch):
        shape = (self.rnn.num_layers, batch, self.rnn.hidden_size)
        weight = self.linear.weight
        if isinstance(self.rnn, nn.LSTM):
            return weight.new_zeros(shape), weight.new_zeros(shape)
        return weight.new_zeros(shape)


def random_batches(corpus, batch, steps, rng):
    """Minibatches of subsequences in random order."""
    corpus = corpus[rng.randrange(steps) :]
    starts = [i * steps for i in range((len(corpus) - 1) // steps)]
    rng.shuffle(starts)
    for i in range(0, len(starts) // batch * batch, batch):
        rows = starts[i : i + batch]
        yield (
            torch.stack([corpus[j : j + steps] for j in rows]),
            torch.stack([corpus[j + 1 : j + 1 + steps] for j in rows]),
        )


def sequential_batches(corpus, batch, steps, rng):
    """Minibatches of which each goes on where the one before it ended."""
    corpus = corpus[rng.randrange(steps) :]
    count = (len(corpus) - 1) // batch * batch
    inputs, targets = corpus[:count].view(batch, -1), corpus[1 : count + 1].view(batch, -1)
    for i in range(0, inputs.shape[1] // steps * steps, steps):
        yield inputs[:, i : i + steps], targets[:, i : i + steps]


def train_epoch(model, batches, optimizer, keep_state):
    """Perplexity over one epoch."""
    state, total, count = None, 0.0, 0
    for inputs, targets in batches:
        if state is None or not keep_state:
            state = model.begin_state(len(inputs))
        else:
            for s in state if isinstance(state, tuple) else (state,):
                s.detach_()
        logits, state = model(inputs, state)
        loss = cross_entropy(logits, targets.T.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1)
        optimizer.step()
        total, count = total + loss.item() * targets.numel(), count + targets.numel()
    return math.exp(total / count)


def train(model, corpus, sampling, batch, steps, lr, epochs, target=0.0):
    """Perplexity of each epoch, until `target` is reached."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rng = random.Random(0)
    batches = {"sequential": sequential_batches, "random": random_batches}[sampling]
    perplexities = []
    for _ in range(epochs):
        keep_state = sampling == "sequential"
        found = train_epoch(model, batches(corpus, batch, steps, rng), optimizer, keep_state)
        perplexities.append(found)
        if found < target:
            break
    return perplexities


def encode(text):
    """Indices by frequency, 0 kept for what is unknown; and their number."""
    alphabet = sorted(set(text), key=lambda c: (-text.count(c), c))
    index = {c: i + 1 for i, c in enumerate(alphabet)}
    return torch.tensor([index[c] for c in text]), len(alphabet) + 1


def predict(model, prefix, length, corpus_text):
    """`prefix` and what the model takes to follow it."""
    alphabet = ["?", *sorted(set(corpus_text), key=lambda c: (-corpus_text.count(c), c))]
    state, text = model.begin_state(1), prefix
    with torch.no_grad():
        for i in range(len(prefix) + length - 1):
            logits, state = model(torch.tensor([[alphabet.index(text[i])]]), state)
            if i >= len(prefix) - 1:
                text += alphabet[logits.argmax()]
    return text


@pytest.mark.parametrize("sampling", ["sequential", "random"])
@pytest.mark.parametrize("layer", ["RNN", "GRU", "LSTM"])
def test_losses_of_a_small_model_are_those_of_torch(layer, sampling):
    text = "the quick brown fox jumps over the lazy dog " * 8
    corpus, vocabulary = encode(text)
    curves, texts = [], []
    for swapped in (False, True):
        torch.manual_seed(0)
        model = RNNModel(getattr(nn, layer)(vocabulary, 12, num_layers=2), vocabulary).double()
        if swapped:
            fusedrnn.swap(model)
        curves.append(train(model, corpus, sampling, batch=4, steps=7, lr=1.0, epochs=12))
        texts.append(predict(model, "the quick", 20, text))
    assert curves[1] == pytest.approx(curves[0], rel=1e-9)
    assert curves[1][-1] < 0.9 * curves[1][0]
    assert texts[1] == texts[0]


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["sequential", "random"])
def test_time_machine(sampling):
    """Two layers of 256 units come to know the first pages by heart."""
    if not TIME_MACHINE.is_file():
        pytest.skip(f"needs the text of The Time Machine at {TIME_MACHINE}")
    lines = TIME_MACHINE.read_text().splitlines()
    text = "".join(re.sub("[^A-Za-z]+", " ", line).strip().lower() for line in lines)[:CHARACTERS]
    corpus, vocabulary = encode(text)
    torch.set_num_threads(os.cpu_count() or 1)
    model = RNNModel(fusedrnn.LSTM(vocabulary, 256, num_layers=2), vocabulary)
    curve = train(model, corpus, sampling, batch=32, steps=35, lr=2.0, epochs=500, target=1.3)
    assert curve[-1] < 1.3, curve[::20]
    assert len(predict(model, "time traveller", 50, text)) == 64
