"""Processes that are expected to die.

An illegal access takes the CUDA context with it, and all that its process would have done next; a
kernel may not return. So work goes on in a process of its own, which writes a line of JSON to a
file when it starts an item and one when the item is done. A process that dies or falls silent loses
the item it was at, and another one goes on with those that are left.
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

STARTS = 30  # of the process, at most
LOST = 77  # exit code: the item is recorded, but its process is of no more use


class Journal:
    """The file of JSON lines, as the working process sees it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.done = {line["id"] for line in read(path) if "start" not in line}

    def start(self, item: str) -> None:
        self._write({"id": item, "start": True})

    def finish(self, item: str, **found: Any) -> None:
        self._write({"id": item, **found})

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; a process may have died within its last one."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


@dataclass
class Outcome:
    """What became of the items: ``found`` by id, and why there is no more, if there is not."""

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

    ``deadline`` is of time.monotonic(); ``silence`` how many seconds an item may take.
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
            with journal.open("a") as file:  # a line of its own, whatever was cut off before it
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
    """The exit code, or why the process was ended."""
    with log.open("ab") as output, started(command, output, environment) as process:
        size, since = -1, time.monotonic()
        while process.poll() is None:
            now = time.monotonic()
            grown = journal.stat().st_size if journal.exists() else 0
            if grown != size:
                size, since = grown, now
            if now > deadline:
                return "out of time"
            if now - since > silence:
                return f"no answer within {silence:.0f} s"
            time.sleep(0.1)
        return process.returncode


@contextlib.contextmanager
def started(
    command: Sequence[str], output: Any, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, which ends with the context, its children too."""
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
    """The last words of a log on one line."""
    text = log.read_text(errors="replace") if log.exists() else ""
    return " ".join(text.split())[-characters:]


def attempt(work: Callable[[], Any], lost: Callable[[], bool]) -> tuple[Any, str | None, bool]:
    """(result, problem, whether the process is of no more use)."""
    try:
        return work(), None, False
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        return None, f"{type(error).__name__}: {text}", lost()
