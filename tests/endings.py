"""Functions of families that end in every way, for test_check.py: other processes import them."""

from __future__ import annotations

import os
import signal
import time


def right() -> None:
    return None


def wrong() -> str:
    return "has an error"


def raises() -> None:
    raise ValueError("no such thing")


def crashes() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs() -> None:
    time.sleep(600)
