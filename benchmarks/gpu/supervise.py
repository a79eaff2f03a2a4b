"""Processes that may crash.

An illegal access destroys the CUDA context of its process, and a kernel may never return. Work
therefore runs in a separate process, which writes a line of JSON to a file when it starts an item
and one when the item is done. A process that dies or stops answering loses its current item, and
another process continues with the remaining items.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STARTS = 30  # the most starts of the process
STARTUP = 60.0  # seconds until a process's first line: it imports torch and finds the device
LOST = 77  # exit code: the item is recorded, but the process cannot continue


class Journal:
    """The file of JSON lines, for the working process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done = {line["id"] for line in read(path) if "start" not in line}

    def start(self, item: str) -> None:
        self._write({"id": item, "start": True})

    def finish(self, item: str, **found: Any) -> None:
        self._write({"id": item, **found})

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a journal; the last may be cut off by a crash."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


@dataclass
class Outcome:
    """Results by id, and the reason if some are missing."""

    found: dict[str, dict[str, Any]] = field(default_factory=dict)
    incomplete: str | None = None


def supervise(
    command: Sequence[str],
    journal: Path,
    log: Path,
    deadline: float,
    silence: float,
    environment: Mapping[str, str] | None = None,
    good: Sequence[int] = (0,),
) -> Outcome:
    """Starts ``command`` until it ends with one of the exit codes ``good``.

    ``deadline`` is a time of time.monotonic(); ``silence`` is the limit of an item in seconds,
    which is longer until the first one begins.
    """
    outcome = Outcome()
    for _ in range(STARTS):
        before = len(read(journal))
        ending = _run_once(command, journal, log, deadline, silence, environment)
        lines = read(journal)
        outcome.found = {line["id"]: line for line in lines if "start" not in line}
        if ending in good:
            return outcome
        if ending == "out of time":
            outcome.incomplete = "out of time"
            return outcome
        at = next((line["id"] for line in reversed(lines) if line["id"] not in outcome.found), None)
        if at is not None:
            why = ending if isinstance(ending, str) else _how(ending)
            problem = f"{why}: {tail(log)}" if tail(log) else why
            with journal.open("a") as file:  # the previous line may be cut off
                file.write("\n" + json.dumps({"id": at, "problem": problem, "died": True}) + "\n")
            outcome.found[at] = {"id": at, "problem": problem, "died": True}
        elif len(lines) == before:
            outcome.incomplete = (
                f"{ending if isinstance(ending, str) else _how(ending)}: {tail(log)}"
            )
            return outcome
    outcome.incomplete = f"the process died {STARTS} times"
    return outcome


def _run_once(
    command: Sequence[str],
    journal: Path,
    log: Path,
    deadline: float,
    silence: float,
    environment: Mapping[str, str] | None,
) -> int | str:
    """The exit code, or why the process was killed."""
    with log.open("ab") as output, started(command, output, environment) as process:
        size = journal.stat().st_size if journal.exists() else 0
        since, limit = time.monotonic(), max(silence, STARTUP)
        while process.poll() is None:
            now = time.monotonic()
            grown = journal.stat().st_size if journal.exists() else 0
            if grown != size:
                size, since, limit = grown, now, silence
            if now > deadline:
                return "out of time"
            if now - since > limit:
                return f"no answer within {limit:.0f} s"
            time.sleep(0.1)
        return process.returncode


@contextlib.contextmanager
def started(
    command: Sequence[str], output: Any, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own session, killed with its children at the end of the context."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"the process died of {signal.Signals(-code).name}"
    return f"the process ended with code {code}"


def tail(log: Path, characters: int = 300) -> str:
    """The end of a log on one line."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return " ".join(text.split())[-characters:]


def attempt(work: Callable[[], Any], lost: Callable[[], bool]) -> tuple[Any, str | None, bool]:
    """(result, problem, whether the process cannot continue)."""
    try:
        return work(), None, False
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        return None, f"{type(error).__name__}: {text}", lost()
