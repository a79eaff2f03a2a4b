"""Correctness: GPU tests, and small shapes under compute-sanitizer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import supervise
from benchmarks.gpu.points import BACKENDS

ROOT = Path(__file__).resolve().parents[2]
JOURNAL = "FUSEDRNN_GPU_JOURNAL"  # the variable with the path of the recorder's journal
TOOLS = ("memcheck", "racecheck", "synccheck")
NOTHING_COLLECTED = 5  # pytest's exit code
TEST_FAILURES = 1
SILENCE = 150.0  # seconds that one test may take


def python_path() -> dict[str, str]:
    """PYTHONPATH with the clone, for processes started in other folders."""
    return {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}


def files_with_gpu_tests(folder: Path) -> list[str]:
    """The files to collect; others may import packages that are not installed."""
    files = sorted(folder.glob("test_*.py"))
    return [str(file) for file in files if re.search(r"mark\.gpu\b", file.read_text())]


def tests(folder: Path, deadline: float, root: Path = ROOT) -> dict[str, Any]:
    """Runs ``pytest -m gpu``, in a new process after each crash."""
    targets = files_with_gpu_tests(root / "tests")
    if not targets:
        return _no_tests(f"no test in {root / 'tests'} needs a GPU")
    journal = folder / "tests.jsonl"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors"]
    command += ["-p", "benchmarks.gpu.recorder", f"--rootdir={root}", *targets]
    outcome = supervise.supervise(
        command,
        journal,
        folder / "tests.log",
        deadline,
        SILENCE,
        {JOURNAL: str(journal), **python_path()},
        good=(0, TEST_FAILURES, NOTHING_COLLECTED),
    )
    found = list(outcome.found.values())
    failed = [f for f in found if f.get("problem")]
    skipped = [f for f in found if f.get("outcome") == "skipped"]
    incomplete = outcome.incomplete
    if not found:
        why = incomplete or supervise.tail(folder / "tests.log")
        return _no_tests(f"no test ran: {why}")
    return {
        "passed": sum(f.get("outcome") == "passed" for f in found),
        "skipped": len(skipped),
        "skip_reasons": sorted({f["reason"] for f in skipped}),
        "failed": {f["id"]: f["problem"] for f in failed},
        "incomplete": incomplete,
        "slowest": sorted(((f.get("seconds", 0), f["id"]) for f in found), reverse=True)[:5],
    }


def _no_tests(why: str) -> dict[str, Any]:
    nothing: dict[str, Any] = {"passed": 0, "skipped": 0, "skip_reasons": [], "failed": {}}
    return {**nothing, "incomplete": why, "slowest": []}


def sanitizer(folder: Path, deadline: float, device: str, seconds: float = 90.0) -> dict[str, Any]:
    """Every tool on every backend while time remains: {"memcheck/cluster": {...}, ...}."""
    program = find_sanitizer()
    if program is None:
        return {"runs": {}, "incomplete": "compute-sanitizer is not installed"}
    runs: dict[str, Any] = {}
    for backend in BACKENDS:
        for tool in TOOLS:
            limit = min(seconds, deadline - time.monotonic())
            if limit < 5:
                return {"runs": runs, "incomplete": "out of time"}
            log = folder / f"sanitizer-{tool}-{backend}.log"
            runs[f"{tool}/{backend}"] = _sanitize(program, tool, backend, device, log, limit)
    return {"runs": runs, "incomplete": None}


def find_sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which("compute-sanitizer")]
    found += [shutil.which("compute-sanitizer", path=f"{place}/bin") for place in places if place]
    return next(filter(None, found), None)


def _sanitize(
    program: str, tool: str, backend: str, device: str, log: Path, limit: float
) -> dict[str, Any]:
    command = [program, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
    command += ["--kernel-name", "kns=fusedrnn"]  # not torch's kernels
    command += [sys.executable, "-m", "benchmarks.gpu.smoke", "--device", device]
    environment = {
        "FUSEDRNN_PLAN": backend,
        "FUSEDRNN_CUDA_KERNELS": "on",  # the calls, and not their checks
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # checks the bounds of every tensor
        **python_path(),
    }
    with log.open("wb") as output, supervise.started(command, output, environment) as process:
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
    return judge(code, log.read_text(errors="replace"), limit)


def judge(code: int | None, text: str, limit: float) -> dict[str, Any]:
    """The result of compute-sanitizer: "clean", "errors", or why there is none."""
    calls = re.search(r"smoke: (\d+) calls", text)
    reports = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", text)
    errors = sum(int(a or b) for a, b in reports)
    if errors:
        about = re.search(r"^=+ *(.*(?:Invalid|hazard|Race|Barrier|error).*)$", text, re.M)
        return {"verdict": "errors", "errors": errors, "first": about.group(1) if about else ""}
    if code is None:
        return {"verdict": "no answer", "why": f"not done within {limit:.0f} s"}
    if code == 0 and calls and reports:
        return {"verdict": "clean", "calls": int(calls.group(1))}
    lines = [line for line in text.splitlines() if line.strip("= ")]
    return {"verdict": "did not work", "why": f"exit code {code}: {' '.join(lines[-3:])[-300:]}"}
