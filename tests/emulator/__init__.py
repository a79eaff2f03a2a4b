"""Runs the CUDA kernels on the CPU, thread by thread: see simt.h.

The kernels' own sources are compiled by the C++ compiler, once plain and once for each sanitizer,
into a program that runs one launch (replay.cpp). `run` hands it a launch and takes the results.
Together with the ops' C++ side they become a library (op.cpp) in which the ops run on CPU tensors
as they would on CUDA tensors: see ops.py.

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
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build/emulator"
KERNELS = ("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp", "csrc/plan/*.cpp")
RUNTIME = "tests/emulator/simt.cpp"
REPLAY = ("tests/emulator/replay.cpp", "tests/emulator/programs.cu")
OP = (
    "tests/emulator/op.cpp",
    "csrc/cpu/run/scratch.cpp",
    *(f"csrc/torch/{name}.cpp" for name in ("call", "cuda", "cuda_call", "reserve", "switches")),
)

# Frames larger than a page are probed, so that none skips the guard below its stack.
FLAGS = (
    "-std=c++20 -g -fPIC -fvisibility=hidden -fstack-clash-protection -Icsrc -Itests"
    " -Wall -Wextra -Wno-unknown-pragmas"
)
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
    setup = setup_script()
    torch_folder = setup.find_torch()
    include = sysconfig.get_path("include")
    system = f"-DFUSEDRNN_EMULATED {setup.ABI_FLAGS} -isystem {torch_folder}/include"
    libraries = f"-L{torch_folder}/lib -ltorch_cpu -lc10"
    lines = [
        "builddir = build/emulator",
        "rule cxx",
        f"  command = {cxx} {FLAGS} $flags -MD -MF $out.d -c -x c++ $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} $in -o $out $flags",
    ]

    def sources(*patterns: str) -> list[str]:
        found = [path for name in patterns for path in sorted(ROOT.glob(name))]
        return [path.relative_to(ROOT).as_posix() for path in found]

    for mode, (kernels, runtime) in MODES.items():
        folder = f"build/emulator/{mode}"
        for source in sources(*KERNELS, RUNTIME, *REPLAY, *OP):
            flags = runtime if source == RUNTIME else kernels
            if source in OP:
                flags += f" {system} -isystem {include}"
            lines += [f"build {folder}/{source}.o: cxx {source}", f"  flags = {flags}"]
        shared = sources(*KERNELS, RUNTIME)
        for target, parts, flags in (
            ("replay", sources(*REPLAY), kernels),
            ("op.so", sources(*OP), f"{kernels} -shared {libraries}"),
        ):
            objects = " ".join(f"{folder}/{source}.o" for source in [*shared, *parts])
            lines += [f"build {folder}/{target}: link {objects}", f"  flags = {flags}"]
    return "\n".join([*lines, ""])


@functools.cache
def build(mode: str, target: str = "replay") -> Path:
    """A mode's program `replay` or library `op.so`, built if it is not up to date."""
    setup = setup_script()
    BUILD.mkdir(parents=True, exist_ok=True)
    file = BUILD / "build.ninja"
    output = BUILD / mode / target
    command = [setup.find_ninja(), "-f", str(file), str(output.relative_to(ROOT))]
    with open(BUILD / "lock", "w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        file.write_text(ninja_file(" ".join(setup.find_cxx())))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    return output


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
