"""Microbenchmarks: micro.cu, built here, run through ctypes where there is no toolkit.

`python -m benchmarks.gpu build` makes the library; a machine with a GPU needs only that file.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "benchmarks/gpu/micro.cu"
LIBRARY = ROOT / "build/gpu/micro.so"  # ignored by git
PATH = "FUSEDRNN_GPU_MICRO"  # the variable with the path of another library: the emulator's
SHARED = (16 << 10, 64 << 10, 114 << 10, 227 << 10)  # bytes of a block, for clusters that fit


def build(archs: str, target: Path = LIBRARY) -> Path:
    """Compiles the library for architectures such as "9.0", or setup.py's default ones."""
    spec = importlib.util.spec_from_file_location("fusedrnn_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    setup: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(setup)
    nvcc = setup.find_nvcc()
    if nvcc is None:
        raise SystemExit("no nvcc: set CUDA_HOME to the CUDA toolkit")
    known = setup.select_archs(setup.ask_nvcc(nvcc, "--list-gpu-arch"), archs)
    host = next(word for word in reversed(setup.find_cxx()) if word[0] != "-")
    target.parent.mkdir(parents=True, exist_ok=True)
    codes = setup.gencode(known, (*setup.PTX, *setup.CLUSTER_PTX))
    command = [nvcc, "-ccbin", host, *setup.NVCC_FLAGS.split(), *codes]
    command += ["-Icsrc", "-Werror", "all-warnings", "-shared", SOURCE, "-o", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return target


@dataclass(frozen=True)
class Micro:
    """A run of a kernel: the cycles of one repetition, or of one of `per` things in it."""

    kernel: str
    what: str
    blocks: int = 1
    cluster: int = 1
    size: int = 0
    repeats: int = 1024
    per: int = 1
    constant: str = ""  # of the planner's model: what it assumes

    @property
    def id(self) -> str:
        return f"{self.kernel}/{self.blocks}/{self.cluster}/{self.size}"


WARPS = 8


def runs(repeats: int = 1024, largest: int = 128, clusters: bool = True) -> Iterator[Micro]:
    """All of them; `repeats` and `largest`, the most blocks, are smaller under the emulator."""

    def made(kernel: str, what: str, **options: Any) -> Micro:
        return Micro(kernel, what, **{"repeats": repeats, **options})

    yield made("rate", "a dependent multiply-add", repeats=repeats * 1024)
    reads = "a 16-byte shared read of a warp"
    yield made("uniform", f"{reads}, the same address", per=WARPS)
    yield made("own", f"{reads}, an address a lane", per=WARPS)
    yield made("ffma", "8 FFMA of a warp", per=WARPS)
    yield made("uniform+ffma", "8 FFMA and a uniform read", per=WARPS)
    yield made("hmma", "an HMMA of a warp", per=WARPS)
    yield made("uniform+hmma", "an HMMA and a uniform read", per=WARPS)
    yield made("ffma_tiles", "a tile times 8 rows, FFMA", per=2 * WARPS, constant="ffma_tile")
    for size in (0, 4, 16, 64):
        yield made("fence", f"release after {size} stores", size=size)
    for cluster in (2, 4, 8, 16):
        if cluster > largest or not clusters:
            continue
        yield made("barrier", "cluster barrier", blocks=cluster, cluster=cluster)
        for size in (1024, 4096, 16384):
            yield made(
                "exchange",
                f"st.async, {size >> 10} KB to each block",
                **{"blocks": cluster, "cluster": cluster, "size": size},
                constant="cluster_exchange",
            )
    for blocks in (16, 32, 64, 128):
        if blocks > largest:
            continue
        for size in (64, 512):
            for kernel, how, constant in (
                ("flags", "flags", "grid_exchange"),
                ("data_words", "{data, step} words", "value_exchange"),
            ):
                yield made(
                    kernel,
                    f"{how}, {size} bytes of each block",
                    **{"blocks": blocks, "size": size},
                    constant=constant,
                )


class Library:
    """The compiled kernels."""

    def __init__(self) -> None:
        path = Path(os.environ.get(PATH, LIBRARY))
        if not path.exists():
            raise FileNotFoundError(f"no {path}: run `python -m benchmarks.gpu build` before")
        self._library = ctypes.CDLL(str(path))
        self._library.micro_error.restype = ctypes.c_char_p

    def clusters(self, size: int, shared_bytes: int) -> int:
        """How many clusters run at once, as the driver says."""
        return int(self._library.micro_clusters(size, shared_bytes))

    def run(self, micro: Micro) -> dict[str, Any]:
        """The cycles of a repetition in the slowest block, after a run that warms up.

        Raises:
            RuntimeError: the kernel failed, or has not computed or received what it should.
        """
        cycles = (ctypes.c_longlong * micro.blocks)()
        wrong = (ctypes.c_int * micro.blocks)()
        microseconds = ctypes.c_double()
        found = []
        for _ in range(4):
            error = self._library.micro_run(
                micro.kernel.encode(), micro.blocks, micro.cluster, micro.size, micro.repeats,
                cycles, wrong, ctypes.byref(microseconds),
            )  # fmt: skip
            if error:
                raise RuntimeError(self._library.micro_error(error).decode())
            if any(wrong):
                raise RuntimeError(f"{sum(wrong)} wrong values")
            found.append((max(cycles) / micro.repeats / micro.per, microseconds.value))
        median = statistics.median(c for c, _ in found[1:])
        rate = max(cycles) / microseconds.value
        return {"cycles": median, "cycles_per_microsecond": rate, "what": micro.what}


def fitting(
    library: Library,
    sizes: Sequence[int] = range(1, 17),
    shared: Sequence[int] = SHARED,
    most: int = 1024,
) -> dict[str, Any]:
    """What the driver says of clusters of 1 to 16 blocks, and whether it launches so many.

    "launched" has the errors of cooperative launches of as many clusters as fit, None for none;
    ``most`` limits them.
    """
    counts = {str(s): [library.clusters(n, s) for n in sizes] for s in shared}
    launched: dict[str, str | None] = {}
    for n, count in zip(sizes, counts[str(shared[-1])], strict=True):
        if not count:
            continue
        # A cluster of one is launched as a plain block.
        blocks = min(count, most) * n
        micro = Micro("cooperative_barrier", "", blocks, n, shared[-1], repeats=4)
        try:
            library.run(micro)
        except RuntimeError as error:
            launched[str(n)] = str(error)
        else:
            launched[str(n)] = None
    return {"clusters": counts, "launched": launched}
