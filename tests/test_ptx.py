"""The PTX of every architecture, which `ptx.py` checks; and what that finds in PTX with a fault."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import ptx
import pytest
from compiling import ROOT, setup_script
from test_cuda_build import PROGRAMS, compiled

from fusedrnn import _C


def module(body: str, target: str = "sm_90a") -> str:
    return f"""
.version 9.0
.target {target}
.address_size 64
.extern .shared .align 128 .b8 memory[];
.visible .entry kernel(
	.param .u64 kernel_param_0
)
.maxntid 256, 1, 1
{{
	.reg .pred 	%p<9>;
{body}
	ret;
}}
"""


# Whole kernels, of a line an instruction as nvcc writes them.
LOAD = """
	ld.param.u64 %rd1, [kernel_param_0];
	cvta.to.global.u64 %rd2, %rd1;
	mov.u32 %r1, %tid.x;
	ld.global.u32 %r2, [%rd2+4];
"""
DIVERGENT = """
	setp.gt.s32 %p1, %r1, 5;
	@%p1 bra $L__BB0_2;
	st.global.u32 [%rd2], %r1;
"""
JOINED = LOAD + DIVERGENT + "$L__BB0_2:\n	bar.sync 0;\n"
UNIFORM = """
	setp.gt.s32 %p1, %r2, 5;
	@%p1 bra $L__BB0_2;
	bar.sync 0;
$L__BB0_2:
"""
WARPS = """
	shr.u32 %r3, %r1, 5;
	mov.f32 %f1, 0f00000000;
	setp.gt.u32 %p1, %r3, 2;
	@%p1 bra $L__BB0_2;
	mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f1, %f1, %f1, %f1}, {%r1, %r1, %r1, %r1}, {%r1, %r1}, {%f1, %f1, %f1, %f1};
$L__BB0_2:
"""  # noqa: E501
LOOP = """
	mov.u32 %r3, 0;
$L__BB0_1:
	bar.sync 0;
	add.s32 %r3, %r3, 1;
	setp.lt.s32 %p1, %r3, %r2;
	@%p1 bra $L__BB0_1;
"""
CLUSTER = """
	mov.u32 %r3, memory;
	mbarrier.init.shared::cta.b64 [%r3], 1;
	fence.mbarrier_init.release.cluster;
	mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 16;
	barrier.cluster.arrive.release.aligned;
	barrier.cluster.wait.acquire.aligned;
	// begin inline asm
	mapa.shared::cluster.u32 %r4, %r3, 1;
	// end inline asm
	st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%r4], {%r1, %r1, %r1, %r1}, [%r4];
$L__BB0_1:
	{ .reg .pred p;
mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%r3], 0;
selp.u32 %r5, 1, 0, p; }
	setp.eq.s32 %p2, %r5, 0;
	@%p2 bra $L__BB0_3;
	bra.uni $L__BB0_4;
$L__BB0_3:
	setp.ne.s32 %p1, %r1, 5;
	@%p1 bra $L__BB0_1;
	trap;
$L__BB0_4:
	bar.sync 0;
"""  # noqa: E501
RIGHT = {
    "joined": JOINED,
    "uniform": LOAD + UNIFORM,
    "warps": LOAD + WARPS,
    "loop": LOAD + LOOP,
    "cluster": LOAD + CLUSTER,
}


@pytest.mark.parametrize("which", RIGHT)
def test_right_kernels_have_no_faults(which):
    assert ptx.faults(module(RIGHT[which])) == []


# (a right kernel, what is replaced in it, by what, what is said of that)
WRONG = {
    "trap": ("loop", "bar.sync 0;", "bar.sync 0;\n	trap;", "trap"),
    "local memory": ("loop", "mov.u32 %r3", ".local .b8 depot[8];\n	mov.u32 %r3", "local memory"),
    "call": ("loop", "bar.sync 0", "call.uni printf", "a call"),
    "generic load": ("loop", "ld.global.u32", "ld.u32", "a generic address"),
    "generic store": ("joined", "st.global.u32", "st.u32", "a generic address"),
    "atomic": ("joined", "st.global.u32", "red.global.add.f32", "an atomic"),
    "vector": (
        "joined", "st.global.u32 [%rd2], %r1", "st.global.v2.u32 [%rd2+4], {%r1, %r1}",
        "no multiple of 8 bytes",
    ),
    "register": ("joined", "bar.sync 0;", "st.global.u32 [%rd2], %r7;", "nothing writes %r7"),
    "small numbers": ("warps", "mov.f32 %f1, 0f00000000", "add.ftz.f32 %f1, 0f0, 0f0", "for zero"),
    "barrier in a branch": ("joined", "$L__BB0_2:\n	bar.sync 0;", "	bar.sync 0;\n$L__BB0_2:",
                            "not all threads"),
    "barrier of few warps": ("warps", "mma.sync", "bar.sync 0;\n	mma.sync", "not all threads"),
    "barrier in a loop": ("loop", "%p1, %r3, %r2", "%p1, %r3, %r1", "not all threads"),
    # The loops end at different times, and so differs how often they ran.
    "count of a loop": (
        "loop", "	mov.u32 %r3, 0;",
        "	mov.u32 %r2, 0;\n$L__BB0_9:\n	add.s32 %r2, %r2, 1;\n"
        "	setp.lt.s32 %p2, %r2, %r1;\n	@%p2 bra $L__BB0_9;\n	mov.u32 %r3, 0;",
        "not all threads",
    ),
    # 1 or 2 by a branch of some threads, and later a condition.
    "one of two values": (
        "loop", "	mov.u32 %r3, 0;",
        "	mov.u32 %r2, 1;\n	setp.lt.s32 %p2, %r1, 7;\n	@%p2 bra $L__BB0_9;\n"
        "	mov.u32 %r2, 2;\n$L__BB0_9:\n	mov.u32 %r3, 0;",
        "not all threads",
    ),
    "product of some lanes": ("warps", "%r1, 5", "%r1, 4", "not all threads"),
    "guarded": ("joined", "	bar.sync", "	@%p1 bar.sync", "has a condition"),
    "polling": ("loop", "ld.global.u32", "ld.relaxed.gpu.global.u32", "not all threads"),
    "initialised": ("cluster", "mbarrier.init", "mbarrier.inval", "initialises"),
    "fenced": ("cluster", "fence.mbarrier_init.release.cluster", "membar.gl", "fences"),
    "announced": ("cluster", "arrive.expect_tx", "arrive", "announces"),
    "half a barrier": ("cluster", "	barrier.cluster.wait.acquire.aligned;", "", "1 arrivals"),
    "unordered": ("cluster", "wait.acquire", "wait", "orders no memory"),
    "state space": ("cluster", "init.shared::cta", "init", "not in shared memory"),
    "uncounted": ("cluster", "mbarrier::complete_tx::bytes.", "", "counts its bytes"),
    "unwaited": ("cluster", "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64",
                 "setp.ne.b32", "0 waits"),
}  # fmt: skip


@pytest.mark.parametrize("which", WRONG)
def test_a_fault_is_found(which):
    right, old, new, expected = WRONG[which]
    assert RIGHT[right].count(old) >= 1
    found = ptx.faults(module(RIGHT[right].replace(old, new, 1)))
    assert any(expected in line for line in found), found


def test_instructions_that_a_target_lacks():
    assert "mma.sync.aligned.m16n8k8" in RIGHT["warps"]
    for right, target, needed in (("cluster", "sm_80", 90), ("warps", "sm_75", 80)):
        found = ptx.faults(module(RIGHT[right], target))
        assert found and all(f"needs sm_{needed}" in line for line in found)


def test_a_function_that_was_not_inlined():
    text = module(RIGHT["loop"]) + ".func (.param .b32 result) helper(\n)\n{\n	ret;\n}\n"
    assert any("not inlined" in line for line in ptx.faults(text))


@pytest.mark.slow  # it compiles
def test_faults_of_compiled_programs(tmp_path):
    """Those of the emulator's programs that have threads apart at a barrier, and no others."""
    setup = setup_script()
    compiled()  # or there may be no nvcc
    nvcc, out = setup.find_nvcc(), tmp_path / "programs.ptx"
    host = next(word for word in reversed(setup.find_cxx()) if word[0] != "-")
    command = [nvcc, "-ccbin", host, *setup.NVCC_FLAGS.split(), "-arch=compute_90a", "-ptx"]
    command += ["-Icsrc", "-Itests", PROGRAMS, "-o", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    text = out.read_text()
    names = [
        re.search(r"programs_cu_\w{8}\d+([a-z_0-9]+?)(?:I\w+EEv)?E?NS_7Program", n)
        for n in ptx.kernels(text)
    ]
    assert all(names) and len(names) > 15
    wrong = {n[1] for n in names if n and any(n[0] in line for line in ptx.faults(text))}
    assert {"early_exit", "divergent", "demands"} <= wrong
    assert not wrong & {"reverse", "shared_overrun", "warp_order", "product_tf32", "cluster_turns"}


def test_no_kernel_has_a_fault():
    """Of every source and architecture that the build compiled. CI has nvcc keep its PTX."""
    compiled()
    folder = os.environ.get("FUSEDRNN_PTX")
    if not folder:
        pytest.skip(
            'no PTX: build with NVCCFLAGS="--keep --keep-dir $FUSEDRNN_PTX" in an empty build/ninja'
        )
    build = (ROOT / "build/ninja/build.ninja").read_text()
    rule = re.search(r"^rule nvcc\n  command = (.*)", build, re.M)
    assert rule
    sources = re.findall(r"^build \S+: nvcc (\S+\.cu)\n  flags = (.*)", build, re.M)
    assert len(sources) == len(list(ROOT.glob("csrc/cuda/**/*.cu")))
    checked = 0
    for source, flags in sources:
        stem = Path(source).stem
        files = [*Path(folder).glob(f"{stem}.ptx"), *Path(folder).glob(f"{stem}.compute_*.ptx")]
        texts = [file.read_text() for file in files]
        wanted = re.findall(r"arch=compute_(\w+)", rule[1] + flags)
        assert {ptx.target(text) for text in texts} == {f"sm_{arch}" for arch in wanted}, source
        for text in texts:
            assert ptx.faults(text) == [], source
            checked += len(ptx.kernels(text))
    print(f"\n{checked} kernels for {_C.cuda_archs()}")
    assert checked > 100
