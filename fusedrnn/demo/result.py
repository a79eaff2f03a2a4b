"""What a run measured. Everything comes in the order of ``NAMES``."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

NAMES = ("torch.nn", "fusedrnn")


@dataclass(frozen=True)
class Epoch:
    """One epoch: both implementations trained on its batches, taking turns."""

    tokens: int
    perplexity: tuple[float, float]
    turns: list[tuple[float, float]]  # seconds of the two, turn by turn

    def speed(self, who: int) -> float:
        """Tokens a second, over the whole of training: input, forward, backward, update."""
        return self.tokens / sum(seconds[who] for seconds in self.turns)

    def ratio(self) -> float:
        """How many times faster than torch.nn: the median over the epoch's turns."""
        return median(ratios([self]))


def ratios(epochs: Iterable[Epoch]) -> list[float]:
    """torch.nn's time by fusedrnn's for every turn: what disturbs one turn moves no other."""
    return [reference / fused for epoch in epochs for reference, fused in epoch.turns]


def perplexity(mean_loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


@dataclass
class Result:
    """A run so far."""

    settings: dict[str, Any]
    epochs: list[Epoch] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def perplexities(self, who: int) -> list[float]:
        return [epoch.perplexity[who] for epoch in self.epochs]

    def speeds(self, who: int) -> list[float]:
        return [epoch.speed(who) for epoch in self.epochs]

    def ratio(self) -> float:
        """The median over all turns of all epochs."""
        return median(ratios(self.epochs))

    def differences(self) -> list[float]:
        """Of fusedrnn's perplexity from torch.nn's, relative, by epoch."""
        curves = [epoch.perplexity for epoch in self.epochs]
        return [abs(fused / reference - 1) for reference, fused in curves]

    def largest_difference(self) -> float:
        """The largest of ``differences``; NaN if any is."""
        differences = self.differences()
        return math.nan if any(map(math.isnan, differences)) else max(differences)

    def as_json(self) -> dict[str, Any]:
        """Every figure; ``null`` stands for what is not finite."""
        implementations = {
            name: {
                "perplexity": [_finite(p) for p in self.perplexities(who)],
                "tokens_per_second": self.speeds(who),
                "median_tokens_per_second": median(self.speeds(who)),
                "text": self.texts[who],
            }
            for who, name in enumerate(NAMES)
        }
        return {
            "settings": self.settings,
            "implementations": implementations,
            "seconds_per_turn": [epoch.turns for epoch in self.epochs],
            "ratio": [epoch.ratio() for epoch in self.epochs],
            "median_ratio": self.ratio(),
            "relative_perplexity_difference": [_finite(d) for d in self.differences()],
            "largest_relative_perplexity_difference": _finite(self.largest_difference()),
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
