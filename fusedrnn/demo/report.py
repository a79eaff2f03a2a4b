"""What the terminal shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fusedrnn.demo.result import NAMES, Epoch, Result

ROWS = 25  # a longer run prints every so many epochs only; the JSON file has them all


class Report:
    """Writes to ``console``, whose ``quiet`` silences all ranks but one."""

    def __init__(self, console: Console, epochs: int) -> None:
        self.console = console
        self.epochs = epochs
        self._every = -(-epochs // ROWS)

    def start(self, title: str) -> None:
        self.console.print(title)
        self.console.print(f"{'':5}  {'perplexity':^21}  {'tokens/s':^21}", style="dim")
        names = "  ".join(f"{name:>10}" for name in NAMES)
        self.console.print(f"epoch {names}  {names}  ratio", style="dim")

    @contextmanager
    def progress(self, batches: int) -> Iterator[Progress]:
        """A bar over all ``batches`` of the run, its only task; absent where none can be drawn."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeRemainingColumn(),
        )
        # A seldom redrawn bar takes nothing from the training that it shows.
        bar = Progress(
            *columns,
            console=self.console,
            refresh_per_second=4,
            transient=True,
            disable=self.console.quiet or not self.console.is_terminal,
        )
        bar.add_task("training", total=batches)
        with bar:
            yield bar

    def epoch(self, number: int, epoch: Epoch) -> None:
        """One row for epoch ``number``, counted from 1."""
        if number != 1 and number != self.epochs and number % self._every:
            return
        perplexities = "  ".join(f"{p:10.4f}" for p in epoch.perplexity)
        speeds = "  ".join(f"{epoch.speed(who):10,.0f}" for who in range(len(NAMES)))
        self.console.print(f"{number:5} {perplexities}  {speeds}  {epoch.ratio():5.2f}")

    def finish(self, result: Result) -> None:
        table = Table(title=f"after {len(result.epochs)} epochs")
        table.add_column("")
        for heading in ("perplexity", "tokens/s", "times torch.nn's speed"):
            table.add_column(heading, justify="right")
        for who, name in enumerate(NAMES):
            table.add_row(
                name,
                f"{result.perplexities(who)[-1]:.4f}",
                f"{median(result.speeds(who)):,.0f}",
                f"{result.ratio():.2f}" if who else "1",
            )
        self.console.print(table)
        self.console.print(
            "tokens/s: all of training, median epoch; speed: median of the paired ratios"
        )
        self.console.print(
            f"relative difference of the perplexities: {result.differences()[0]:.1e} in epoch 1, "
            f"{result.largest_difference():.1e} at most\n"
            "(training amplifies rounding, the more the higher the learning rate)"
        )
        for name, text in zip(NAMES, result.texts, strict=True):
            self.console.print(f"{name:>8}: {text}", markup=False)
