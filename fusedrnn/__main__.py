"""``fusedrnn`` or ``python -m fusedrnn``: describes or checks this installation, runs the demo."""

import argparse
import sys
from collections.abc import Sequence

import fusedrnn
from fusedrnn import check
from fusedrnn.demo import options as demo_options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    parser = argparse.ArgumentParser(prog="fusedrnn")
    parser.add_argument("--version", action="version", version=f"fusedrnn {fusedrnn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = "train a character language model with torch.nn and with fusedrnn, and compare"
    commands.add_parser("info", help="versions, CPU instruction set, CUDA architectures, devices")
    proof = "run every kernel family of this machine against float64, each in its own process"
    check.add_arguments(commands.add_parser("check", help=proof, description=proof))
    demo_options.add_arguments(commands.add_parser("demo", help=demo, description=demo))
    options = parser.parse_args(arguments)
    if options.command == "info":
        for name, value in fusedrnn.info().items():
            print(f"{name}: {value}")
        return 0
    if options.command == "check":
        return check.main(options)
    try:
        from fusedrnn.demo import cli  # here, as rich and matplotlib are an optional dependency

        return cli.run(options)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("rich", "matplotlib"):
            raise
        print(f'the demo needs {package}: pip install "fusedrnn[demo]"', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
