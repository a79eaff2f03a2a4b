"""The GPU command without a GPU: canaries, and whole runs on a CPU.

Whole runs use the emulator (tests/emulator/stand_in.py), with kernels that fail, hang, crash and
compute nonsense on purpose.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
from test_gpu_figures import SPEC

from fusedrnn import cuda, families

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu import canaries, checks, points, process, summary, supervise, worker
from benchmarks.gpu.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


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
