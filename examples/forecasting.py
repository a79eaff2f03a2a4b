"""The next day of synthetic hourly electricity demand from a week of demand and the calendar."""

import math
from collections.abc import Iterator
from types import ModuleType

import torch
from compare import Figure, compare
from torch import Tensor, nn

HOURS, HORIZON, T, B, HIDDEN = 24 * 7 * 40, 24, 24 * 7, 32, 96


def demand(regions: int) -> Tensor:
    """(HOURS, regions), of mean about 0: daily and weekly rhythms, weather that drifts, noise."""
    g = torch.Generator().manual_seed(0)
    hour = torch.arange(HOURS)[:, None]
    phase = 3 * torch.rand(regions, generator=g)
    day = 2 * math.pi * hour / 24 - phase
    weekend = (hour // 24 % 7 >= 5).float() * (0.5 + torch.rand(regions, generator=g))
    rhythm = (1 - 0.6 * weekend) * (day.sin() + 0.5 * (2 * day).cos()) - 0.8 * weekend
    shocks = torch.randn(HOURS, regions, generator=g) / 6
    weather = torch.zeros(HOURS, regions)
    for t in range(1, HOURS):
        weather[t] = 0.985 * weather[t - 1] + shocks[t]
    return rhythm + weather + 0.1 * torch.randn(HOURS, regions, generator=g)


def windows(series: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (T, B, 5), demand and calendar; targets (T, B, HORIZON), the hours after each."""
    hours = torch.arange(T)[:, None] + starts % (series.shape[0] - T - HORIZON)
    region = starts % series.shape[1]
    clock = torch.stack([2 * math.pi * hours / 24, 2 * math.pi * hours / (24 * 7)], -1)
    x = torch.cat([series[hours, region][..., None], clock.sin(), clock.cos()], -1)
    ahead = hours[..., None] + torch.arange(1, HORIZON + 1)
    return x, series[ahead, region[:, None]]


class Forecaster(nn.Module):
    """Predicts, at every hour, the demand of each of the next HORIZON hours."""

    def __init__(self, library: ModuleType) -> None:
        super().__init__()
        self.lstm = library.LSTM(5, HIDDEN, num_layers=2, dropout=0.1)
        self.head = nn.Linear(HIDDEN, HORIZON)

    def forward(self, x: Tensor) -> Tensor:
        output, _ = self.lstm(x)
        forecast: Tensor = self.head(output)
        return forecast


def main(updates: int = 150) -> Figure:
    series = demand(regions=16)
    past, future = series[: HOURS * 4 // 5], series[HOURS * 4 // 5 :]
    test, truth = windows(
        future, torch.randint(10**6, (256,), generator=torch.Generator().manual_seed(1))
    )

    def train(model: Forecaster) -> Iterator[None]:
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(updates):
            x, y = windows(past, torch.randint(10**6, (B,)))
            (model(x) - y).abs().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield

    @torch.no_grad()
    def score(model: Forecaster) -> dict[str, float]:
        error = (model(test)[-1] - truth[-1]).abs().mean()
        return {"test error of a day ahead": error.item(), "error of the day before": naive}

    # To beat: each hour will be as it was 24 hours ago.
    naive = (test[-HORIZON:, :, 0].t() - truth[-1]).abs().mean().item()
    return compare(f"forecasting: LSTM of {HIDDEN} x2, {T} hours", Forecaster, train, score)


if __name__ == "__main__":
    main()
