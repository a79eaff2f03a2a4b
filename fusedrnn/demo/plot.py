"""The figure that a run leaves."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fusedrnn.demo.result import NAMES, Result

COLORS = ("#56b4e9", "#d55e00")  # told apart by the colour-blind too


def save(result: Result, title: str, path: Path) -> None:
    """Perplexity and speed of both implementations over the epochs, as a PNG."""
    # A Figure of its own draws with Agg and leaves pyplot's state and backend alone.
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    curves, speeds = figure.subplots(1, 2)
    epochs = range(1, len(result.epochs) + 1)
    marker = "o" if len(epochs) == 1 else None  # one point makes no line
    # The curves coincide: a thin dashed one over a thick one shows both.
    styles, widths = ("-", "--"), (4.0, 1.5)
    for who, name in enumerate(NAMES):
        who_is: dict[str, Any] = {"color": COLORS[who], "label": name}
        perplexity = result.perplexities(who)
        curves.plot(epochs, perplexity, styles[who], marker=marker, lw=widths[who], **who_is)
        speeds.plot(epochs, result.speeds(who), marker=marker, **who_is)
    curves.set(xlabel="epoch", ylabel="perplexity", yscale="log")
    curves.set_title(f"largest relative difference {result.largest_difference():.1e}")
    for axis in (curves.yaxis, speeds.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    curves.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    speeds.set(xlabel="epoch", ylabel="tokens/s", ylim=(0, None))
    speeds.set_title(f"training, {result.ratio():.2f} times torch.nn's speed")
    for axes in (curves, speeds):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    figure.savefig(path, format="png")
