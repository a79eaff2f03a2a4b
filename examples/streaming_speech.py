"""Vowels of synthetic speech, recognised frame by frame as they arrive."""

import math
import time
from collections.abc import Iterator
from types import ModuleType

import torch
from compare import Figure, compare
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

RATE, HOP, WINDOW, BANDS, HIDDEN = 8000, 80, 200, 24, 128  # a frame every 10 ms
# Silence, and the first two formants in Hz of the vowels of "bat, bet, beat, boat, boot".
FORMANTS = torch.tensor([[0, 0], [700, 1700], [550, 1800], [300, 2250], [500, 900], [320, 850]])
State = tuple[Tensor, Tensor] | None


def speech(count: int, frames: int, seed: int) -> tuple[Tensor, Tensor]:
    """Sound (count, samples) of speakers with pitch and size of their own, vowels (count, frames).

    A source-filter model: harmonics of the pitch, each as loud as the formants let it pass.
    """
    g = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=g)

    segments = torch.randint(len(FORMANTS), (count, frames // 5), generator=g)
    new = torch.rand(segments.shape, generator=g) < 0.4  # else the vowel before goes on
    steps = torch.where(new, torch.arange(segments.shape[1]), 0).cummax(1).values
    vowels = segments.gather(1, steps).repeat_interleave(5, 1)
    pitch = uniform(90, 250, count, 1) * (1 + 0.1 * uniform(-1, 1, count, frames))
    phase = (2 * math.pi / RATE * pitch.repeat_interleave(HOP, 1)).cumsum(1)
    formants = FORMANTS[vowels] * uniform(0.9, 1.15, count, 1, 1)  # (count, frames, 2)
    sound = 0.01 * torch.randn(count, frames * HOP, generator=g)
    for k in range(1, 36):
        distance = (k * pitch)[..., None] - formants
        loud = (1 / (1 + (distance / 80) ** 2)).sum(-1) * (vowels > 0) * (k * pitch < RATE / 2)
        sound += loud.repeat_interleave(HOP, 1) * torch.sin(k * phase)
    return sound, vowels


def features(sound: Tensor) -> Tensor:
    """Logarithms of the power in bands, spaced as the ear does: (frames, count, BANDS)."""
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(sound, 256, HOP, WINDOW, window, return_complex=True).abs() ** 2
    mel = torch.linspace(0, 2595 * math.log10(1 + RATE / 2 / 700), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    f = torch.linspace(0, RATE / 2, spectrum.shape[1])
    bands = torch.minimum((f - low) / (centre - low), (high - f) / (high - centre)).clamp(min=0)
    return ((bands @ spectrum[..., :-1]).clamp(min=1e-6).log() / 4).permute(2, 0, 1)


class Recogniser(nn.Module):
    def __init__(self, library: ModuleType) -> None:
        super().__init__()
        self.lstm = library.LSTM(BANDS, HIDDEN, num_layers=2)
        self.head = nn.Linear(HIDDEN, len(FORMANTS))

    def forward(self, frames: Tensor, state: State = None) -> tuple[Tensor, State]:
        output, state = self.lstm(frames, state)
        return self.head(output), state


def main(updates: int = 60, streamed: int = 500) -> Figure:
    sound, vowels = speech(64, 200, seed=0)
    training, labels = features(sound), vowels.t()
    sound, vowels = speech(16, streamed, seed=1)
    test, test_labels = features(sound), vowels.t()

    def train(model: Recogniser) -> Iterator[None]:
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for update in range(updates):
            rows = slice(update % 4 * 16, update % 4 * 16 + 16)
            logits, _ = model(training[:, rows])
            cross_entropy(logits.flatten(0, 1), labels[:, rows].flatten()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield

    @torch.inference_mode()
    def score(model: Recogniser) -> dict[str, float]:
        whole, _ = model(test)
        state: State = None
        frames, seconds = [], []
        for frame in test[:, :1].split(1):  # one speaker, as a microphone delivers it
            start = time.perf_counter()
            logits, state = model(frame, state)
            seconds.append(time.perf_counter() - start)
            frames.append(logits)
        torch.testing.assert_close(torch.cat(frames), whole[:, :1], rtol=1e-3, atol=1e-3)
        accuracy = (whole.argmax(-1) == test_labels).double().mean().item()
        median = sorted(seconds)[len(seconds) // 2]
        return {"test accuracy, %": 100 * accuracy, "one streamed frame, us": 1e6 * median}

    return compare(f"streaming speech: LSTM of {HIDDEN} x2, 10 ms frames", Recogniser, train, score)


if __name__ == "__main__":
    main()
