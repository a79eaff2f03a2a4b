"""compute-sanitizer and Nsight Compute in the GPU command, and the calls that they watch."""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu import checks, points, process, summary, supervise, sweep, worker

CPU = torch.device("cpu")


CLEAN = "smoke: 96 calls\n========= ERROR SUMMARY: 0 errors\n"
RACE = "========= RACECHECK SUMMARY: {} hazards displayed ({} errors, 0 warnings)\n"
INVALID = (
    "========= Invalid __global__ write of size 4 bytes\n"
    "=========     at fusedrnn::kernel+0x70\n========= ERROR SUMMARY: 2 errors\n"
)


@pytest.mark.parametrize(
    ("code", "text", "verdict"),
    [
        (0, CLEAN, "clean"),
        (0, "smoke: 96 calls\n" + RACE.format(0, 0), "clean"),
        (99, INVALID, "errors"),
        (None, INVALID, "errors"),  # it said so before it was stopped
        (99, "smoke: 96 calls\n" + RACE.format(3, 3), "errors"),
        (None, "", "no answer"),
        (0, "========= ERROR SUMMARY: 0 errors\n", "did not work"),  # nothing was run
        (0, "smoke: 96 calls\n", "did not work"),  # nothing was watched
        (1, "========= Error: Device not supported\n", "did not work"),
        (1, "not finite: GRU\n========= ERROR SUMMARY: 0 errors\n", "did not work"),
    ],
)
def test_verdicts_of_the_sanitizer(code, text, verdict):
    found = checks.judge(code, text, 90.0)
    assert found["verdict"] == verdict
    if text is INVALID:
        assert found["errors"] == 2 and found["first"].startswith("Invalid __global__ write")


def fake(folder, name, script):
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_sanitizer_is_given_the_smoke_calls_and_every_backend(tmp_path, monkeypatch):
    """A stand-in that runs what it is given, and claims to have seen errors under one tool."""
    fake(
        tmp_path / "bin",
        "compute-sanitizer",
        "import os, sys\n"
        "at = sys.argv.index('-m')\n"
        "tool = sys.argv[sys.argv.index('--tool') + 1]\n"
        "backend = os.environ['FUSEDRNN_PLAN']\n"
        "bad = (tool, backend) == ('racecheck', 'grid')\n"
        "assert sys.argv[at:] == ['-m', 'benchmarks.gpu.smoke', '--device', 'cpu'], sys.argv\n"
        "assert os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'] == '1'\n"
        "print('smoke: 3 calls')\n"
        "print(f'ERROR SUMMARY: {int(bad)} errors')\n",
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    found = checks.sanitizer(tmp_path, time.monotonic() + 60, "cpu")
    assert found["incomplete"] is None
    verdicts = {name: run["verdict"] for name, run in found["runs"].items()}
    assert list(verdicts)[:4] == [*(f"memcheck/{b}" for b in points.BACKENDS), "racecheck/cluster"]
    assert verdicts.pop("racecheck/grid") == "errors"
    assert set(verdicts.values()) == {"clean"} and len(verdicts) == 11
    assert not summary.good({"sanitizer": found})


NCU = """==PROF== Connected to process 1
smoke: 2 calls
"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","1","persistent_forward_kernel","GPU Speed Of Light","Duration","usecond","123.5"
"0","1","persistent_forward_kernel","GPU Speed Of Light","Elapsed Cycles","cycle","230,000"
"0","1","persistent_forward_kernel","Launch Statistics","Block Size","","256"
"""


def test_counters_are_read_or_missed():
    found = checks.counters(0, NCU, 60.0)
    assert found["verdict"] == "measured"
    assert found["metrics"] == {"us": "123.5 usecond", "cycles": "230,000 cycle"}
    assert checks.counters(None, "", 60.0)["why"] == "not done within 60 s"
    failed = checks.counters(1, "==ERROR== Failed to initialize the profiler\n", 60.0)
    assert failed["verdict"] == "did not work" and "initialize the profiler" in failed["why"]
    assert checks.counters(0, NCU[:100], 60.0)["verdict"] == "did not work"  # no kernel was seen


def test_ncu_is_given_each_point_and_its_kernel(tmp_path, monkeypatch):
    fake(
        tmp_path / "bin",
        "ncu",
        "import os, sys\n"
        "way = sys.argv[sys.argv.index('--kernel-name') + 1]\n"
        "assert sys.argv[1:3] == ['--clock-control', 'none'], sys.argv\n"
        "assert sys.argv[-1].endswith(way.removeprefix('regex:persistent_')), sys.argv\n"
        "assert os.environ['FUSEDRNN_CUDA_KERNELS'] == 'on'\n"
        f"print({NCU!r})\n",
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.delenv(process.CANARIES, raising=False)
    ids = ["a/float32/forward", "a/tf32/backward"]
    given = tmp_path / "points.json"
    found = checks.profile(tmp_path, time.monotonic() + 60, "cpu", given, ids)
    assert [run["verdict"] for run in found["runs"].values()] == ["measured"] * 2, found
    table = summary.counters_table(found["runs"])
    assert table[1] == ["a/float32/forward", "123.5 usecond", "230,000 cycle"]


def test_smoke_calls_every_cell_and_dtype(capsys, monkeypatch):
    from benchmarks.gpu import smoke

    monkeypatch.setattr(sys, "argv", ["smoke", "--device", "cpu"])
    assert smoke.main() == 0
    assert "smoke: 96 calls" in capsys.readouterr().out


def test_smoke_calls_a_point(tmp_path, capsys, monkeypatch):
    from benchmarks.gpu import smoke

    point = sweep.groups(points.TRY)[0].point("stepwise")
    (tmp_path / "points.json").write_text(json.dumps([point.item()]))
    monkeypatch.delenv(worker.PLAN, raising=False)
    words = ["--device", "cpu", "--points", str(tmp_path / "points.json"), "--id", point.id]
    monkeypatch.setattr(sys, "argv", ["smoke", *words])
    assert smoke.main() == 0
    assert "smoke: 2 calls" in capsys.readouterr().out
    assert os.environ[worker.PLAN] == "forward:stepwise"


def test_points_have_names_of_their_own_and_survive_json():
    for sizes in (points.CUDA, points.TRY):
        every = [*points.named(sizes), *points.grid(sizes)]
        assert len({p.id for p in every}) == len(every)
        for point in every[::37]:
            assert points.Point.of(json.loads(json.dumps(point.item()))["point"]) == point
    grid = points.grid(points.CUDA)
    assert len(grid) == 3 * 4 * 3 * 3 * 2 * 3 * 2
    assert [p.id for p in grid] == [p.id for p in points.grid(points.CUDA)]
    assert {w.dtype for p in grid for w in p.works} == {"float32", "bfloat16", "float16"}


@pytest.mark.parametrize("text", points.LEFT_OUT)
def test_what_cannot_run_has_not_failed(text, tmp_path, monkeypatch):
    """A plan that does not fit, or of a family that failed as a canary."""

    def refuse(layer, example):
        assert os.environ[worker.PLAN] == "forward:grid,rows=8"
        raise RuntimeError(f"fusedrnn: FUSEDRNN_PLAN=grid {text}\nand a stack trace")

    point = sweep.groups(points.TRY)[0].point("grid,rows=8")
    monkeypatch.setitem(worker.BUILD, "fusedrnn", refuse)
    monkeypatch.setenv(worker.PLAN, "")
    journal = supervise.Journal(tmp_path / "journal")
    assert worker.do([point.item()], journal, "cpu") == 0
    found = {line["id"]: line for line in supervise.read(tmp_path / "journal")}
    assert text in found[point.id]["left_out"] and summary.problems(found) == {}
    assert (
        "1 of 1, 0 with problems, 1 left out"
        in summary.checks({"sweep": {"found": found, "planned": 1, "incomplete": None}})[1]
    )


def test_the_worker_times_what_is_right_and_says_what_is_wrong(monkeypatch):
    clerk = worker.Clerk(CPU)
    case = points.grid(points.TRY)[0].works[0].case
    point = points.Point("p", points.pair(case, "training", "float32"), seconds=0.01, rounds=3)
    theirs, ours = clerk.measure(point)["works"]
    assert len(theirs["seconds"]) == len(ours["seconds"]) >= 3
    assert theirs["problem"] is ours["problem"] is None and ours["error"] < 2
    assert ours["saved_bytes"] >= 0 and "fused CPU kernels" in ours["plan"]

    def wrong(layer, example):
        module = worker.PEERS[1].build(layer, example)
        module.register_forward_hook(lambda m, args, result: (result[0] * 1.01, result[1]))
        return module

    monkeypatch.setitem(worker.BUILD, "fusedrnn", wrong)
    theirs, ours = worker.Clerk(CPU).measure(point)["works"]
    assert "seconds" in theirs and "seconds" not in ours
    assert ours["problem"].startswith("error of output")


def test_a_replay_that_computes_something_else_is_found_out():
    right = {"output": torch.ones(3), "h_n": torch.zeros(2)}
    assert worker.differences(right, right) is None
    for wrong in (torch.full((3,), 1.1), torch.full((3,), float("nan"))):
        assert "output" in worker.differences({**right, "output": wrong}, right)


def test_torch_s_own_kernels_are_not_taken_for_ours():
    clerk = worker.Clerk(torch.device("cuda"))
    theirs = "LSTM: torch.nn's own kernels, because {}"
    assert clerk._not_ours(theirs.format("this build has no CUDA kernels"), "")
    assert clerk._not_ours(theirs.format("forward would be stepwise"), "cluster")
    assert clerk._not_ours(theirs.format("forward would be stepwise"), "") is None
    assert clerk._not_ours("LSTM: cluster, ...", "cluster") is None
