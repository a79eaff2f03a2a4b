"""GPU tests, and small calls under compute-sanitizer and Nsight Compute."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import supervise
from benchmarks.gpu.points import BACKENDS, LEFT_OUT
from benchmarks.gpu.process import CANARIES, ROOT, python_path
from fusedrnn import cuda

JOURNAL = "FUSEDRNN_GPU_JOURNAL"  # the variable with the path of the recorder's journal
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")  # the last two if there is time
NOTHING_COLLECTED = 5  # pytest's exit code
TEST_FAILURES = 1
SILENCE = 15.0  # seconds that one test, canary, microbenchmark or point may take


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
    # What forces a family that is struck out cannot pass, and is known.
    failed = [f for f in found if f.get("problem") and LEFT_OUT[1] not in f["problem"]]
    skipped = [f for f in found if f.get("outcome") == "skipped"]
    incomplete = outcome.incomplete
    if not found:
        why = incomplete or supervise.tail(folder / "tests.log")
        return _no_tests(f"no test ran: {why}")
    return {
        "passed": sum(f.get("outcome") == "passed" for f in found),
        "skipped": len(skipped),
        "struck": sum(LEFT_OUT[1] in f.get("problem", "") for f in found),
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
    program = find("compute-sanitizer")
    if program is None:
        return {"runs": {}, "incomplete": "compute-sanitizer is not installed"}
    runs: dict[str, Any] = {}
    for tool in TOOLS:
        for backend in BACKENDS:
            limit = min(seconds, deadline - time.monotonic())
            if limit < 5:
                return {"runs": runs, "incomplete": "out of time"}
            command = [program, "--tool", tool, "--error-exitcode", "99", "--print-limit", "20"]
            command += ["--kernel-name", "kns=fusedrnn"]  # not torch's kernels
            command += [sys.executable, "-m", "benchmarks.gpu.smoke", "--device", device]
            environment = {
                "FUSEDRNN_PLAN": backend,
                "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # checks the bounds of every tensor
                **unchecked(),
            }
            log = folder / f"sanitizer-{tool}-{backend}.log"
            code = _under(command, log, limit, environment)
            runs[f"{tool}/{backend}"] = judge(code, log.read_text(errors="replace"), limit)
    return {"runs": runs, "incomplete": None}


def unchecked() -> dict[str, str]:
    """Tools should see the calls, and not the package's checks at first use.

    After canaries there are none; else they are switched off.
    """
    return {} if CANARIES in os.environ else {cuda.SWITCH: "on"}


def find(program: str) -> str | None:
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = [shutil.which(program)]
    found += [shutil.which(program, path=f"{place}/bin") for place in places if place]
    return next(filter(None, found), None)


def _under(command: list[str], log: Path, limit: float, environment: dict[str, str]) -> int | None:
    """The exit code of a command, None if it did not end in time."""
    environment = {**environment, **python_path()}
    with log.open("wb") as output, supervise.started(command, output, environment) as process:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None


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


# ---- Nsight Compute ----

# Those of each kernel that are shown; the log has all.
METRICS = {
    "Duration": "us",
    "Elapsed Cycles": "cycles",
    "SM Frequency": "clock",
    "Executed Ipc Active": "ipc",
    "Issue Slots Busy": "issue %",
    "Mem Busy": "memory %",
    "Mem Pipes Busy": "pipes %",
    "Bank conflicts": "conflicts",
    "Registers Per Thread": "registers",
}
SECTIONS = (
    *("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis"),
    *("MemoryWorkloadAnalysis_Tables", "SchedulerStats", "WarpStateStats", "InstructionStats"),
    *("LaunchStats", "Occupancy", "SourceCounters"),
)


def profile(
    folder: Path, deadline: float, device: str, points: Path, ids: list[str], seconds: float = 60.0
) -> dict[str, Any]:
    """The counters of the kernel of each point, an id of the file ``points``: {id: {...}}."""
    program = find("ncu")
    if program is None:
        return {"runs": {}, "incomplete": "ncu is not installed"}
    runs: dict[str, Any] = {}
    for name in ids:
        limit = min(seconds, deadline - time.monotonic())
        if limit < 5:
            return {"runs": runs, "incomplete": "out of time"}
        way = "backward" if name.endswith("backward") else "forward"
        command = [program, "--clock-control", "none", "--csv", "--page", "details"]
        command += [word for section in SECTIONS for word in ("--section", section)]
        command += ["--kernel-name", f"regex:persistent_{way}", "--launch-skip", "1"]
        command += ["--launch-count", "1", sys.executable, "-m", "benchmarks.gpu.smoke"]
        command += ["--device", device, "--points", str(points), "--id", name]
        log = folder / f"ncu-{len(runs)}.csv"
        code = _under(command, log, limit, unchecked())
        runs[name] = counters(code, log.read_text(errors="replace"), limit)
    return {"runs": runs, "incomplete": None}


def counters(code: int | None, text: str, limit: float) -> dict[str, Any]:
    """The metrics in the output of ncu, or why there are none."""
    begin = text.find('"ID",')
    rows = list(csv.DictReader(io.StringIO(text[begin:]))) if begin >= 0 else []
    found = {
        METRICS[row["Metric Name"]]: f"{row['Metric Value']} {row['Metric Unit']}".strip()
        for row in rows
        if row.get("Metric Name") in METRICS and row.get("Metric Value")
    }
    if found:
        return {"verdict": "measured", "metrics": found}
    if code is None:
        return {"verdict": "no answer", "why": f"not done within {limit:.0f} s"}
    lines = [line for line in text.splitlines() if line.strip("= ")]
    return {"verdict": "did not work", "why": f"exit code {code}: {' '.join(lines[-3:])[-300:]}"}
