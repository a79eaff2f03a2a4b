"""The GPU command without a GPU: processes that die, verdicts, figures, a whole run on a CPU."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu import checks, points, summary, supervise, worker
from benchmarks.gpu.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def supervised(tmp_path, body, deadline=30.0, silence=10.0, **options):
    """Supervises a program that goes through the items a to d, and does `body` at each."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\n"
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
        open(journal._path, 'a').write('{"id": "b", "val')
        os._exit(9)
    """
    outcome = supervised(tmp_path, body)
    assert list(outcome.found) == list("abcd")
    assert "code 9" in outcome.found["b"]["problem"]


def test_a_silent_process_loses_its_item(tmp_path):
    outcome = supervised(tmp_path, "if item == 'c': time.sleep(60)", silence=2.0)
    assert list(outcome.found) == list("abcd") and outcome.incomplete is None
    assert outcome.found["c"]["problem"].startswith("no answer within 2 s")


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
    assert (found["passed"], found["skipped"]) == (2, 1)
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


def fake_sanitizer(folder, script):
    folder.mkdir(exist_ok=True)
    path = folder / "compute-sanitizer"
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_sanitizer_is_given_the_smoke_calls_and_every_backend(tmp_path, monkeypatch):
    """A stand-in that runs what it is given, and claims to have seen errors under one tool."""
    fake_sanitizer(
        tmp_path / "bin",
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
    assert verdicts.pop("racecheck/grid") == "errors"
    assert set(verdicts.values()) == {"clean"} and len(verdicts) == 8
    assert not summary.good({"sanitizer": found})


def test_a_backend_that_takes_no_such_shape_has_not_failed(tmp_path, monkeypatch):
    def refuse(layer, example):
        raise RuntimeError(f"fusedrnn: FUSEDRNN_PLAN=grid {points.UNFIT}\nand a stack trace")

    point = next(iter(points.latency(points.TRY, ("grid",))))
    (tmp_path / "points.json").write_text(json.dumps([point.as_json()]))
    monkeypatch.setitem(worker.BUILD, "fusedrnn", refuse)
    arguments = ["worker", str(tmp_path / "points.json"), str(tmp_path / "journal")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--device", "cpu"])
    assert worker.main() == 0
    found = {line["id"]: line for line in supervise.read(tmp_path / "journal")}
    assert points.UNFIT in found[point.id]["unfit"] and summary.problems(found) == {}
    table = summary.latency_table(found)
    assert table[1][:3] == ["float32", "8", "1"] and set(table[1][3:]) == {""}


def test_smoke_calls_every_cell_and_dtype(capsys, monkeypatch):
    from benchmarks.gpu import smoke

    monkeypatch.setattr(sys, "argv", ["smoke", "--device", "cpu"])
    assert smoke.main() == 0
    assert "smoke: 96 calls" in capsys.readouterr().out


# Points


def test_points_have_names_of_their_own_and_survive_json():
    for sizes in (points.CUDA, points.TRY):
        every = [*points.latency(sizes), *points.named(sizes), *points.grid(sizes)]
        assert len({p.id for p in every}) == len(every)
        for point in every[::37]:
            assert points.Point.of(json.loads(json.dumps(point.as_json()))) == point
    grid = points.grid(points.CUDA)
    assert len(grid) == 3 * 4 * 3 * 3 * 2 * 2 * 2
    assert [p.id for p in grid] == [p.id for p in points.grid(points.CUDA)]
    assert {p.backend for p in points.latency(points.CUDA)} == {None, *points.BACKENDS}
    hidden = {p.works[0].case.hidden_size for p in points.latency(points.CUDA)}
    assert hidden == {128, 256, 512, 768, 1024}


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
    assert clerk._not_ours("LSTM: torch.nn's own kernels, because ...", None)
    assert clerk._not_ours(
        "LSTM: torch.nn's own kernels, because forward would be stepwise", "grid"
    )
    assert (
        clerk._not_ours("LSTM: torch.nn's own kernels, because forward would be stepwise", None)
        is None
    )
    assert clerk._not_ours("LSTM: grid-persistent", "cluster")
    assert clerk._not_ours("LSTM: cluster-persistent", "cluster") is None
    assert clerk._not_ours("LSTM: cluster-persistent", None) is None


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
        "flashrnn/forward": record([1.0], [0.0019]),
        "flashrnn/training": record([1.0], [0.0051]),
        "step/plan/float32/256/32": record([1e-6], [2e-6], peers=["fusedrnn"] * 2, steps=[1, 2]),
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
        ("5.1 ms", "MISSED"),
        ("1 us", "met"),
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
        "command": "c",
        "targets": {"found": {"book": wrong}, "planned": 2, "grid": 0, "incomplete": None},
    }
    assert "book: error of output" in summary.text(data)
    assert "1 of 2 points, 1 of them with problems" in summary.text(data)
    assert not summary.good(data)
    data["targets"]["found"] = {"book": record([1.0], [1.0])}
    assert summary.good(data)
    skipped = {"passed": 0, "skipped": 3, "skip_reasons": ["no kernels"], "failed": {}}
    every = {**data, "tests": {**skipped, "incomplete": None}}
    assert not summary.good(every) and "3 skipped (no kernels)" in summary.text(every)
    data["targets"]["incomplete"] = "out of time"
    assert not summary.good(data) and "INCOMPLETE: out of time" in summary.text(data)


# All of it


@pytest.mark.slow  # it imports torch in one process after another
def test_every_stage_on_a_cpu(tmp_path, capsys, monkeypatch):
    """As on a GPU, but for the sizes: the real tests, which skip, and every backend."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(checks, "find_sanitizer", lambda: None)
    assert main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "6"]) in (0, 1)
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert len(data["latency"]["found"]) == data["latency"]["planned"] == 16
    assert data["latency"]["incomplete"] is data["targets"]["incomplete"] is None
    assert not data["tests"]["failed"], data["tests"]
    assert "GPU tests" in capsys.readouterr().out


def test_the_whole_command_on_a_cpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(
        "benchmarks.gpu.__main__.BACKENDS", ()
    )  # each is a process, like the plan's
    monkeypatch.setattr(
        "benchmarks.gpu.checks.tests",
        lambda folder, deadline: {
            "passed": 3,
            "failed": {},
            "skipped": 0,
            "skip_reasons": [],
            "incomplete": None,
        },
    )
    monkeypatch.setattr(checks, "find_sanitizer", lambda: None)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/latency-plan.jsonl").write_text(
        '{"id": "step/plan/float32/8/1"}\n'
    )  # an old run's
    code = main(["--out", str(tmp_path), "--device", "cpu", "--minutes", "3"])
    text = capsys.readouterr().out
    assert code == 0, text
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["command"] == "python -m benchmarks.gpu --device cpu --minutes 3"
    assert len(data["latency"]["found"]) == data["latency"]["planned"] == 4
    assert len(data["targets"]["found"]) == data["targets"]["planned"] == 20
    for found in (data["latency"]["found"], data["targets"]["found"]):
        assert not summary.problems(found)
        assert all("seconds" in work for r in found.values() for work in r["works"])
    assert "a dry run: no GPU" in text and "compute-sanitizer is not installed" in text
    lines = text.rstrip().splitlines()
    assert lines[-1].startswith("  bytes saved for backward") and lines[-1].endswith("dry run")
    assert "| bytes saved for backward |" in (tmp_path / "gpu.md").read_text()


def test_a_stage_that_breaks_off_leaves_the_others(tmp_path, monkeypatch, capsys):
    def broken(*arguments):
        raise OSError("no space left on device")

    monkeypatch.setattr(checks, "tests", broken)
    monkeypatch.setattr("benchmarks.gpu.__main__.Command._latency", broken)
    monkeypatch.setattr("benchmarks.gpu.__main__.Command._targets", broken)
    monkeypatch.setattr(checks, "find_sanitizer", lambda: None)
    assert main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert data["sanitizer"]["incomplete"] == "compute-sanitizer is not installed"
    for stage in ("tests", "latency", "targets"):
        assert data[stage]["incomplete"] == "OSError: no space left on device"
    assert capsys.readouterr().out.count("no space left on device") == 3


def test_the_command_needs_nothing_but_torch():
    program = "import sys\n"
    for package in ("rich", "matplotlib", "numpy", "pytest", "onnxruntime", "torch._dynamo"):
        program += f"sys.modules.setdefault({package!r}, None)\n"
    program += "import benchmarks.gpu.__main__, benchmarks.gpu.worker, benchmarks.gpu.smoke\n"
    # torch itself takes numpy where it is there, so it goes first.
    program = "import torch\n" + program
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=100)


def test_the_command_refuses_what_it_cannot_do(tmp_path, capsys):
    wrong = [["--only", "tests,dance"], ["--minutes", "0", "--device", "cpu"]]
    if not torch.cuda.is_available():
        wrong.append([])
    for arguments in wrong:
        with pytest.raises(SystemExit) as exit:
            main(["--out", str(tmp_path / "new"), *arguments])
        assert exit.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
