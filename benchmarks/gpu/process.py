"""What every working process does first: the device, its stand-in, what the canaries have said."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch

from fusedrnn import cuda, families

ROOT = Path(__file__).resolve().parents[2]
# The variable with what canaries have found: names of families, one a line, "-" before those that
# failed and are struck out, "+" before the others.
CANARIES = "FUSEDRNN_GPU_CANARIES"
FAILED = "failed as a canary"  # what a struck family's check answers
EMULATOR = "emulator"  # a device's name: the CUDA kernels on the CPU


def python_path() -> dict[str, str]:
    """PYTHONPATH with the clone, for processes started in other folders."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def begin(name: str) -> torch.device:
    """The device of that name, usable. Under the emulator the package's ops run its kernels."""
    obey_canaries()
    if name != EMULATOR:
        return torch.device(name)
    torch.set_num_threads(1)
    stand_in().install()
    return torch.device("cpu")


def stand_in() -> Any:
    """tests/emulator/stand_in.py."""
    if (folder := str(ROOT / "tests")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module("emulator.stand_in")


def obey_canaries() -> None:
    """Has the package's own check of a family answer what its canary has found.

    A family that hung before would hang again; one that was right need not be checked again. One
    that no canary has run checks itself, as all do where the variable is not set.
    """
    if CANARIES not in os.environ:
        return
    right = {line[1:]: line[0] == "+" for line in os.environ[CANARIES].splitlines()}
    os.environ[cuda.SWITCH] = "verified"
    compute, check = families.problem, families.verify

    def problem(family: families.Family, ops: Any, device: torch.device) -> str | None:
        return compute(family, ops, device) if right.get(family.name, True) else FAILED

    def verify(number: int, namespace: str, device: str) -> str:
        name = families.by_number(number).name
        if name not in right:
            return check(number, namespace, device)
        return "" if right[name] else FAILED

    families.problem, families.verify = problem, verify
