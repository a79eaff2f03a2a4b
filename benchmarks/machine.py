"""The machine: its description, and its rates of multiplying matrices and copying bytes."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import fusedrnn
from benchmarks.measure import seconds_of, synchronize, tf32
from fusedrnn import _C

MATMUL = {"cpu": 1024, "cuda": 8192}  # rows, enough to reach the full rate
COPY = {"cpu": 2**26, "cuda": 2**30}  # bytes, more than the caches hold


class Matmul:
    """Work: a product of two large square matrices, at torch's rate on this machine."""

    def __init__(
        self, dtype: torch.dtype, device: torch.device, tf32_permitted: bool = True
    ) -> None:
        n = MATMUL[device.type]
        self.flops = 2 * n**3
        self._device, self._tf32 = device, tf32_permitted
        generator = torch.Generator(device).manual_seed(0)
        self._a = torch.randn((n, n), generator=generator, device=device).to(dtype)
        self._out = torch.empty_like(self._a)

    def __call__(self, repeats: int) -> float:
        with tf32(self._tf32):
            return seconds_of(self._multiply, self._device, repeats)

    def _multiply(self) -> None:
        torch.mm(self._a, self._a, out=self._out)


class Copy:
    """Work: a copy that exceeds the caches; a byte read and a byte written count as two."""

    def __init__(self, device: torch.device) -> None:
        size = COPY[device.type]
        self.bytes = 2 * size
        self._device = device
        self._from = torch.randint(256, (size,), dtype=torch.uint8, device=device)
        self._to = torch.empty_like(self._from)

    def __call__(self, repeats: int) -> float:
        return seconds_of(lambda: self._to.copy_(self._from), self._device, repeats)


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The peak of memory during ``call`` minus the memory before it.

    On a GPU that of torch's allocator, on a CPU the resident memory of the process; None where the
    system does not report it.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = call()
        synchronize(device)
        del kept
        return torch.cuda.max_memory_allocated(device) - before
    try:
        # Free memory that the process still holds would hide allocations.
        ctypes.CDLL(None).malloc_trim(0)
        _C.release_scratch()
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = _status("VmRSS")
        kept = call()
        peak = _status("VmHWM") - before
    except (OSError, AttributeError, StopIteration):
        return None
    del kept
    return max(0, peak)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


@contextlib.contextmanager
def kept_busy(cpus: int) -> Iterator[list[subprocess.Popen]]:
    """Runs a busy process on each of the last ``cpus`` CPUs.

    Raises:
        ValueError: there are fewer CPUs.
    """
    there = sorted(os.sched_getaffinity(0))
    if not 0 <= cpus <= len(there):
        raise ValueError(f"there are {len(there)} CPUs, of which {cpus} cannot be kept busy")
    others: list[subprocess.Popen] = []
    try:
        for cpu in there[len(there) - cpus :]:
            others.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
            os.sched_setaffinity(others[-1].pid, {cpu})
        yield others
    finally:
        for other in others:
            other.kill()
            other.wait()


def environment(device: torch.device, busy: int = 0) -> dict[str, Any]:
    """The machine and the versions; ``busy`` CPUs are kept busy, see `kept_busy`."""
    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(device) if cuda else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "busy": busy,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "gpu_architecture": f"{properties.major}.{properties.minor}" if properties else None,
        "gpu_processors": properties.multi_processor_count if properties else None,
        "gpu_memory": properties.total_memory if properties else None,
        "gpu_driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if cuda
        else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "isa": fusedrnn.info()["cpu kernels"].partition(",")[0],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "fusedrnn": fusedrnn.__version__,
        "fusedrnn_cuda": fusedrnn.info()["cuda kernels"],
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.machine())


def _output(*command: str) -> str | None:
    """The output of a command, None where it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _commit() -> str | None:
    """The commit of this clone, None without a clone or git."""
    git = ("git", "-C", str(Path(__file__).resolve().parent.parent))
    commit = _output(*git, "rev-parse", "--short=10", "HEAD")
    if commit is None:
        return None
    return f"{commit} with changes" if _output(*git, "status", "--porcelain", "-uno") else commit
