"""The benchmarks: their statistics, their check, and a short run from the command line on."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

pytest.importorskip("rich")
# The benchmarks are not installed, they belong to the clone.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import check, measure, report, suite
from benchmarks.__main__ import main
from benchmarks.cases import CASES, Case, select
from benchmarks.measure import Budget, Summary
from benchmarks.peers import PEERS, Peer

ROOT = Path(report.__file__).resolve().parent.parent
TINY = Budget(seconds=0.01, rounds=2, turn=0.0)
CPU = torch.device("cpu")
SMALL = [
    Case("gru", "GRU", 5, 24, layers=2, steps=6, batch=3, bidirectional=True),
    Case("lstm", "LSTM", 5, 24, layers=1, steps=9, batch=4, shortest=2),
    Case("rnn", "RNN", 5, 24, layers=1, steps=6, batch=3, input_grad=False),
]


def rows_of(peers, cases=SMALL, modes=suite.MODES, dtypes=(torch.float32,), threads=(1,)):
    return list(suite.rows(cases, modes, dtypes, threads, CPU, TINY, (PEERS[0], *peers)))


class Scripted:
    """Work that claims the times it was given, and notes in what order it was called."""

    def __init__(self, name, seconds, log):
        self.name, self.seconds, self.log = name, iter(seconds), log

    def __call__(self):
        self.log.append(self.name)
        return next(self.seconds)


# Statistics


def test_summary_is_the_median_and_the_quartiles():
    assert Summary.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Summary(3.0, 2.0, 4.0, 5)
    assert Summary.of([7.0]) == Summary(7.0, 7.0, 7.0, 1)


def test_speedup_is_the_median_of_paired_ratios():
    # A disturbed machine took ten times as long in the second round, for both.
    assert measure.speedup([2.0, 20.0, 2.0], [1.0, 10.0, 0.5]) == Summary(2.0, 2.0, 3.0, 3)
    with pytest.raises(ValueError):
        measure.speedup([1.0], [1.0, 2.0])


def test_turns_alternate_and_the_first_calls_do_not_count():
    log: list[str] = []
    works = [
        Scripted(name, [9.0, 9.0, *times], log)
        for name, times in (("a", [1.0, 2.0, 3.0]), ("b", [4.0, 5.0, 6.0]))
    ]
    times = measure.interleave(works, Budget(seconds=1e-9, rounds=3, turn=0.0))
    assert times == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert "".join(log) == "aabb" + "ab" + "ba" + "ab"


def test_short_work_is_repeated_within_its_turn():
    log: list[str] = []
    work = Scripted("a", [9.0, 0.25, 1.0, 2.0, 3.0, 4.0], log)
    assert measure.interleave([work], Budget(seconds=1e-9, rounds=1, turn=1.0)) == [[2.5]]


# Cases


def test_cases_have_names_of_their_own_and_are_selected_by_them():
    assert len({case.name for case in CASES}) == len(CASES)
    assert select([]) == list(CASES)
    assert {case.name for case in select(["packed", "gru-256"])} == {
        "packed-lstm-256",
        "book-gru-256",
    }
    with pytest.raises(ValueError, match="no case has 'tetris' in its name"):
        select(["gru", "tetris"])


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_operations_are_those_of_the_matrix_products(case):
    """Counted by torch for the same products, written out."""
    from torch.utils.flop_counter import FlopCounterMode

    inputs = torch.randn(case.tokens, case.input_size, requires_grad=case.input_grad)
    parameters = dict(case.module(torch.float32).named_parameters())
    with FlopCounterMode(display=False) as counter:
        for layer in range(case.layers):
            x = inputs
            if layer:
                width = case.hidden_size * case.directions
                x = torch.randn(case.tokens, width, requires_grad=True)
            for end in ["", "_reverse"][: case.directions]:
                h = torch.randn(case.tokens, case.hidden_size, requires_grad=True)
                y = x @ parameters[f"weight_ih_l{layer}{end}"].T
                (y + h @ parameters[f"weight_hh_l{layer}{end}"].T).sum().backward()
    assert case.flops(training=True) == counter.get_total_flops()
    assert 2 < case.flops(training=True) / case.flops(training=False) <= 3


def test_packed_lengths_span_their_range_and_quick_cases_are_short():
    case = select(["packed"])[0]
    assert (min(case.lengths), max(case.lengths), len(case.lengths)) == (50, 200, 32)
    assert case.lengths != sorted(case.lengths, reverse=True)
    assert max(case.shortened().lengths) <= 20 and case.shortened().shortest > 0
    assert case.data(torch.float32, CPU).input.data.shape == (case.tokens, 64)


# Check


def spoilt(spoil):
    """A peer that is torch.nn but for what `spoil` does to its module."""

    def build(layer):
        module = copy.deepcopy(layer)
        spoil(module)
        return module

    return Peer("spoilt", build)


def scale_output(module):
    def scale(m, args, result):
        y, state = result
        packed = isinstance(y, PackedSequence)
        return y._replace(data=y.data * 1.0001) if packed else y * 1.0001, state

    module.register_forward_hook(scale)


def lose_state(module):
    module.register_forward_hook(lambda m, args, result: (result[0], result[1][:0]))


def poison_state(module):
    def poison(m, args, result):
        y, state = result
        if isinstance(state, tuple):
            return y, (state[0] * math.nan, *state[1:])
        return y, state * math.nan

    module.register_forward_hook(poison)


def scale_gradient(module):
    module.weight_hh_l0.register_hook(lambda grad: grad * 1.0001)


def forget_gradient(module):
    module.bias_hh_l0.requires_grad_(False)


def fail(module):
    module.register_forward_hook(lambda m, args, result: torch.ones(2) @ torch.ones(3))


@pytest.mark.parametrize(
    "spoil", [scale_output, lose_state, poison_state, scale_gradient, forget_gradient, fail]
)
def test_wrong_peers_get_no_time(spoil):
    for row in rows_of([spoilt(spoil), PEERS[1]], modes=["training"]):
        reference, wrong, fused = row.results
        assert wrong == suite.Result("spoilt", problem=wrong.problem)
        assert wrong.problem
        assert reference.problem is None and fused.problem is None
        assert reference.seconds and fused.speedup
        assert "wrong: " in report.markdown(report.Report(report.environment(CPU), "c", [row]))


def test_inference_is_checked_on_its_own():
    def only_without_grad(module):
        def hook(m, args, result):
            return result if torch.is_grad_enabled() else (result[0] * 1.0001, result[1])

        module.register_forward_hook(hook)

    rows = rows_of([spoilt(only_without_grad)], SMALL[:1])
    assert [(row.mode, bool(row.results[1].problem)) for row in rows] == [
        ("training", False),
        ("inference", True),
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fused_passes_the_check(dtype):
    for case in SMALL:
        for training in (True, False):
            expected = check.expect(case, training, dtype, CPU)
            module = PEERS[1].build(case.module(dtype))
            unit = measure.Unit(module, case.data(dtype, CPU), training, case.input_grad)
            results = unit.results()
            assert check.problem(results, expected) is None
            assert ("grad x" in results) == (training and case.input_grad)
            assert ("grad weight_hh_l0" in results) == training
            del results["output"]
            assert check.problem(results, expected) == "no output"


# Rows


def test_a_slowed_peer_comes_out_slower():
    class Slowed(nn.GRU):
        def forward(self, *args):
            time.sleep(0.02)
            return super().forward(*args)

    def slow_down(module):
        module.__class__ = Slowed

    for row in rows_of([spoilt(slow_down)], SMALL[:1]):
        reference, slow = row.results
        assert slow.seconds.median > 0.02 > reference.seconds.median
        assert slow.speedup.median < 0.5 and slow.speedup.upper < 1
        assert slow.tokens_per_second < reference.tokens_per_second
        assert slow.matmul_fraction < reference.matmul_fraction


def test_rows_are_made_with_their_number_of_threads():
    seen = []

    def note_threads(module):
        module.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))

    before = torch.get_num_threads()
    rows = rows_of([spoilt(note_threads)], SMALL[:1], ["inference"], threads=[2, 1])
    assert [row.threads for row in rows] == [2, 1]
    assert sorted(seen, reverse=True) == seen and set(seen) == {1, 2}
    assert torch.get_num_threads() == before


# From the command line


def test_quick_run_writes_json_markdown_and_readme(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--case", "single", "--threads=1"]
    command += ["--seconds=0.01", f"--out={tmp_path / 'new' / 'out'}", f"--readme={readme}"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0, run.stderr
    assert "single-lstm-256x2" in run.stdout

    data = json.loads((tmp_path / "new/out/results.json").read_text())
    assert data["command"] == (
        "python -m benchmarks --case single --threads 1 --seconds 0.01 --quick"
    )
    assert data["environment"]["torch"] == torch.__version__
    assert data["environment"].keys() >= {"cpu", "isa", "date", "commit", "fusedrnn"}
    assert [row["mode"] for row in data["rows"]] == ["training", "inference"]
    for row in data["rows"]:
        assert (row["dtype"], row["threads"], row["device"]) == ("float32", 1, "cpu")
        assert row["matmul_flops"] > 1e8
        assert row["noise"]["lower"] <= row["noise"]["median"] <= row["noise"]["upper"]
        assert [result["peer"] for result in row["results"]] == ["torch.nn", "fusedrnn"]
        for result in row["results"]:
            assert result["problem"] is None
            assert result["seconds"]["count"] >= 2
            assert result["tokens_per_second"] == pytest.approx(20 / result["seconds"]["median"])
            assert 0 < result["matmul_fraction"] < 10
        assert row["results"][0]["speedup"]["median"] == 1

    text = (tmp_path / "new/out/results.md").read_text()
    assert (
        readme.read_text() == f"before\n{report.BEGIN}\n\n{text.strip()}\n\n{report.END}\nafter\n"
    )


def made_up(mode="training", threads=1, problem=None) -> suite.Row:
    s = Summary(2.0, 1.5, 2.5, 9)
    fused = suite.Result("fusedrnn", problem=problem)
    if problem is None:
        fused = suite.Result("fusedrnn", None, s, 1234.5, s, 0.5)
    reference = suite.Result("torch.nn", None, s, 1000.0, Summary(1, 1, 1, 9), 0.25)
    return suite.Row(
        "a|b",
        "GRU 1->2",
        mode,
        "float32",
        threads,
        "cpu",
        5e9,
        Summary(1, 0.9, 1.1, 9),
        [reference, fused],
    )


def test_markdown_has_a_table_for_each_mode_and_number_of_threads():
    rows = [made_up(), made_up(problem="bad"), made_up(threads=2), made_up("inference")]
    text = report.markdown(report.Report(report.environment(CPU), "a command", rows))
    titles = [line for line in text.splitlines() if line.startswith("**")]
    assert titles == [
        "**Training, float32, 1 thread, product rate 5 GFLOP/s**",
        "**Training, float32, 2 threads, product rate 5 GFLOP/s**",
        "**Inference, float32, 1 thread, product rate 5 GFLOP/s**",
    ]
    assert "Made by `a command`." in text
    line = "| a\\|b | GRU 1->2 | 1,000 | 1,234 | 2.00 (1.50..2.50) | 25%, 50% | 0.90..1.10 |"
    assert line in text
    assert "| a\\|b | GRU 1->2 | 1,000 | wrong: bad |  | 25%, none | 0.90..1.10 |" in text
    widths = {line.replace("\\|", "").count("|") for line in text.splitlines() if line[:1] == "|"}
    assert widths == {8}


def test_a_saved_report_is_read_back(tmp_path):
    saved = report.Report(report.environment(CPU), "c", [made_up(), made_up(problem="bad")])
    saved.save(tmp_path / "r.json")
    assert report.Report.load(tmp_path / "r.json") == saved


def test_wrong_rows_are_the_exit_code(tmp_path, capsys):
    for problem, code in ((None, 0), ("bad", 1)):
        rows = [made_up(problem=problem)]
        report.Report(report.environment(CPU), "c", rows).save(tmp_path / "r.json")
        assert main(["--from", str(tmp_path / "r.json")]) == code
    assert "wrong: bad" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "<!-- benchmarks -->", "<!-- /benchmarks --> <!-- benchmarks -->"]
)
def test_a_readme_without_its_markers_is_refused_before_measuring(text, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(["--readme", str(readme)])
    assert exit.value.code == 2
    assert "expected one '<!-- benchmarks -->'" in capsys.readouterr().err
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "arguments", ["--mode=train", "--threads=0", "--seconds=nan", "--dtype=int8", "--case=tetris"]
)
def test_unusable_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        main([arguments])
    assert exit.value.code == 2
    assert "Traceback" not in capsys.readouterr().err
