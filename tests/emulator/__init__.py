"""Runs the CUDA kernels on the CPU, thread by thread: see simt.h.

The kernels' own sources are compiled by the C++ compiler, once plain and once for each sanitizer,
into a program that runs one launch (replay.cpp). `run` hands it a launch and takes the results.
Together with the ops' C++ side they become a library (op.cpp) in which the ops run on CPU tensors
as they would on CUDA tensors: see ops.py.

For a new launch: a line in replay.cpp, and its structure in tests/bindings/launches.cpp. What the
kernel uses beyond CUDA C++ is wrapped in csrc/cuda/primitives.h and has a twin here.
"""

from __future__ import annotations

import functools
import os
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import compiling
import torch
from compiling import setup_script, sources

FOLDER = "build/emulator"
KERNELS = ("csrc/cuda/**/*.cu", "csrc/cuda/**/*.cpp", "csrc/plan/*.cpp")
RUNTIME = "tests/emulator/simt.cpp"
REPLAY = ("tests/emulator/replay.cpp", "tests/emulator/programs.cu")
MICRO = "benchmarks/gpu/micro.cu"
OP = (
    "tests/emulator/op.cpp",
    "csrc/cpu/run/scratch.cpp",
    *(
        f"csrc/torch/{name}.cpp"
        for name in (
            "call",
            "cuda",
            "cuda_call",
            "cuda_gradients",
            "cuda_standing",
            "cuda_tangent",
            "host",
            "reserve",
            "switches",
        )
    ),
    "csrc/python/host.cpp",
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


def ninja_lines() -> list[str]:
    torch_folder = setup_script().find_torch()
    include = sysconfig.get_path("include")
    abi = f"{setup_script().TORCH_ABI} {setup_script().PYTHON_ABI}"
    system = f"-DFUSEDRNN_EMULATED {abi} -isystem {torch_folder}/include"
    libraries = f"-L{torch_folder}/lib -ltorch_cpu -lc10"
    lines = compiling.rules(FLAGS)
    for mode, (kernels, runtime) in MODES.items():
        folder = f"{FOLDER}/{mode}"
        for source in sources(*KERNELS, RUNTIME, *REPLAY, *OP, MICRO):
            flags = runtime if source == RUNTIME else kernels
            if source in OP:
                flags += f" {system} -isystem {include}"
            lines += [f"build {folder}/{source}.o: cxx {source}", f"  flags = {flags}"]
        shared = sources(*KERNELS, RUNTIME)
        for target, parts, flags in (
            ("replay", [*shared, *sources(*REPLAY)], kernels),
            ("op.so", [*shared, *sources(*OP)], f"{kernels} -shared {libraries}"),
            ("micro.so", [RUNTIME, MICRO], f"{kernels} -shared"),
        ):
            objects = " ".join(f"{folder}/{source}.o" for source in parts)
            lines += [f"build {folder}/{target}: link {objects}", f"  flags = {flags}"]
    return lines


@functools.cache
def build(mode: str, target: str = "replay") -> Path:
    """A mode's program `replay` or library `op.so`, `micro.so`, built if it is not up to date."""
    return compiling.build(FOLDER, ninja_lines(), f"{FOLDER}/{mode}/{target}")


class Result(NamedTuple):
    error: int  # what the launch returned; 0: success
    status: int  # of the program; not 0: it crashed, or a sanitizer stopped it
    log: str  # what the runtime and the sanitizers wrote
    way: int  # the longest chain of waits of one block for another: see simt.h

    def check(self) -> None:
        assert self.status == 0 and self.error == 0 and not self.log, self


def run(
    launch: str,
    params: Any,
    arrays: Mapping[Any, torch.Tensor | None],
    mode: str = "plain",
    seed: int = -1,
) -> Result:
    """Runs `launch` with `params`, a structure of tests/bindings/launches.cpp.

    `arrays` has the tensors that its pointers point to, which are changed in place. They may be
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
        pointers.append((params.pointers[name], index, offset))

    def number(*values: int) -> bytes:
        return struct.pack(f"={len(values)}q", *values)

    views = [torch.tensor([], dtype=torch.uint8).set_(s) for s in storages.values()]
    structure = bytes(params)
    parts: list[Any] = [number(len(launch)), launch.encode()]
    parts += [number(len(structure)), structure, number(seed, len(views))]
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
