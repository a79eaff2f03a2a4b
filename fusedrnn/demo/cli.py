"""The demo from its options to its files."""

import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from torch.optim import Optimizer

import fusedrnn
from fusedrnn.demo import model, plot, text
from fusedrnn.demo.options import DemoError
from fusedrnn.demo.ranks import Ranks
from fusedrnn.demo.report import Report
from fusedrnn.demo.result import Result
from fusedrnn.demo.settings import settings_of, title_of
from fusedrnn.demo.train import Learner, race

# Higher rates learn faster, but training then amplifies rounding so fast that equal models part. In
# 60 epochs of adam at these rates the default run's curves (gru) differed by at most 3.7e-6, those
# of rnn by 1.3e-3; those of lstm by 6.6e-4 in 50 and of relu by 2.0e-2 in 40.
LEARNING_RATES = {
    "adam": {"rnn": 1e-3, "relu": 5e-4, "gru": 2e-3, "lstm": 2e-3},
    "sgd": {"rnn": 0.5, "relu": 1.0, "gru": 1.0, "lstm": 2.0},
}
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
PNG, JSON = "fusedrnn-demo.png", "fusedrnn-demo.json"


def run(options: Namespace) -> int:
    """The exit code of ``python -m fusedrnn demo`` with these options."""
    ranks = Ranks.from_environment()
    try:
        return _run(options, ranks)
    except DemoError as error:
        if ranks.rank == 0:
            print(f"fusedrnn demo: error: {error}", file=sys.stderr)
        return 2


def _run(options: Namespace, ranks: Ranks) -> int:
    content = text.load(options.text)
    vocabulary = text.Vocabulary(content)
    prefix = options.prefix
    if prefix is None:
        prefix = text.default_prefix(content, vocabulary, own_file=options.text is not None)
    prefix = text.check_prefix(prefix, vocabulary)
    corpus = vocabulary.encode(content[: options.max_tokens or None])
    batches = text.batches_per_epoch(len(corpus), options.batch, options.steps)
    ranks.check_batch(options.batch)
    _check_out(options.out)
    dtype = getattr(torch, options.dtype)
    device = _usable_device(options.device, dtype, ranks)
    if options.threads:
        torch.set_num_threads(options.threads)
    half = dtype in (torch.bfloat16, torch.float16)
    optimizer = options.optimizer or ("sgd" if half else "adam")
    lr = LEARNING_RATES[optimizer][options.cell] if options.lr is None else options.lr

    settings = settings_of(
        options,
        ranks,
        device,
        prefix=prefix,
        optimizer=optimizer,
        lr=lr,
        vocabulary=len(vocabulary),
        tokens=len(corpus),
        batches_per_epoch=batches,
    )
    result = Result(settings)
    title = title_of(settings)
    report = Report(Console(quiet=ranks.rank != 0, highlight=False), options.epochs)
    with ranks.group(device):
        learners = [
            Learner(
                m,
                OPTIMIZERS[optimizer](m.parameters(), lr=lr),
                options.sampling == "sequential",
                ranks,
            )
            for m in _equal_models(options, len(vocabulary), device, dtype)
        ]
        report.start(title)
        interrupted = False
        try:
            with report.progress(batches * options.epochs) as bar:
                for epoch in race(
                    learners,
                    corpus.to(device),
                    batch=options.batch,
                    steps=options.steps,
                    epochs=options.epochs,
                    sampling=options.sampling,
                    seed=options.seed,
                    ranks=ranks,
                    after_turn=lambda done: bar.advance(bar.task_ids[0], done),
                ):
                    result.epochs.append(epoch)
                    report.epoch(len(result.epochs), epoch)
        except KeyboardInterrupt:
            interrupted = True
            report.console.print("interrupted")
    if result.epochs and ranks.rank == 0:
        result.texts = [
            model.generate(
                learner.model,
                vocabulary,
                prefix,
                options.generate,
                options.temperature,
                options.seed,
            )
            for learner in learners
        ]
        report.finish(result)
        _save(result, title, options.out)
        report.console.print(f"saved {options.out / PNG} and {options.out / JSON}", soft_wrap=True)
    return 130 if interrupted else 0


def _equal_models(
    options: Namespace, vocabulary: int, device: torch.device, dtype: torch.dtype
) -> list[model.CharModel]:
    """One with torch.nn's layer and one with fusedrnn's, and the same weights in both."""
    torch.manual_seed(options.seed)
    models = [
        model.build(
            library,
            options.cell,
            vocabulary,
            options.hidden,
            options.layers,
            options.dropout,
            integers=options.integers and library is fusedrnn,
        ).to(device, dtype)
        for library in (torch.nn, fusedrnn)
    ]
    models[1].load_state_dict(models[0].state_dict())
    return models


def _usable_device(name: str | None, dtype: torch.dtype, ranks: Ranks) -> torch.device:
    """The device of this name, or the best there is; under torchrun, this rank's own GPU."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", ranks.local)
        torch.ones(1, device=device, dtype=dtype).sum().item()
    except Exception as error:  # each backend raises its own kind
        why = str(error).splitlines()[0].rstrip(".")
        if why.startswith("Expected one of"):  # and here torch lists all that it has heard of
            found = torch.accelerator.current_accelerator(check_available=True)
            others = f" and {found.type}" if found else ""
            why = f"torch has no device of this name, this machine has cpu{others}"
        raise DemoError(f"device {name!r} cannot be used: {why}.") from error
    if ranks.size > 1 and torch.device(name).index is not None:
        raise DemoError(f"under torchrun give --device without a number, not {name!r}.")
    return device


def _check_out(folder: Path) -> None:
    """Better to fail before the training than after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"cannot make {folder}: {error.strerror or error}.") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise DemoError(f"cannot write to {folder}.")


def _save(result: Result, title: str, folder: Path) -> None:
    try:
        (folder / JSON).write_text(json.dumps(result.as_json(), indent=1) + "\n", encoding="utf-8")
        plot.save(result, title, folder / PNG)
    except OSError as error:
        raise DemoError(f"cannot write to {folder}: {error.strerror or error}.") from error
