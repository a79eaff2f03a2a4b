"""The GPU code in the binary: every architecture, no spills, the instructions that were meant."""

from __future__ import annotations

import functools
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
from compiling import ROOT, setup_script

from fusedrnn import _C

# Not shipped, but it uses every wrapper of csrc/cuda/primitives.h.
PROGRAMS = "tests/emulator/programs.cu"
BINARY = str(Path(importlib.util.find_spec("fusedrnn_C").origin).with_name("libfusedrnn.so"))
PERSISTENT = "persistent_(forward|backward)_kernel"


def tool(name: str) -> str:
    """NVIDIA's disassembler: on the PATH, or from the wheels that the extra [test] installs."""
    wheels = Path(sysconfig.get_path("purelib")).glob(f"nvidia/*/bin/{name}")
    path = shutil.which(name) or next(map(str, wheels), None)
    return path or pytest.skip(f"no {name} (pip install nvidia-cuda-{name})")


def compiled() -> set[str]:
    """The architectures that the binary was built for, as the tools name them."""
    archs = _C.cuda_archs()
    if not archs:
        pytest.skip("built without nvcc: there is no GPU code to look at")
    return {"sm_" + re.sub(r"\W|PTX", "", arch) for arch in archs.split(";")}


class Kernel(NamedTuple):
    name: str  # as in the source, without namespaces and parameters
    arch: str


class Resources(NamedTuple):
    registers: int
    stack: int  # bytes: what is spilled, and arrays that found no registers
    shared: int  # bytes, static


def readable(mangled: list[str]) -> list[str]:
    if not shutil.which("c++filt"):
        return mangled
    done = subprocess.run(["c++filt", *mangled], capture_output=True, text=True, check=True)
    noise = r"^void |fusedrnn::|\(anonymous namespace\)::|\(fusedrnn::\w+\)$"
    return [re.sub(noise, "", line) for line in done.stdout.splitlines()]


def parse_resources(text: str) -> dict[Kernel, Resources]:
    """What `cuobjdump --dump-resource-usage` prints."""
    found: list[tuple[str, str, Resources]] = []
    arch = name = ""
    for line in text.splitlines():
        if section := re.match(r"arch = (sm_\w+)", line):
            arch = section[1]
        elif function := re.match(r"\s*Function (\S+):", line):
            name = function[1]
        elif usage := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            found.append((name, arch, Resources(*map(int, usage.groups()))))
    names = readable([name for name, _, _ in found])
    return {Kernel(n, a): r for n, (_, a, r) in zip(names, found, strict=True)}


@functools.cache
def resources() -> dict[Kernel, Resources]:
    command = [tool("cuobjdump"), "--dump-resource-usage", BINARY]
    return parse_resources(subprocess.run(command, capture_output=True, text=True).stdout)


def test_the_listing_is_read():
    text = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function _Z1fv:
  REG:32 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
    name = readable(["_Z1fv"])[0]
    assert parse_resources(text) == {Kernel(name, "sm_90"): Resources(32, 8, 16)}


def number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def uses_clusters(kernel: str) -> bool:
    return bool(re.match(PERSISTENT, kernel)) and "true>" in kernel


def test_every_kernel_is_there_for_every_architecture():
    archs = sorted(compiled(), key=number)
    found = resources()
    names = {kernel.name for kernel in found}
    clusters = {name for name in names if uses_clusters(name)}
    newer = [arch for arch in archs if number(arch) >= 90]
    if newer:  # else they are empty
        assert len(clusters) == 2 * 5
        assert {k for k in found if k.name in clusters} == {
            Kernel(n, a) for n in clusters for a in newer
        }
    others = names - clusters
    assert sum(bool(re.match(PERSISTENT, name)) for name in others) == 2 * 5
    assert {k for k in found if k.name in others} == {Kernel(n, a) for n in others for a in archs}
    print(f"\nregisters and shared memory of the kernels on {' '.join(archs)}:")
    for name in sorted(names):
        used = [found.get(Kernel(name, arch)) for arch in archs]
        registers = " ".join(f"{r.registers:3}" if r else "  -" for r in used)
        print(f"  {registers}  {max(r.shared for r in used if r):5}  {name}")


def test_nothing_is_spilled():
    compiled()
    assert {kernel: r for kernel, r in resources().items() if r.stack} == {}


@functools.cache
def instructions(arch: str) -> dict[str, Counter[str]]:
    """The instructions of every kernel of an architecture, and how many of each."""
    disassembler = Path(tool("nvdisasm")).parent
    command = [tool("cuobjdump"), "--dump-sass", "--gpu-architecture", arch, BINARY]
    env = {"PATH": f"{disassembler}:/usr/bin:/bin"}
    found: dict[str, Counter[str]] = {}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert process.stdout
    current: Counter[str] = Counter()
    for line in process.stdout:
        if function := re.match(r"\s*Function : (\S+)", line):
            current = found.setdefault(function[1], Counter())
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]+)", line):
            # Turing says LDS.U.128 and STG.E.128.SYS.
            current[re.sub(r"\.(U|SYS)(?=\.|$)", "", code[1])] += 1
    assert process.wait() == 0
    return dict(zip(readable(list(found)), found.values(), strict=True))


def can_run(kernel: str, arch: str) -> bool:
    """Whether a GPU of this kind has what a persistent kernel uses."""
    tensor_cores = "Half<" in kernel or "Tf32" in kernel
    return number(arch) >= (90 if uses_clusters(kernel) else 80 if tensor_cores else 75)


@pytest.mark.parametrize(
    "arch", ["sm_75", "sm_80", "sm_90", pytest.param("sm_120", marks=pytest.mark.slow)]
)
def test_tensor_cores_and_wide_loads_are_used(arch):
    if arch not in compiled():
        pytest.skip(f"this binary has no code for {arch}")
    for name, used in instructions(arch).items():
        if not re.match(PERSISTENT, name):
            continue
        if not can_run(name, arch):
            assert set(used) <= {"EXIT", "BRA", "NOP", "MOV", "LDC"}, (name, used)
            continue
        half, tf32 = "Half<" in name, "Tf32" in name
        kinds = {i for i in used if i.startswith("HMMA")}
        wanted = ".16816.F32" if half else ".1688.F32.TF32"
        assert any(wanted in i for i in kinds) if half or tf32 else "FFMA" in used, (name, kinds)
        assert "LDS.128" in used, name  # weights, 16 bytes of each lane
        if "forward" in name and (half or tf32):
            # Of the recurrent product, with registers for a depth of 1, 2, 4 or 8 tiles, two rows
            # or one, more products than reads.
            assert sum(used[i] for i in kinds) >= used["LDS.128"] + 3 * 8, (name, used)
        assert not {i for i in used if i.startswith(("LDL", "STL"))}, name
        # What blocks send each other goes 16 bytes at a time, in a cluster counted where it lands.
        # Backward sends sums of 1, 2, 4 and 8 parts, for the layer and for the one below.
        sends = 2 * 4 if "backward" in name else 1
        stores = {"STAS.128": used["STAS.128"]}
        stores["STG.E.128"] = used["STG.E.128"] + used["STG.E.128.STRONG.GPU"]
        cluster = uses_clusters(name)
        assert cluster or "BPT.TRAP" not in used, name  # only a wait in a cluster ends in one
        assert (stores["STAS.128"] > 0) == cluster, (name, stores)
        assert stores["STAS.128" if cluster else "STG.E.128"] >= sends, (name, stores)
        # What is its own flag takes no fence: forward, and from layer to layer. A cluster's barrier
        # has one, at the start; backward in the grid has one before its flag.
        fences = {i: used[i] for i in used if i.startswith("MEMBAR") and not i.endswith(".CTA")}
        assert sum(fences.values()) == (cluster or "backward" in name), (name, fences)
        # Weights of two products, four tiles of a warp at once: their loads are in flight together.
        # Forward in the grid, h of the other blocks is written 16 bytes at a time too.
        exchanged = 8 if not cluster and "forward" in name else 0
        assert used["STS.128"] >= 2 * 4 + exchanged and not used["STS.U8"], (name, used)
        if not cluster and "forward" in name:
            # h of the other blocks, 8 loads on their way
            assert used["LDG.E.128.STRONG.GPU"] >= 8, (name, used)


@pytest.fixture(scope="module")
def nvcc() -> str:
    setup = setup_script()
    try:
        path = setup.find_nvcc()
    except SystemExit as error:
        pytest.skip(f"nvcc cannot be used: {error}")
    return path or pytest.skip("no nvcc (see setup.py for where it is looked for)")


def test_every_primitive_compiles(nvcc, tmp_path):
    setup = setup_script()
    archs = setup.select_archs(setup.ask_nvcc(nvcc, "--list-gpu-arch"), "")
    host = next(word for word in reversed(setup.find_cxx()) if word[0] != "-")
    codes = setup.gencode(archs, (*setup.PTX, *setup.CLUSTER_PTX))
    command = [nvcc, "-ccbin", host, *setup.NVCC_FLAGS.split(), *codes]
    command += ["-Icsrc", "-Itests", "-Werror", "all-warnings"]
    command += ["-c", PROGRAMS, "-o", str(tmp_path / "programs.o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
