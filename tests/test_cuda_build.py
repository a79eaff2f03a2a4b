"""nvcc compiles every kernel for every architecture, and none spills its registers to memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from emulator import ROOT, setup_script

SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/cuda/**/*.cu"))
# Not shipped, but it uses every wrapper of csrc/cuda/primitives.h.
PROGRAMS = "tests/emulator/programs.cu"


@pytest.fixture(scope="module")
def nvcc() -> str:
    setup = setup_script()
    try:
        path = setup.find_nvcc()
    except SystemExit as error:
        pytest.skip(f"nvcc cannot be used: {error}")
    return path or pytest.skip("no nvcc (see setup.py for where it is looked for)")


def kernels(log: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, architecture) -> (registers, bytes of spill loads and stores), of `-Xptxas -v`."""
    found: dict[tuple[str, str], tuple[int, int]] = {}
    spills = 0
    key = None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            key, spills = (entry[1], entry[2]), 0
        elif bytes_ := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spills = int(bytes_[1]) + int(bytes_[2])
        elif (registers := re.search(r"Used (\d+) registers", line)) and key:
            found[key] = int(registers[1]), spills
    return found


def test_the_log_is_read():
    log = """\
ptxas info    : Compiling entry function '_Z1fv' for 'sm_80'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 380 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1fv' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers
"""
    assert kernels(log) == {("_Z1fv", "sm_80"): (255, 16), ("_Z1fv", "sm_90a"): (32, 0)}


def demangle(names: list[str]) -> list[str]:
    """Names as in the source, without namespaces and parameters."""
    if not shutil.which("c++filt"):
        return names
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    noise = r"^void |fusedrnn::|\(anonymous namespace\)::|\(fusedrnn::\w+\)$"
    return [re.sub(noise, "", line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("source", [*SOURCES, PROGRAMS])
def test_compiles_without_spills(nvcc, source, tmp_path):
    setup = setup_script()
    archs = setup.select_archs(setup.ask_nvcc(nvcc, "--list-gpu-arch"), "")
    host = next(word for word in reversed(setup.find_cxx()) if word[0] != "-")
    command = [nvcc, "-ccbin", host, *setup.NVCC_FLAGS.split(), *map(setup.gencode, archs)]
    command += ["-Icsrc", "-Itests", "-Werror", "all-warnings", f"--threads={os.cpu_count()}"]
    command += ["-c", source, "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    found = kernels(done.stdout + done.stderr)
    wanted = {"sm_" + re.sub(r"\W|PTX", "", arch) for arch in archs}
    assert {arch for _, arch in found} == wanted
    names = sorted({name for name, _ in found})
    print(f"\nregisters of the kernels of {Path(source).name} on {' '.join(sorted(wanted))}:")
    for name, readable in zip(names, demangle(names), strict=True):
        used = [found[name, arch][0] for arch in sorted(wanted)]
        print(f"  {' '.join(f'{n:3}' for n in used)}  {readable}")
    assert {key: spills for key, (_, spills) in found.items() if spills} == {}
