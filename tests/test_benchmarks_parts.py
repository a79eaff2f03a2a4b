"""The benchmarks: sweeps, the book's training loop, and every part from the command line."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
# The benchmarks are not installed, they belong to the clone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import machine, peers, sweeps, training, transforms
from benchmarks.__main__ import main
from benchmarks.cases import Case
from benchmarks.measure import Budget
from benchmarks.report import load

ROOT = Path(__file__).resolve().parent.parent
TINY = Budget(seconds=0.01, rounds=2, turn=0.0)
CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("small_machine")


def test_sweeps_change_one_thing_at_a_time(monkeypatch):
    monkeypatch.setattr(sweeps, "CPU_STEPS", 2)
    monkeypatch.setattr(sweeps.os, "sched_getaffinity", lambda process: {0})
    values = {"T": (3,), "B": (2,), "H": (16,), "L": (1, 2)}
    found = list(
        sweeps.points(sweeps.AXES, ["GRU"], ["inference"], [torch.float32], 1, CPU, TINY, values)
    )
    shapes = {(p.axis, p.value): p.row.shape for p in found}
    assert shapes["T", 3] == "GRU 256->256, T=3, B=32"
    assert shapes["B", 2] == "GRU 256->256, T=2, B=2"
    assert shapes["H", 16] == "GRU 16->16, T=2, B=32"
    assert shapes["L", 2] == "GRU 256->256 x2, T=2, B=32"
    threads = [p.row.threads for p in found if p.axis == "threads"]
    assert threads == [1]
    assert [sweeps.thread_counts(n) for n in (1, 2, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]
    assert {p.row.threads for p in found if p.axis != "threads"} == {1}
    assert all(p.row.floor_seconds > 0 and p.row.results[1].seconds for p in found)


def test_the_book_s_loop_trains_both_alike():
    job = Case("book", "GRU", 28, 16, layers=1, steps=35, batch=32, input_grad=False)
    found = next(iter(training.train([job], [1], CPU, TINY)))
    assert found.problem is None and found.epochs >= 2
    assert all(10 < p < 28 for p in found.perplexity)  # it has learned something
    assert found.perplexity[0] == pytest.approx(found.perplexity[1], rel=1e-3)
    assert all(speed > 0 for speed in found.tokens_per_second)


def test_the_book_s_loop_tells_when_they_part(monkeypatch):
    def wrong(model):
        with torch.no_grad():
            model.linear.bias += 1.0 * torch.arange(28)

    monkeypatch.setattr(training.fusedrnn, "swap", wrong)
    job = Case("book", "GRU", 28, 16, layers=1, steps=35, batch=32, input_grad=False)
    assert "perplexities are" in next(iter(training.train([job], [1], CPU, TINY))).problem


def test_corpora_have_the_vocabulary_of_their_jobs():
    for job in training.JOBS:
        corpus = training.corpus_of(job)
        assert len(corpus) == training.TOKENS
        assert corpus.min() >= 0 and corpus.max() < job.input_size
        assert corpus.unique().numel() > 20


# From the command line


def test_quick_run_writes_json_and_plots(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "--quick", "--case", "streaming-lstm-256"]
    command += ["--cell=LSTM", "--threads=1", "--device=cpu", "--seconds=0.01"]
    run = subprocess.run(
        [*command, f"--out={tmp_path / 'new/run.json'}", f"--plots={tmp_path / 'plots'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "streaming-lstm-256x2" in run.stdout

    (made,) = load(tmp_path / "new/run.json")
    assert made.command == (
        "python -m benchmarks --case streaming-lstm-256 --cell LSTM --threads 1 --device cpu "
        "--seconds 0.01 --quick"
    )
    assert made.environment["torch"] == torch.__version__
    assert made.environment.keys() >= {"cpu", "isa", "date", "commit", "fusedrnn", "gpu"}
    assert [row.mode for row in made.rows] == ["training", "inference"]
    for row in made.rows:
        assert (row.dtype, row.threads, row.device) == ("float32", 1, "cpu")
        assert row.matmul_flops > 1e8 and row.bandwidth > 1e8
        assert row.noise.lower <= row.noise.median <= row.noise.upper
        assert [result.peer for result in row.results] == ["torch.nn", "fusedrnn"]
        for result in row.results:
            assert result.problem is None
            assert result.seconds.count >= 2
            speed = pytest.approx(1 / result.seconds.median, rel=1e-4)
            assert result.tokens_per_second == speed
            assert 0 < result.matmul_fraction < 10 and 0 < result.bandwidth_fraction < 10
            assert result.verdict in ("tie", "faster", "slower")
        assert row.results[0].speedup.median == 1

    assert {path.name for path in (tmp_path / "new").iterdir()} == {"run.json"}
    plots = {f"faster-float32-1-threads.{ending}" for ending in ("png", "svg")}
    assert {path.name for path in (tmp_path / "plots").iterdir()} == plots


def test_all_parts_run_from_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "JOBS", training.JOBS[:1])
    monkeypatch.setattr(sweeps, "CPU_STEPS", 2)
    monkeypatch.setitem(sweeps.CPU_VALUES, "L", (1, 2))
    arguments = ["--case=streaming-rnn-256", "--cell=RNN", "--dtype=float32", "--mode=inference"]
    arguments += ["--threads=1", "--device=cpu", "--seconds=0.01", "--sweep=L"]
    arguments += [
        "--part=cases,sweeps,training",
        "--peer=cell loop",
        f"--out={tmp_path / 'run.json'}",
    ]
    assert main(arguments) == 0
    (report,) = load(tmp_path / "run.json")
    assert [r.peer for r in report.rows[0].results] == ["torch.nn", "cell loop"]
    assert [p.value for p in report.sweeps] == [1, 2]
    assert [t.job for t in report.training] == ["book-rnn-256"]
    assert main([f"--from={tmp_path / 'run.json'}", f"--plots={tmp_path}"]) == 0
    assert (tmp_path / "sweep-rnn-inference-float32.svg").is_file()


def test_quiet_and_busy_machines_are_two_runs_of_a_command(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(machine, "kept_busy", lambda n: kept.append(n) or contextlib.nullcontext())
    monkeypatch.setattr(peers, "absent", lambda questions: ["gone (package)"])
    out = tmp_path / "run.json"
    arguments = ["--case=streaming-rnn-64", "--dtype=float32", "--mode=inference", "--threads=1"]
    arguments += ["--device=cpu", "--seconds=0.01", "--busy=0,1", f"--out={out}"]
    monkeypatch.setattr(peers, "PEERS", peers.PEERS[:2])
    assert main(arguments) == 0
    runs = load(out)
    assert kept == [run.busy for run in runs] == [0, 1]
    assert all("--busy 0,1" in run.command for run in runs)
    assert [run.environment["absent"] for run in runs] == [["gone (package)"]] * 2


@pytest.mark.parametrize(
    "arguments",
    [
        "--mode=train",
        "--threads=0",
        "--seconds=nan",
        "--dtype=int8",
        "--case=tetris",
        "--peer=keras",
        "--part=all",
        "--sweep=Q",
        "--cell=Elman",
        "--device=abacus",
        "--compare=/no/such/file.json",
        "--out=results",
        "--busy=-1",
        "--busy=all",
    ],
)
def test_unusable_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main([arguments])
    assert exit.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_an_unknown_device_is_one_sentence(capsys):
    with pytest.raises(SystemExit):
        main(["--device", "foo"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("error: torch has no device 'foo': write cpu or cuda")


def test_transforms(tmp_path, capsys):
    """Prints a line for each implementation of a job; what is wrong is not timed."""
    out = tmp_path / "results" / "transforms.json"
    options = ["--job", "cell", "--job", "batched", "--seconds", "0.01", "--out", str(out)]
    transforms.main(options)
    saved = json.loads(out.read_text())
    assert {line["job"] for line in saved["lines"]} == {"cell", "batched gradients"}
    assert all(line["seconds"]["median"] > 0 for line in saved["lines"])
    small = transforms.Ensemble(2, "GRU", (3, 4), 5, 2)
    job = transforms.Job("e", str(small), partial(transforms.ensemble, small, True))
    transforms.check(job, job.peers(torch.float32))
    printed = capsys.readouterr().out
    assert "vmap, fusedrnn" in printed and "LSTMCell 64->128, 32 inputs" in printed

    wrong = {"right": lambda: [torch.ones(2)], "wrong": lambda: [torch.tensor([1.0, 1.1])]}
    with pytest.raises(AssertionError, match="a job, wrong: off by 1.0e-01"):
        transforms.check(transforms.Job("a job", "", lambda dtype: wrong), wrong)


@pytest.mark.parametrize("name", ["jacobian", "Hessian"])
def test_transforms_of_states(name, monkeypatch):
    monkeypatch.setattr(transforms, "STATE", ("GRU", (3, 4)))
    job = next(job for job in transforms.JOBS if job.name == name)
    transforms.check(job, job.peers(torch.float32))
