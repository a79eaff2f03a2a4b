"""The demo's command line. Imports neither torch nor rich, so that ``--help`` always works."""

import argparse
from pathlib import Path


class DemoError(Exception):
    """What the user gave cannot be used; the message is one sentence that says why."""


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def natural(text: str) -> int:
    """An argparse type: an integer of at least 0 that torch takes as a seed."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 2**63, not {value}")
    return value


def positive_number(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text}")
    return value


def temperature(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, not {text}")
    return value


def probability(text: str) -> float:
    """An argparse type: a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, not {text}")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add every option of the demo to ``parser``."""
    data = parser.add_argument_group("text")
    add = data.add_argument
    add("--text", type=Path, metavar="FILE", help="UTF-8 text (default: Python's own help topics)")
    add(
        "--max-tokens",
        type=natural,
        default=10_000,
        metavar="N",
        help="train on the first N characters, 0 for all (default: %(default)s)",
    )
    add(
        "--sampling",
        choices=("sequential", "random"),
        default="sequential",
        help="sequential carries the state from batch to batch, random starts each batch from "
        "zeros (default: %(default)s)",
    )

    model = parser.add_argument_group("model")
    add = model.add_argument
    add("--cell", choices=("rnn", "relu", "gru", "lstm"), default="gru", help="default: gru")
    add("--layers", type=positive, default=1, metavar="N", help="default: %(default)s")
    add("--hidden", type=positive, default=256, metavar="N", help="default: %(default)s")
    add("--dropout", type=probability, default=0.0, metavar="P", help="default: %(default)s")
    add(
        "--integers",
        action="store_true",
        help="fusedrnn's layer reads the characters as integers, which torch.nn's cannot, in place "
        "of one-hot vectors",
    )

    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--batch", type=positive, default=32, metavar="N", help="default: %(default)s")
    add("--steps", type=positive, default=35, metavar="N", help="default: %(default)s")
    add("--epochs", type=positive, default=100, metavar="N", help="default: %(default)s")
    add(
        "--optimizer",
        choices=("adam", "sgd"),
        help="default: adam, in half precision sgd, which needs no squares of gradients",
    )
    add(
        "--lr", type=positive_number, metavar="X", help="default: one that suits cell and optimizer"
    )
    add("--seed", type=natural, default=0, metavar="N", help="default: %(default)s")

    machine = parser.add_argument_group("machine")
    add = machine.add_argument
    add("--device", metavar="NAME", help="such as cpu or cuda:1 (default: cuda if there is one)")
    add(
        "--dtype",
        choices=("float32", "float64", "bfloat16", "float16"),
        default="float32",
        help="of weights and arithmetic (default: %(default)s)",
    )
    add("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")

    result = parser.add_argument_group("result")
    add = result.add_argument
    add("--prefix", metavar="TEXT", help="what the sampled text begins with")
    add(
        "--generate",
        type=natural,
        default=150,
        metavar="N",
        help="characters to sample after the prefix (default: %(default)s)",
    )
    add(
        "--temperature",
        type=temperature,
        default=0.3,
        metavar="X",
        help="of the sampling: higher is more varied, 0 takes the likeliest (default: %(default)s)",
    )
    add(
        "--out",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="where fusedrnn-demo.png and fusedrnn-demo.json go (default: here)",
    )
