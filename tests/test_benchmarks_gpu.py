"""The GPU command without a GPU: processes that die, verdicts, figures, whole runs on a CPU.

Whole runs use the emulator (tests/emulator/stand_in.py), with kernels that fail, hang, crash and
compute nonsense on purpose.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import stat
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path

import pytest
import torch
from compiling import setup_script

from fusedrnn import _C, cuda, families

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu import (
    canaries,
    checks,
    micro,
    points,
    process,
    summary,
    supervise,
    sweep,
    worker,
)
from benchmarks.gpu.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def supervised(tmp_path, body, deadline=30.0, silence=10.0, before="", **options):
    """Supervises a program that goes through the items a to d, and does `body` at each."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n" + before + "\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from benchmarks.gpu.supervise import Journal\n"
        f"journal = Journal(Path({str(tmp_path / 'journal')!r}))\n"
        "for item in 'abcd':\n"
        "    if item in journal.done:\n"
        "        continue\n"
        "    journal.start(item)\n" + textwrap.indent(textwrap.dedent(body), "    ") + "\n"
        "    journal.finish(item, pid=os.getpid())\n"
    )
    return supervise.supervise(
        [sys.executable, str(program)],
        tmp_path / "journal",
        tmp_path / "log",
        time.monotonic() + deadline,
        silence,
        **options,
    )


def test_every_item_is_done_once(tmp_path):
    outcome = supervised(tmp_path, "pass")
    assert list(outcome.found) == list("abcd") and outcome.incomplete is None
    assert len({line["pid"] for line in outcome.found.values()}) == 1


def test_a_process_that_dies_loses_its_item_alone(tmp_path):
    outcome = supervised(tmp_path, "if item == 'b': print('oh no', flush=True); os.abort()")
    assert list(outcome.found) == list("abcd") and outcome.incomplete is None
    assert "SIGABRT" in outcome.found["b"]["problem"] and "oh no" in outcome.found["b"]["problem"]
    assert outcome.found["a"]["pid"] != outcome.found["c"]["pid"] == outcome.found["d"]["pid"]


def test_a_line_cut_off_in_the_middle_is_no_line(tmp_path):
    body = """
    if item == 'b':
        open(journal.path, 'a').write('{"id": "b", "val')
        os._exit(9)
    """
    outcome = supervised(tmp_path, body)
    assert list(outcome.found) == list("abcd")
    assert "code 9" in outcome.found["b"]["problem"]


def test_a_silent_process_loses_its_item(tmp_path):
    outcome = supervised(tmp_path, "if item == 'c': time.sleep(60)", silence=2.0)
    assert list(outcome.found) == list("abcd") and outcome.incomplete is None
    assert outcome.found["c"]["problem"].startswith("no answer within 2 s")


def test_a_process_may_take_longer_to_begin(tmp_path, monkeypatch):
    outcome = supervised(tmp_path, "pass", silence=1.0, before="time.sleep(2.5)")
    assert list(outcome.found) == list("abcd") and outcome.incomplete is None
    monkeypatch.setattr(supervise, "STARTUP", 1.0)
    (tmp_path / "journal").unlink()
    outcome = supervised(tmp_path, "pass", silence=1.0, before="time.sleep(20)")
    assert not outcome.found and outcome.incomplete.startswith("no answer within 1 s")


def test_a_process_that_gives_up_after_its_item_is_started_again(tmp_path):
    body = "if item == 'b': journal.finish(item, problem='lost'); sys.exit(77)"
    outcome = supervised(tmp_path, body)
    assert list(outcome.found) == list("abcd")
    assert outcome.found["b"]["problem"] == "lost" and outcome.incomplete is None


def test_time_runs_out(tmp_path):
    start = time.monotonic()
    outcome = supervised(tmp_path, "time.sleep(60 if item == 'b' else 0)", deadline=2.0)
    assert time.monotonic() - start < 20
    assert list(outcome.found) == ["a"] and outcome.incomplete == "out of time"


def test_a_program_that_never_starts_is_not_started_for_ever(tmp_path):
    outcome = supervised(tmp_path, "}{")
    assert not outcome.found and "SyntaxError" in outcome.incomplete


def test_children_end_with_the_process(tmp_path):
    body = f"""
    import subprocess
    child = subprocess.Popen(['sleep', '60'])
    Path({str(tmp_path / "child")!r}).write_text(str(child.pid))
    time.sleep(60)
    """
    supervised(tmp_path, body, deadline=1.5)
    child = int((tmp_path / "child").read_text())
    for _ in range(100):  # a killed process takes a moment to go
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return
        if state in "ZX":
            return
        time.sleep(0.1)
    pytest.fail(f"the child is still there, in state {state}")


# The GPU tests


def test_tests_go_on_after_one_that_kills_its_process(tmp_path, monkeypatch):
    folder = tmp_path / "tests"
    folder.mkdir()
    (folder / "conftest.py").write_text("")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs a GPU\n")
    (folder / "test_it.py").write_text(
        textwrap.dedent(
            """
            import os
            import pytest

            pytestmark = pytest.mark.gpu

            def test_good(): pass
            def test_bad(): assert 1 == 2, "one is not two"
            def test_struck():
                raise RuntimeError("FUSEDRNN_PLAN=grid asks for kernels of which a small case "
                                   "failed as a canary; and so on")
            def test_dies(): os.abort()
            def test_skipped(): pytest.skip("not today")
            @pytest.fixture
            def broken():
                yield
                raise OSError("while cleaning up")
            def test_teardown(broken): pass
            def test_last(): pass
            """
        )
    )
    (folder / "test_other.py").write_text("import no_such_module  # and pytest.mark.gpu\n")
    (folder / "test_elsewhere.py").write_text("import another_one\n")  # not its business
    found = checks.tests(tmp_path, time.monotonic() + 100, tmp_path)
    assert (found["passed"], found["skipped"], found["struck"]) == (2, 1, 1)
    assert found["incomplete"] is None and found["skip_reasons"] == ["Skipped: not today"]
    failed = {name.rpartition("::")[2]: problem for name, problem in found["failed"].items()}
    assert failed.keys() == {"test_bad", "test_dies", "test_teardown", "tests/test_other.py"}
    assert "one is not two" in failed["test_bad"] and "SIGABRT" in failed["test_dies"]
    assert "while cleaning up" in failed["test_teardown"]
    assert "no_such_module" in failed["tests/test_other.py"]


def test_no_test_at_all_is_no_success(tmp_path):
    (tmp_path / "tests").mkdir()
    found = checks.tests(tmp_path, time.monotonic() + 60, tmp_path)
    assert found["incomplete"].endswith("needs a GPU") and not summary.good({"tests": found})
    (tmp_path / "tests/test_it.py").write_text("# pytest.mark.gpu\n")
    found = checks.tests(tmp_path, time.monotonic() + 60, tmp_path)
    assert found["passed"] == 0 and found["incomplete"].startswith("no test ran")
    assert not summary.good({"tests": found})


# compute-sanitizer

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


# Nsight Compute

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


# Points


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


# Figures


def record(*seconds, peers=("torch.nn", "fusedrnn"), steps=None, key="seconds", **changes):
    steps = steps or [1] * len(seconds)
    works = [
        {"peer": peer, "steps": n, "layers": 1, "problem": None, key: times, **changes}
        for peer, n, times in zip(peers, steps, seconds, strict=True)
    ]
    return {"works": works}


def test_a_step_is_the_difference_of_two_lengths():
    ours = ("fusedrnn", "fusedrnn")
    found = record([1.0, 5.0, 1.0], [2.0, 6.0, 2.5], peers=ours, steps=[10, 20])
    assert summary.step_seconds(found) == pytest.approx(0.1)
    assert summary.step_seconds(found, "torch.nn") is None
    graphs = record([1.0], [3.0], peers=ours, steps=[10, 20], key="graph_seconds")
    for work, other in zip(found["works"], graphs["works"], strict=True):
        work["graph_seconds"] = other["graph_seconds"]
    assert summary.step_seconds(found) == pytest.approx(0.2)
    assert summary.step_seconds(None) is None


def test_targets_are_judged_by_what_was_measured():
    layers = record([1.0], [1.1], [1.25], peers=["fusedrnn"] * 3)
    for work, n in zip(layers["works"], (1, 2, 4), strict=True):
        work["layers"] = n
    found = {
        "book": record([6.0, 6.6], [1.0, 1.1], saved_bytes=10),
        "book/no-tf32": record([2.0], [1.0]),
        "grid/training/float32/a": record([8.0], [1.0]),
        "grid/training/float32/b": record([1.0], [2.0]),
        "grid/inference/float32/a": record([4.0], [1.0]),
        "flashrnn/bfloat16/forward": record([1.0], [0.0019]),
        "flashrnn/float16/training": record([1.0], [0.0051]),
        "step/float32": record([1e-6], [2e-6], peers=["fusedrnn"] * 2, steps=[1, 2]),
        "layers/inference": layers,
        "speech/inference": {"problem": "the GPU was lost"},
    }
    found["grid/training/float32/a"]["works"][0]["saved_bytes"] = 100
    found["grid/training/float32/a"]["works"][1]["saved_bytes"] = 150
    cells = [target.cells(on_gpu=True) for target in summary.targets(found, 8)]
    assert [(c[1], c[3]) for c in cells] == [
        ("6.00x (6.00..6.00)", "met"),
        ("2.00x (2.00..2.00)", "MISSED"),
        ("2.00x", "MISSED"),
        ("0.50x, float32/b", "MISSED"),
        ("4.00x", "met"),
        ("4.00x, float32/a", "met"),
        ("1.9 ms", "met"),
        ("", "not measured"),
        ("", "not measured"),
        ("5.1 ms", "MISSED"),
        ("1 us", "met"),
        ("", "not measured"),
        ("", "not measured"),
        ("2: 1.10x, 4: 1.25x", "met"),
        ("", "not measured"),
        ("the GPU was lost", "not measured"),
        ("", "not measured"),
        ("at most 1.50x, float32/a", "MISSED"),
    ]
    assert cells[2][0] == "geometric mean of 2 of 4, training"
    assert {target.cells(on_gpu=False)[3] for target in summary.targets(found)} == {"dry run"}


def test_what_fails_is_in_the_summary_and_in_the_exit_code():
    environment = dict.fromkeys(["gpu", "gpu_driver", "cuda", "cudnn", "torch", "fusedrnn"], "x")
    environment |= {"cpu": "y", "commit": "z", "date": "2026-01-01"}
    wrong = record([1.0], [1.0], problem="error of output")
    data = {
        "environment": environment,
        "commands": {"3": "c"},
        "targets": {"found": {"book": wrong}, "planned": 2, "grid": 0, "incomplete": None},
    }
    assert "book: error of output" in summary.text(data)
    assert "1 of 2, 1 with problems" in summary.text(data)
    assert not summary.good(data)
    data["targets"]["found"] = {"book": record([1.0], [1.0])}
    assert summary.good(data)
    skipped = {"passed": 0, "skipped": 3, "struck": 0, "skip_reasons": ["no kernels"], "failed": {}}
    every = {**data, "tests": {**skipped, "incomplete": None}}
    assert not summary.good(
        every
    ) and "3 skipped, 0 of struck families (no kernels)" in summary.text(every)
    data["targets"]["incomplete"] = "out of time"
    assert not summary.good(data) and "INCOMPLETE: out of time" in summary.text(data)


# Plans and the fit of the planner's constants

SPEC = {
    **{"capability": 90, "processors": 132, "shared_bytes": 232448},
    **{"clusters": [132, 66, *(8 * (16 // n) for n in range(3, 17))]},  # a list, as in JSON
}


def test_the_best_plans_and_their_neighbours_are_measured():
    groups = sweep.groups(points.CUDA)
    assert len({g.id for g in groups}) == len(groups) and len({g.case for g in groups}) == 8
    assert {g.dtype for g in groups} == {"float32", "bfloat16", "float16"}
    group = next(g for g in groups if g.id == "book-lstm-256x2/tf32/forward")
    plans = sweep.chosen(group, SPEC, points.CUDA)
    best = [p for p, _ in sweep.plans(group.request(), SPEC, _C.cuda_model())]
    assert plans[:6] == best[:6] and len(plans) == len(set(plans))
    first = sweep.words(best[0])
    differing = {
        name
        for plan in plans[1:]
        for name, value in sweep.words(plan).items()
        if {k for k in first if first[k] != sweep.words(plan).get(k)} == {name} and value
    }
    assert differing >= {"units", "rows", "engine"} and "stepwise" in plans
    point = group.point(plans[0])
    assert point.plan == f"forward:{plans[0]}" and point.works[0].mode == "forward"


def test_every_planned_plan_can_be_forced():
    for group in sweep.groups(points.CUDA)[::5]:
        for plan in sweep.chosen(group, SPEC, points.CUDA):
            forced = group.point(plan).plan
            assert [p for p, _ in sweep.plans(group.request(), SPEC, _C.cuda_model(), forced)] == [
                plan
            ]


def test_a_run_that_ends_early_has_the_best_of_every_group():
    group = sweep.groups(points.CUDA)[0]
    one, two, three = (group.point(p) for p in ("stepwise", "grid", "cluster"))
    assert sweep.in_turns([[one, two], [three]]) == [one, three, two]


def invented(model, offset=1e-4, every=7):
    """A sweep on a GPU of which `model` is true, besides what all plans of a group share."""
    groups = sweep.groups(points.CUDA)[::every]
    found = {}
    for group in groups:
        for plan in sweep.chosen(group, SPEC, points.CUDA):
            us = sweep.plans(group.request(), SPEC, model, plan)[0][1]
            found[f"{group.id}/{plan}"] = record([us * 1e-6 + offset], peers=["fusedrnn"])
    found[f"{groups[0].id}/grid,units=8,rows=8,layers=1,engine=ffma"] = {"problem": "it hung"}
    # Plans that a planner of another day made.
    for plan in ("grid,units=8,rows=5,layers=1,engine=ffma", "spiral,units=8"):
        found[f"{groups[0].id}/{plan}"] = record([1.0], peers=["fusedrnn"])
    return {"spec": SPEC, "groups": {g.id: g.request() for g in groups}, "found": found}


def test_the_fit_finds_the_constants_behind_the_times():
    slow = {"cluster_exchange": 500, "grid_exchange": 3000, "value_exchange": 2500, "ffma_tile": 14}
    true = {**_C.cuda_model(), **slow}
    data = json.loads(json.dumps(invented(true)))
    fit = sweep.fit(data)
    assert fit["error_after"] < 0.02 < fit["error_before"]
    for name in slow:
        assert fit["constants"][name] == pytest.approx(true[name], rel=0.25), name
    for group, found in fit["groups"].items():
        assert found["fitted"][1] <= 1.02 * found["fastest"][1], (group, found)
    (_, plans), (_, constants) = summary.fit_tables(fit)
    assert len(plans) == 1 + len(data["groups"])
    assert ["grid_exchange", "2200"] in [line[:2] for line in constants]
    # Where another clock rate was measured, cycles are its cycles.
    faster = sweep.fit({**data, "rate": 2 * true["cycles_per_microsecond"]})["constants"]
    assert faster["grid_exchange"] == pytest.approx(2 * true["grid_exchange"], rel=0.25)


def test_without_times_nothing_is_fitted():
    fit = sweep.fit({"spec": SPEC, "groups": {}, "found": {"a/grid": {"problem": "hung"}}})
    assert fit["constants"] == _C.cuda_model() and fit["groups"] == {}


def test_an_old_result_can_be_fitted_again(tmp_path, capsys):
    data = {"sweep": invented(_C.cuda_model(), every=20)}
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    assert main(["fit", str(tmp_path / "gpu.json")]) == 0
    assert "error of a plan's time" in capsys.readouterr().out


# Microbenchmarks


@pytest.fixture(scope="module")
def emulated_library():
    from emulator import build

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(micro.PATH, str(build("plain", "micro.so")))
        yield micro.Library()


def test_microbenchmarks_end_and_receive_what_was_sent(emulated_library):
    """Every kernel, with the emulator's checks of what the PTX ISA demands."""
    runs = list(micro.runs(repeats=3, largest=4))
    assert len({m.id for m in micro.runs()}) == len(list(micro.runs()))
    assert {m.kernel for m in runs} < {m.kernel for m in micro.runs(largest=16)}
    assert {m.cluster for m in micro.runs()} == {1, 2, 4, 8, 16}
    assert {m.cluster for m in micro.runs(clusters=False)} == {1}
    few = [micro.Micro(k, "", blocks=3, size=64, repeats=3) for k in ("flags", "data_words")]
    for m in [*runs, *few]:
        found = emulated_library.run(m)
        assert found["cycles"] > 0, m
    fits = micro.fitting(emulated_library, sizes=(1, 3), shared=(1024,), most=2)
    assert fits == {"clusters": {"1024": [132, 44]}, "launched": {"1": None, "3": None}}
    lines = summary.clusters_table({**fits, "clusters": {"1024": [132, 66, 44]}})
    assert lines[-1] == ["3", "44", "accepted"] and lines[2][-1] == "not tried"


def test_a_microbenchmark_that_fails_says_so(emulated_library, capfd):
    with pytest.raises(RuntimeError, match="there is no such kernel"):
        emulated_library.run(micro.Micro("warp_drive", ""))
    with pytest.raises(RuntimeError, match="emulated launch failure"):  # st.async needs two blocks
        emulated_library.run(micro.Micro("exchange", "", size=1024, repeats=2))
    with pytest.raises(RuntimeError, match="emulated launch failure"):
        emulated_library.run(micro.Micro("flags", "", blocks=5000, size=64, repeats=2))


def test_a_microbenchmark_without_its_library(tmp_path, monkeypatch):
    monkeypatch.setenv(micro.PATH, str(tmp_path / "micro.so"))
    with pytest.raises(FileNotFoundError, match="benchmarks.gpu build"):
        micro.Library()


def test_microbenchmarks_compile(tmp_path):
    setup = setup_script()
    try:
        setup.find_nvcc() or pytest.skip("no nvcc (see setup.py for where it is looked for)")
    except SystemExit as error:
        pytest.skip(f"nvcc cannot be used: {error}")
    path = micro.build("8.0;9.0", tmp_path / "micro.so")
    library = ctypes.CDLL(str(path))  # it needs a driver to run, and none to be loaded
    library.micro_error.restype = ctypes.c_char_p
    assert library.micro_error(-1) == b"there is no such kernel"


# Canaries


def test_canaries_decide_for_the_package(monkeypatch):
    first, second, third = families.cuda_families()[:3]
    monkeypatch.delenv(process.CANARIES, raising=False)
    before = families.verify
    process.obey_canaries()
    assert families.verify is before  # no canary has run: the package checks for itself
    monkeypatch.setattr(families, "verify", lambda *of: "checked")  # restores both afterwards
    monkeypatch.setattr(families, "problem", lambda family, ops, device: "computed")
    found = {first.name: {"problem": "it hung"}, second.name: {"problem": None}}
    monkeypatch.setenv(process.CANARIES, canaries.verdicts(found))
    process.obey_canaries()
    assert families.verify(first.number, "fusedrnn", "cuda") == "failed as a canary"
    assert families.verify(second.number, "fusedrnn", "cuda") == ""
    assert families.problem(first, None, CPU) == "failed as a canary"
    assert families.problem(second, None, CPU) == "computed"
    assert families.verify(third.number, "fusedrnn", "cuda") == "checked"  # there was no time
    assert os.environ[cuda.SWITCH] == "verified"


def test_a_canary_that_crashes_leaves_the_others(tmp_path, monkeypatch):
    """Families that differ by the cell share a process; one that dies costs itself."""

    def compute(family, ops, device):
        if family.mode == "GRU":
            os.abort()
        return "is wrong" if family.mode == "LSTM" else None

    monkeypatch.setattr(canaries, "problem", compute)
    todo = [i for i in canaries.items(only="cluster") if "forward, TF32 tensor cores" in i["id"]]
    journal = supervise.Journal(tmp_path / "journal")
    canaries.run(todo, journal, "cpu")
    lines = supervise.read(tmp_path / "journal")
    found = {line["id"]: line for line in lines if "start" not in line}
    assert found.keys() == {i["id"] for i in todo} and len(todo) == 8
    for name, line in found.items():
        if "GRU" in name:
            assert line["problem"] == "the process died of SIGABRT"
        else:
            assert line["problem"] == ("is wrong" if "LSTM" in name else None)
    lines = canaries.verdicts(found).splitlines()
    assert [line for line in lines if line[0] == "-"] == [
        f"-{name}" for name in found if "GRU" in name or "LSTM" in name
    ]
    canaries.run(todo, supervise.Journal(tmp_path / "journal"), "cpu")  # nothing is left to do
    assert len(supervise.read(tmp_path / "journal")) == 16


def test_every_family_has_a_canary():
    items = canaries.items()
    assert sorted(i["number"] for i in items) == sorted(f.number for f in families.cuda_families())
    spec = {**SPEC, "clusters": tuple(SPEC["clusters"])}
    assert len(canaries.items(spec, "cluster LSTM")) == 5 * 2 * 2
    assert not canaries.items({**spec, "capability": 80}, "cluster LSTM")


# All of it


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    """Runs a part under the emulator: the exit code, and what it has found."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv(worker.PLAN, "")
    monkeypatch.setenv(process.CANARIES, "")  # which is gone afterwards, whatever a run sets
    monkeypatch.delenv(process.CANARIES)
    monkeypatch.delenv(cuda.SWITCH)
    monkeypatch.setattr(checks, "find", lambda program: None)

    def run(part, *options, faults="", only="cluster LSTM"):
        monkeypatch.setenv("FUSEDRNN_GPU_FAULTS", faults)
        monkeypatch.setenv("FUSEDRNN_GPU_ONLY", only)
        words = ["--part", str(part), "--out", str(tmp_path), "--device", "emulator", *options]
        code = main(words)
        return code, json.loads((tmp_path / "gpu.json").read_text())

    return run


TESTS = {
    **{"passed": 3, "failed": {}, "skipped": 0, "struck": 0, "skip_reasons": []},
    "incomplete": None,
}


def test_a_sweep_under_the_emulator(emulated, tmp_path, capsys):
    code, data = emulated(2, "--minutes", "4")
    text = capsys.readouterr().out
    assert code == 0, text
    assert data["commands"] == {
        "2": "python -m benchmarks.gpu --part 2 --device emulator --minutes 4"
    }
    assert data["sweep"]["planned"] == len(data["sweep"]["found"]) == 4
    assert all("seconds" in r["works"][0] for r in data["sweep"]["found"].values())
    assert {g["plans"] for g in data["sweep"]["fit"]["groups"].values()} == {2}
    assert "a dry run: no GPU" in text and "error of a plan's time" in text
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["gpu.json", "gpu.md", "logs-2.tar.gz"]
    with tarfile.open(tmp_path / "logs-2.tar.gz") as archive:
        assert "logs-2/sweep.jsonl" in archive.getnames()


@pytest.mark.slow  # it imports torch in one process after another
def test_families_that_fail_are_struck_out_of_everything(emulated, monkeypatch, capsys):
    """One hangs, one crashes, one raises, one computes nonsense; all else runs."""
    monkeypatch.setattr(checks, "SILENCE", 8.0)
    monkeypatch.setattr(checks, "tests", lambda folder, deadline: TESTS)
    faults = "\n".join(
        [
            "hang ^cluster.*rows=2,layers=2 LSTM forward float32",
            "die ^cluster.*layers=2 LSTM forward bfloat16",
            "fail ^cluster.*layers=1 LSTM forward float16",
            "lie ^cluster.*layers=2 LSTM backward float16",
        ]
    )
    code, data = emulated(1, "--minutes", "8", faults=faults)
    text = capsys.readouterr().out
    found = data["canaries"]["found"]
    assert code == 1 and len(found) == data["canaries"]["planned"] == 20, text
    wrong = {name: line["problem"] for name, line in found.items() if line["problem"]}
    for name, problem in {
        "cluster LSTM forward, FFMA, 2 rows, several layers a launch": "no answer within 8 s",
        "cluster LSTM forward, bfloat16, several layers a launch": "died of SIGABRT",
        "cluster LSTM forward, float16": "an illegal memory access",
        "cluster LSTM backward, float16, several layers a launch": "has an error of",
    }.items():
        assert problem in wrong.pop(name), (name, found[name])
    assert not wrong
    assert not summary.problems(data["micro"]["found"]) and data["micro"]["incomplete"] is None
    assert data["driver"]["found"]["clusters"]["launched"] == {"1": None, "2": None}

    # What hung once is not asked again.
    monkeypatch.setattr(points, "TRY", dataclasses.replace(points.TRY, neighbours=True))
    code, data = emulated(2, "--minutes", "8")
    assert code == 0  # part 1 failed, and this part knows
    records = data["sweep"]["found"]
    out = {name for name, r in records.items() if "failed as a canary" in r.get("left_out", "")}
    assert data["sweep"]["incomplete"] is None, data
    assert out == {
        "book-lstm-256x2/float32/forward/cluster,units=4,rows=2,layers=2,engine=ffma_narrow"
    }
    assert {"1", "2"} == set(data["commands"]) and len(data["canaries"]["found"]) == 20


@pytest.mark.slow
def test_targets_under_the_emulator(emulated, capsys, tmp_path):
    code, data = emulated(3, "--minutes", "8")
    text = capsys.readouterr().out
    assert code == 0, text
    assert len(data["targets"]["found"]) == data["targets"]["planned"] == 11
    assert "compute-sanitizer is not installed" in text and "ncu is not installed" in text
    lines = text.rstrip().splitlines()
    assert lines[-1].startswith("  bytes saved for backward") and lines[-1].endswith("dry run")
    assert "| bytes saved for backward |" in (tmp_path / "gpu.md").read_text()


def test_a_stage_that_breaks_off_leaves_the_others(emulated, monkeypatch, capsys):
    def broken(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr("benchmarks.gpu.__main__.Command._targets", broken)
    code, data = emulated(3)
    assert code == 1
    assert data["sanitizer"]["incomplete"] == "compute-sanitizer is not installed"
    assert data["profile"]["incomplete"] == "ncu is not installed"
    assert data["targets"]["incomplete"] == "OSError: no space left on device"
    assert capsys.readouterr().out.count("no space left on device") == 1


def test_the_command_needs_nothing_but_torch():
    program = "import sys\n"
    for package in ("rich", "matplotlib", "numpy", "pytest", "onnxruntime", "torch._dynamo"):
        program += f"sys.modules.setdefault({package!r}, None)\n"
    program += "import benchmarks.gpu.__main__, benchmarks.gpu.worker, benchmarks.gpu.smoke\n"
    # torch itself takes numpy where it is there, so it goes first.
    program = "import torch\n" + program
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=100)


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys):
    other = {"environment": {"gpu": "another GPU"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    emulator = ["--device", "emulator"]
    wrong = [
        ["--part", "4", *emulator],
        [*emulator],
        ["--part", "1", "--minutes", "0", *emulator],
        ["--part", "2", "--after", str(tmp_path / "none.json"), *emulator],
        ["--part", "2", "--after", str(tmp_path / "other.json"), *emulator],
    ]
    if not torch.cuda.is_available():
        wrong.append(["--part", "1"])
    for arguments in wrong:
        with pytest.raises(SystemExit) as exit:
            main(["--out", str(tmp_path / "new"), *arguments])
        assert exit.value.code == 2
    assert "this is None" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
