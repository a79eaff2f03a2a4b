"""The emulator that runs CUDA kernels on the CPU: what it computes, and which faults it catches.

The programs are in emulator/programs.cu; each has a variant with a fault planted.
"""

from __future__ import annotations

import re

import bindings
import pytest
import torch
from compiling import ROOT
from emulator import Result, run
from torch import Tensor

NAN = float("nan")
SEEDS = [-1, *range(1, 6)]
SOURCE = (ROOT / "tests/emulator/programs.cu").read_text().splitlines()
FAULTS = re.findall(r"^  k(\w+),$", (ROOT / "tests/emulator/programs.h").read_text(), re.M)


def launch(
    name: str, out: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None,
    mode: str = "plain", seed: int = -1, **fields,
) -> Result:  # fmt: skip
    params = bindings.Program(**{"blocks": 1, "threads": 32, "cluster": 1, **fields})
    text = torch.tensor([*name.encode(), 0], dtype=torch.uint8)
    return run("program", params, {"name": text, "a": a, "b": b, "out": out}, mode, seed)


def line_of(program: str, text: str, number: int = 0) -> int:
    """The number of a line of a program in programs.cu, to find in reports."""
    start = next(i for i, line in enumerate(SOURCE) if re.search(rf"\bvoid {program}\(", line))
    lines = [i + 1 for i in range(start, len(SOURCE)) if text in SOURCE[i]]
    return lines[number]


def floats(*shape: int) -> Tensor:
    return torch.full(shape, NAN)


# Each case: (fields of the launch, a, out as it should be). Whole numbers, so that sums are exact.
def whole(*shape: int) -> Tensor:
    return torch.randint(-100, 100, shape).float()


def case(name: str) -> tuple[dict[str, int], Tensor, Tensor]:
    a = whole(64)
    if name == "reverse":
        return {"threads": 64}, a, a.flip(0)
    if name == "shared_overrun":
        return {"threads": 64, "shared_bytes": 256}, a, a.flip(0)
    if name == "early_exit":
        return {"threads": 64, "shared_bytes": 256}, a, a.sum()[None]
    if name == "divergent":
        return {"threads": 64}, a, torch.ones(64)
    if name == "warp_order":
        return {}, a, a[:32].flip(0)
    if name == "cluster_turns":
        a = whole(8, 16)
        sums = (4 * a + 6).view(2, 4, 16).sum(1, keepdim=True).expand(2, 4, 16).flip(2)
        fields = {"blocks": 8, "threads": 16, "cluster": 4, "shared_bytes": 2 * 4 * 16 * 16}
        return fields, a, sums.reshape(8, 16)
    if name == "cluster_end":
        a = whole(6, 16)
        out = a.view(2, 3, 16).roll(1, 1).reshape(6, 16)
        return {"blocks": 6, "threads": 16, "cluster": 3, "shared_bytes": 256}, a, out
    if name == "cluster_begin":
        out = torch.tensor([2.0, 0, 1, 2, 0, 1])
        return {"blocks": 6, "cluster": 3}, a, out
    if name == "demands":
        return {"blocks": 2, "cluster": 2}, a, torch.zeros(256)
    if name == "flags":
        a = whole(5)
        out = torch.cat([a.cumsum(0), torch.ones(5, dtype=torch.int32).view(torch.float32)])
        return {"blocks": 5, "cooperative": True}, a, out
    if name == "values":
        a = whole(5)
        sums = a.cumsum(0).view(torch.int32).tolist()
        return {"blocks": 5, "cooperative": True}, a, torch.tensor([*sums, *sums, -1]).int()
    if name == "store_then_flag":
        a = whole(32)
        out = torch.cat([2 * a, 2 * a, torch.ones(1, dtype=torch.int32).view(torch.float32)])
        return {"blocks": 2, "cluster": 2, "shared_bytes": 512}, a, out
    if name == "lost_flag":
        return {"blocks": 5, "cooperative": True}, a, torch.ones(1, dtype=torch.int32)
    assert name == "apart"
    return {"blocks": 5}, whole(5), torch.zeros(5)


NAMES = """reverse shared_overrun early_exit divergent warp_order cluster_turns cluster_end
cluster_begin flags values store_then_flag lost_flag apart demands""".split()
FLAGS = ("flags", "store_then_flag", "lost_flag")


def go(name: str, mode: str = "plain", seed: int = -1, bug: int = 0, **changes):
    """(result, out, out as it should be)"""
    fields, a, exact = case(name)
    if name == "apart":
        exact = a
    # What is no number is poisoned; flags start at zero.
    empty = 0 if name in FLAGS else -1 if name == "values" else NAN
    out = torch.full_like(exact, empty)
    return launch(name, out, a, mode=mode, seed=seed, bug=bug, **{**fields, **changes}), out, exact


# ---- what it computes ----


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mode", ["plain", "address", "thread"])
def test_right_programs_pass_under_every_order(name, mode):
    for seed in SEEDS if mode == "plain" else SEEDS[:3]:
        result, out, exact = go(name, mode, seed)
        result.check()
        assert out.tolist() == exact.tolist()


def test_coordinates():
    out = torch.full((2, 3, 2, 4, 2, 3, 12), -1, dtype=torch.int32)  # grid z y x, block z y x
    launch("coordinates", out, seed=1).check()
    index = torch.meshgrid(*map(torch.arange, out.shape[:6]), indexing="ij")
    for i, j in enumerate((5, 4, 3, 2, 1, 0)):
        assert torch.equal(out[..., i].long(), index[j])
    assert out[0, 0, 0, 0, 0, 0, 6:].tolist() == [3, 2, 4, 2, 3, 2]


def test_shuffles():
    a = torch.randint(-100, 100, (32,)).double()
    for seed in SEEDS:
        out = torch.full((5, 32), NAN, dtype=torch.float64)
        launch("shuffles", out, a, seed=seed).check()
        lane = torch.arange(32)
        half = lane % 16
        assert torch.equal(out[0], a[5].expand(32))
        assert torch.equal(out[1], a[lane ^ 3])
        assert torch.equal(out[2], a[torch.where(half >= 4, lane - 4, lane)])
        assert torch.equal(out[3], a[torch.where(half < 12, lane + 4, lane)])
        assert torch.equal(out[4], a.cumsum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_matrix_products(dtype):
    name = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32"}[dtype]
    K = 8 if dtype == torch.float32 else 16
    a, b = torch.randn(16, K).to(dtype), torch.randn(8, K).to(dtype)

    def exact(a: Tensor, b: Tensor) -> Tensor:
        if dtype == torch.float32:  # to 10 bits behind the point, ties away from zero
            a, b = (((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32) for x in (a, b))
        return (a.double() @ b.double().T + 1).float()

    for seed in SEEDS[:3]:
        out = floats(16, 8)
        launch(f"product_{name}", out, a, b, seed=seed).check()
        torch.testing.assert_close(out, exact(a, b), rtol=0, atol=1e-5)
    wrong = floats(16, 8)
    launch(f"product_{name}", wrong, a, b, bug=1).check()
    assert (wrong - out).abs().max() > 0.1


def test_more_than_one_batch_of_blocks_and_the_tail():
    """13 blocks of 32 threads for 401 elements."""
    out = floats(401)
    launch("global_overrun", out, torch.ones(1), blocks=13, shared_bytes=401, seed=3).check()
    assert torch.equal(out, torch.ones(401))


def test_results_do_not_depend_on_the_run():
    logs = [go("shared_overrun", "plain", seed, 1)[0] for seed in (2, 2)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    "fields, error",
    [
        ({"threads": 1025}, 9),
        ({"blocks": 0}, 9),
        ({"shared_bytes": (227 << 10) + 1}, 1),
        ({"blocks": 34, "cluster": 17}, 912),
        ({"blocks": 6, "cluster": 4}, 912),
        ({"blocks": 133, "shared_bytes": 120 << 10, "cooperative": True}, 720),
        ({"blocks": 133, "threads": 1024, "cooperative": False}, 0),
    ],
)
def test_launches_that_a_device_would_refuse_are_refused(fields, error):
    result = launch("apart", torch.zeros(133), torch.ones(133), **fields)
    assert (result.error, result.status, result.log) == (error, 0, "")


# ---- what it catches ----


def assert_race(result: Result, *lines: int) -> None:
    assert "WARNING: ThreadSanitizer: data race" in result.log, result.log
    for line in lines:
        assert f"programs.cu:{line}" in result.log, result.log


def assert_wrong_somewhere(name: str, seeds=range(1, 9)) -> None:
    """Under some order of threads the fault shows in the results."""
    for seed in seeds:
        _, out, exact = go(name, seed=seed, bug=1)
        if out.tolist() != exact.tolist():
            return
    pytest.fail("every order gave the right result")


def test_missing_barrier():
    assert_wrong_somewhere("reverse")
    result, *_ = go("reverse", "thread", seed=1, bug=1)
    assert_race(result, line_of("reverse", "values[i] ="), line_of("reverse", "out<float>(p)[i]"))


def test_shared_overrun():
    result, *_ = go("shared_overrun", "address", bug=1)
    assert result.status and "AddressSanitizer: use-after-poison" in result.log
    assert f"programs.cu:{line_of('shared_overrun', 'p.bug ? 1')}" in result.log


def test_global_overrun():
    fields = {"a": torch.ones(1), "blocks": 13, "shared_bytes": 401, "bug": 1}
    result = launch("global_overrun", floats(401), mode="address", **fields)
    assert result.status and "AddressSanitizer: heap-buffer-overflow" in result.log
    assert f"programs.cu:{line_of('global_overrun', 'p.bug ||')}" in result.log


def test_threads_that_miss_a_barrier():
    result, *_ = go("early_exit", bug=1)
    line = line_of("early_exit", "__syncthreads()")
    assert result.error == 719
    assert "deadlock: 32 of 64 threads have ended" in result.log
    assert re.search(
        rf"32 in __syncthreads, programs.cu:{line}, the first block \(0,0,0\) thread \(0,0,0\)",
        result.log,
    )


def test_divergent_barrier():
    lines = {line_of("divergent", "__syncthreads()", i) for i in (0, 1)}
    for seed in SEEDS:
        result, *_ = go("divergent", seed=seed, bug=1)
        assert result.error == 719
        found = re.fullmatch(
            r"simt: block \(0,0,0\) thread \(\d+,0,0\): divergent __syncthreads:"
            r" here programs.cu:(\d+), others programs.cu:(\d+)\n",
            result.log,
        )
        assert found and {int(found[1]), int(found[2])} == lines


def test_lane_outside_its_mask():
    out, a = torch.zeros(5, 32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    result = launch("shuffles", out, a, bug=1)
    line = line_of("shuffles", "__shfl_sync(")
    assert result.error == 719
    assert f"lane 31 is not in its mask 7fffffff at programs.cu:{line}" in result.log


def test_shuffle_orders_no_memory():
    result, *_ = go("warp_order", "thread", bug=1)
    assert_race(result, line_of("warp_order", "values[lane] ="))


def test_stale_read_of_a_late_store():
    result, out, _ = go("cluster_turns", bug=1)  # without a seed stores land as late as they may
    result.check()
    assert out.isnan().any()
    assert_wrong_somewhere("cluster_turns")
    result, *_ = go("cluster_turns", "thread", seed=1, bug=1)
    assert_race(result, line_of("cluster_turns", "sum += "))


def test_store_that_need_not_come_after_a_read():
    """A store to another block orders nothing that its thread did since the last barrier.

    So that block, having it, may store to what this one has not read. The results do not show it.
    """
    for seed in range(1, 4):
        result, out, exact = go("cluster_turns", seed=seed, bug=2)
        result.check()
        assert torch.equal(out, exact)
    result, *_ = go("cluster_turns", "thread", seed=1, bug=2)
    assert_race(result, line_of("cluster_turns", "sum += "))


def test_block_that_ends_before_it_was_stored_to():
    result, *_ = go("cluster_end", bug=1)
    line = line_of("cluster_end", "store_async(")
    assert result.error == 719
    report = rf"the block ends with a store to it on its way, programs.cu:{line}\n"
    late = rf"st.async to block 0, which has ended, at programs.cu:{line}\n"
    assert re.search(f"{report}|{late}", result.log), result.log


def test_block_that_is_stored_to_before_it_runs():
    result, *_ = go("cluster_begin", bug=1)
    line = line_of("cluster_begin", "store_async(")
    assert result.error == 719
    assert f"st.async to block 1, which has not begun, at programs.cu:{line}" in result.log


# What the PTX ISA demands of each primitive, and the report where it is not given.
DEMANDS = {
    "StoreInClusterOfOne": "st.async in a cluster of one block",
    "StoreOutsideCluster": "no block 2 in a cluster of 2",
    "StoreFromGlobal": "not in the block's shared memory",
    "StoreMisaligned": "not a multiple of 16",
    "StoreUninitialised": "mbarrier not initialised",
    "StoreUnfenced": "no fence after the mbarrier's initialisation",
    "InitMisaligned": "no place for an mbarrier",
    "InitInGlobal": "no place for an mbarrier",
    "InitOfNoArrivals": "mbarrier of 0 arrivals",
    "InitOfManyArrivals": "mbarrier of 1048576 arrivals",
    "InitTwice": "mbarrier initialised twice",
    "ArriveUninitialised": "mbarrier not initialised",
    "ArriveTwice": "one arrival too many",
    "ExpectManyBytes": "an mbarrier cannot expect 1048576 bytes",
    "WaitUninitialised": "mbarrier not initialised",
    "WaitOddParity": "an mbarrier has no parity 2",
    "ClusterArriveTwice": "a second cluster arrive",
    "ClusterWaitAlone": "cluster wait without arrive",
    "ClusterArriveDivergent": "divergent barrier.cluster.arrive",
    "ClusterWaitDivergent": "divergent barrier.cluster.wait",
    "ClusterArriveMissed": "32 in barrier.cluster.arrive",
    "MmaDivergent": "divergent mma",
    "MmaMissed": "32 in mma",
    "MmaOfFewLanes": "mma of 16 lanes",
    "FlagInShared": "not in global memory",
    "FlagMisaligned": "not a multiple of 4",
    "FlagReadInShared": "not in global memory",
    "VectorInShared": "not in global memory",
    "VectorMisaligned": "not a multiple of 16",
    "ValueInShared": "not in global memory",
    "ValueMisaligned": "not a multiple of 16",
    "ValueReadInShared": "not in global memory",
    "ValueReadMisaligned": "not a multiple of 4",
    "ValueTwice": "another value has come before",
    "PrefetchInShared": "not in global memory",
    "HostWordInShared": "not in global memory",
}


def test_all_demands_are_here():
    assert list(DEMANDS) == FAULTS[1:]


@pytest.mark.parametrize("fault", DEMANDS)
def test_a_demand_that_is_not_met(fault):
    changes = {"StoreInClusterOfOne": {"cluster": 1}, "MmaOfFewLanes": {"threads": 16}}
    result, *_ = go("demands", bug=FAULTS.index(fault), **changes.get(fault, {}))
    assert result.error == 719
    assert DEMANDS[fault] in result.log
    assert "programs.cu:" in result.log


@pytest.mark.parametrize("name, line", [("flags", "sums[b] ="), ("store_then_flag", "to[n + i] =")])
def test_flag_that_is_set_too_early(name, line):
    assert_wrong_somewhere(name)
    result, *_ = go(name, "thread", seed=1, bug=1)
    assert_race(result, line_of(name, line))


def test_a_value_orders_nothing_but_itself():
    result, *_ = go("values", "thread", seed=1, bug=1)
    assert_race(result, line_of("values", "before[0] = sums"), line_of("values", "sums[b] ="))


def test_flag_that_no_one_sets():
    result, *_ = go("lost_flag", bug=1)
    assert result.error == 719
    assert (
        f"a flag that no one sets at programs.cu:{line_of('lost_flag', 'load_acquire')}"
        in result.log
    )


def test_waiting_for_a_block_that_need_not_run():
    """The chain of flags, but blocks that are not launched together may run in any order."""
    logs = [go("flags", seed=seed, cooperative=False)[0].log for seed in range(1, 5)]
    assert any("a flag that no one sets" in log for log in logs)


def test_blocks_that_write_the_same():
    result, *_ = go("apart", "thread", seed=1, bug=1)
    assert_race(result, line_of("apart", "out<float>(p)"))


def test_stack_overflow():
    out, a = torch.zeros(32, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    launch("stack", out, a).check()
    result = launch("stack", out, a, bug=1)
    assert result.status
    assert "simt: block (0,0,0) thread (0,0,0): more than 64 KiB of stack" in result.log


def test_a_wrong_structure_is_refused():
    result = run("program", bindings.CellForward(), {})
    assert result.status == 2 and "another size" in result.log
    result = run("none", bindings.Program(), {})
    assert result.status == 2 and "no such launch" in result.log
