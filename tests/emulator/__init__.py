"""Runs the CUDA kernels on the CPU, thread by thread: see simt.h.

The kernels' own sources are compiled by the C++ compiler, once plain and once for each sanitizer,
into a program that runs one launch (replay.cpp). `run` hands it a launch and takes the results.

For a new launch: a line in replay.cpp, and its structure as a ctypes.Structure, as in cell_step.py.
What the kernel uses beyond CUDA C++ is wrapped in csrc/cuda/primitives.h and has a twin here.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.util
import os
import struct
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/emulator"
SOURCES = ("tests/emulator/replay.cpp", "tests/emulator/programs.cu", "csrc/cuda/**/*.cu")
RUNTIME = "tests/emulator/simt.cpp"

# Frames larger than a page are probed, so that none skips the guard below its stack.
FLAGS = "-std=c++20 -g -fstack-clash-protection -Icsrc -Itests -Wall -Wextra -Wno-unknown-pragmas"
# mode -> (flags of the kernels, flags of the runtime)
MODES = {
    "plain": ("-O2", "-O2"),
    "address": (
        "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "-O1 -fsanitize=address -DSIMT_ADDRESS",
    ),
    "thread": ("-O1 -fsanitize=thread", "-O1 -DSIMT_THREAD"),
}


@functools.cache
def setup_script() -> ModuleType:
    """setup.py, for the compilers that it finds."""
    spec = importlib.util.spec_from_file_location("fusedrnn_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def ninja_file(cxx: str) -> str:
    lines = [
        "builddir = build/emulator",
        "rule cxx",
        f"  command = {cxx} {FLAGS} $flags -MD -MF $out.d -c -x c++ $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} $flags $in -o $out",
    ]
    sources = [path.relative_to(ROOT) for name in SOURCES for path in sorted(ROOT.glob(name))]
    for mode, (kernels, runtime) in MODES.items():
        objects = []
        for source in [*sources, Path(RUNTIME)]:
            objects.append(f"build/emulator/{mode}/{source}.o")
            flags = runtime if source == Path(RUNTIME) else kernels
            lines += [f"build {objects[-1]}: cxx {source}", f"  flags = {flags}"]
        lines += [f"build {mode}: phony build/emulator/{mode}/replay"]
        lines += [f"build build/emulator/{mode}/replay: link {' '.join(objects)}"]
        lines += [f"  flags = {kernels}"]
    return "\n".join([*lines, ""])


@functools.cache
def build(mode: str) -> Path:
    """The program of a mode, built if it is not up to date."""
    setup = setup_script()
    BUILD.mkdir(parents=True, exist_ok=True)
    file = BUILD / "build.ninja"
    command = [setup.find_ninja(), "-f", str(file), mode]
    with open(BUILD / "lock", "w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        file.write_text(ninja_file(" ".join(setup.find_cxx())))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return BUILD / mode / "replay"


class Result(NamedTuple):
    error: int  # what the launch returned; 0: success
    status: int  # of the program; not 0: it crashed, or a sanitizer stopped it
    log: str  # what the runtime and the sanitizers wrote
    way: int  # the longest chain of waits of one block for another: see simt.h

    def check(self) -> None:
        assert self.status == 0 and self.error == 0 and not self.log, self


def run(
    launch: str,
    params: ctypes.Structure,
    arrays: Mapping[str | int, torch.Tensor | None],
    mode: str = "plain",
    seed: int = -1,
) -> Result:
    """Runs `launch` with `params`, whose pointers `arrays` names; tensors are changed in place.

    A pointer is named by its field, or given as where it lies in the structure. Tensors may be
    views, also of one another: a pointer is to the first element of its tensor in a copy of the
    whole storage. With a seed the order of threads is drawn at random.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    pointers: list[tuple[int, int, int]] = []
    for name, tensor in arrays.items():
        if tensor is None:
            continue
        storage = tensor.untyped_storage()
        storages.setdefault(storage.data_ptr(), storage)
        index = list(storages).index(storage.data_ptr())
        offset = tensor.storage_offset() * tensor.element_size()
        field = name if isinstance(name, int) else getattr(type(params), name).offset
        pointers.append((field, index, offset))

    def number(*values: int) -> bytes:
        return struct.pack(f"={len(values)}q", *values)

    views = [torch.tensor([], dtype=torch.uint8).set_(s) for s in storages.values()]
    parts: list[Any] = [number(len(launch)), launch.encode()]
    parts += [number(ctypes.sizeof(params)), bytes(params), number(seed, len(views))]
    for view in views:
        parts += [number(len(view)), view.numpy().tobytes()]
    parts.append(number(len(pointers)))
    parts += [number(*pointer) for pointer in pointers]
    program = build(mode)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "launch")
        file.write_bytes(b"".join(parts))
        env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=0"}
        done = subprocess.run([program, file], capture_output=True, text=True, env=env, timeout=600)
        if done.returncode:
            return Result(-1, done.returncode, done.stderr, 0)
        data = bytearray(file.read_bytes())
    error, way = struct.unpack_from("=2q", data)
    at = 16
    for view in views:
        if len(view):
            view.copy_(torch.frombuffer(data, dtype=torch.uint8, count=len(view), offset=at))
        at += len(view)
    return Result(error, done.returncode, done.stderr, way)
