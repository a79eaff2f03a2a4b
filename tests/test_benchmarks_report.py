"""The output of the benchmarks: files, tables, pages, plots, and changes between runs."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import compact, compare, machine, pages, plots, tables
from benchmarks.__main__ import main
from benchmarks.measure import Summary
from benchmarks.report import Report, latest, load, save
from benchmarks.suite import Result, Row
from benchmarks.sweeps import Point
from benchmarks.training import Training

ENVIRONMENT = machine.environment(__import__("torch").device("cpu"))


def around(median: float, by: float = 1.02) -> Summary:
    return Summary(median, median / by, median * by, 9)


def row(case="a|b", speed=2.0, problem=None, noise=1.01, **changes) -> Row:
    """A row in which fusedrnn is `speed` times as fast as torch.nn."""
    reference = Result("torch.nn", None, around(0.01), 1000.0, around(1.0), "tie", 0.25, 0.1, 0.001)
    ours = Result("fusedrnn", problem=problem)
    if problem is None:
        seconds = around(0.01 / speed)
        verdict = "faster" if speed > 1 else "slower"
        ours = Result(
            "fusedrnn", None, seconds, 1e3 * speed, around(speed), verdict, 0.5, 0.2, 1e-4
        )
        ours = dataclasses.replace(ours, saved_bytes=4000, error=0.9)
    made = Row(case, "GRU 1->2", "training", "float32", 1, "cpu", 5e9, around(1.0, noise))
    made = dataclasses.replace(made, results=[reference, ours], bandwidth=7e9, floor_seconds=1e-3)
    return dataclasses.replace(made, **changes)


def with_ours(made: Row, **changes) -> Row:
    reference, ours = made.results
    return dataclasses.replace(made, results=[reference, dataclasses.replace(ours, **changes)])


def report(*rows: Row, **changes) -> Report:
    return Report({**ENVIRONMENT, **changes}, "a command", list(rows))


# Tables and pages


def test_there_is_a_table_for_each_mode_and_number_of_threads():
    rows = [row(), row(problem="bad"), row(threads=2), row(mode="inference")]
    text = pages.page(report(*rows))
    titles = [line for line in text.splitlines() if line.startswith("**")][:3]
    assert titles == [
        "**Training, float32, 1 thread, product rate 5 GFLOP/s, bandwidth 7 GB/s**",
        "**Training, float32, 2 threads, product rate 5 GFLOP/s, bandwidth 7 GB/s**",
        "**Inference, float32, 1 thread, product rate 5 GFLOP/s, bandwidth 7 GB/s**",
    ]
    assert "Made by `a command`." in text
    good = "| a\\|b | 1,000 | 2,000 | 2.00 (1.96..2.04) | 100 | 50% | 0.99..1.01 |"
    assert good in text
    assert "| a\\|b | 1,000 | wrong: bad |  |  |  | 0.99..1.01 |" in text


def test_the_ratio_of_saved_bytes_is_a_column_where_there_are_any():
    assert "saved" not in tables.headlines([row()])[0].header
    made = row()
    made.results[0] = dataclasses.replace(made.results[0], saved_bytes=10_000)
    table = tables.headlines([made])[0]
    assert table.cells[0][table.header.index("saved")] == "0.40"


def test_other_implementations_have_a_table_of_ratios():
    made = row("b")
    loop = dataclasses.replace(made.results[1], peer="cell loop", speedup=around(0.5))
    made.results.extend([loop, Result("ONNX Runtime", problem="bad")])
    assert "| case | fusedrnn | cell loop | ONNX Runtime |" in pages.page(report(made))
    assert "| b | 2.00 | 0.50 | wrong: bad |" in pages.page(report(made))
    assert tables.others([row()]) == []


def test_no_line_of_text_on_a_page_is_long():
    made = report(row(), row("b"), cpu="a very long name of a processor " * 5)
    text = pages.page(dataclasses.replace(made, command="python -m benchmarks " + "--case x " * 30))
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 100


def test_a_table_has_the_geometric_mean_of_what_was_measured():
    rows = [row("a", speed=1.0), row("b", speed=4.0), row("c", problem="bad")]
    assert tables.headlines(rows)[0].title.endswith("geometric mean 2.00 times as fast")


def test_a_tie_is_called_one_and_empty_columns_are_left_out():
    tie = with_ours(row(speed=1.01), verdict="tie")
    table = tables.headlines([tie])[0]
    assert "tie, 1.01 (0.99..1.03)" in table.cells[0]
    assert "graph" not in table.header
    replayed = with_ours(tie, graph_speedup=around(3.0))
    assert "graph" in tables.headlines([replayed])[0].header


@pytest.mark.parametrize("width", [40, 80, 300])
def test_terminal_tables_keep_what_matters_and_fit(width, capsys):
    from rich.console import Console

    console = Console(width=width)
    rows = [row("stack-lstm-1024x4"), row("flashrnn-lstm-768", problem="x " * 60)]
    for table in tables.headlines(rows) + tables.details(rows):
        console.print(table.rich(width))
    text = capsys.readouterr().out
    assert "wrong:" in text and "case" in text
    assert ("GRU 1->2" in text) == (width == 300)
    if width >= 80:
        assert max(map(len, text.splitlines())) <= width
        assert "2.00 (1.96..2.04)" in text and "stack-lstm-1024x4" in text


def test_the_grid_is_one_table_of_cells_and_sizes():
    points = [row(f"grid-gru-h{size}-b{batch}") for size, batch in ((8, 1), (8, 64), (32, 64))]
    wrong = row("grid-lstm-h8-b1", problem="y is off")
    text = pages.page(Report(ENVIRONMENT, "c", [row("book-gru-256"), *points, wrong], [], []))
    assert (
        "| cell, H | B=1 | B=64 |\n| --- | ---: | ---: |\n| GRU 8 | 2.00 | 2.00 |\n"
        "| GRU 32 |  | 2.00 |\n| LSTM 8 | wrong: y is off |  |"
    ) in text
    assert "grid-" not in text and text.count("book-gru-256") == 1


def test_training_stands_beside_what_others_reported():
    job = Training(
        "book-lstm-256x2", "LSTM", 2, "cpu", [10.0, 20.0], [5.0, 5.0], 3, around(2.0), "faster"
    )
    bad = dataclasses.replace(job, job="book-rnn-1027-256", problem="they part")
    text = tables.training([job, bad])[0].markdown()
    assert "reported" in text
    assert "| 10 | 20 | 2.00 (1.96..2.04) | 224,250, 116,174 |" in text
    assert "wrong: they part" in text
    page = pages.page(Report(ENVIRONMENT, "c", [], [], [job]))
    assert "| book-lstm-256x2 | 10 | 20 | 2.00 (1.96..2.04) | 224,250, 116,174 |" in page


def test_a_sweep_is_a_table_of_times():
    points = [Point("T", n, row(shape="LSTM 1->2")) for n in (8, 32)]
    (table,) = tables.sweeps(points)
    assert table.title == "sweep of LSTM, training, float32"
    assert table.cells[1] == ["T=32", "10", "5", "1", "2.00 (1.96..2.04)", "0.99..1.01"]


# Files


def test_saved_runs_are_read_back(tmp_path):
    job = Training("j", "LSTM", 2, "cpu", [10.0, 20.0], [5.0, 5.0], 3, around(2.0), "faster")
    rows = [row(), row(problem="bad"), row(noise=float("inf"))]
    full = Report(ENVIRONMENT, "c", rows, [Point("T", 8, row())], [job])
    save([full, report(row())], tmp_path / "r.json")
    first, second = load(tmp_path / "r.json")
    assert [pages.page(r) for r in (first, second)] == [pages.page(full), pages.page(report(row()))]
    assert first.sweeps[0].row.results[1].speedup.median == 2.0
    assert first.environment == json.loads(compact.dumps(ENVIRONMENT, 1))
    save([first, second], tmp_path / "again.json")
    assert load(tmp_path / "again.json") == [first, second]
    (tmp_path / "other.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="holds no runs"):
        load(tmp_path / "other.json")


def test_a_row_is_a_line_of_its_file(tmp_path):
    save([report(row(), row("c")), report(row("d"))], tmp_path / "r.json")
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert [sum(f'"case": "{case}"' in line for line in lines) for case in ("a|b", "c", "d")] == [
        1,
        1,
        1,
    ]
    assert not any("null" in line for line in lines if '"case"' in line)


def test_json_is_spread_to_a_depth_and_rounded():
    text = compact.dumps({"a": [{"b": [1.23456789, 2]}], "c": {}, "d": (1,)}, 2)
    assert text == '{\n "a": [\n  {"b": [1.23457, 2]}\n ],\n "c": {},\n "d": [\n  1\n ]\n}\n'
    assert json.loads(text) == {"a": [{"b": [1.23457, 2]}], "c": {}, "d": [1]}


def test_a_later_run_replaces_the_rows_that_it_measured_again(tmp_path):
    old, new = report(row("a"), row("b")), report(row("b", speed=3.0))
    kept = latest([old, new])
    assert [[r.case for r in run.rows] for run in kept] == [["a"], ["b"]]
    assert kept[1] == new
    assert latest([report(row("b")), new]) == [new]
    assert len(latest([old, report(row("b"), busy=1)])[0].rows) == 2  # not the same measurement
    for name, run in (("old", old), ("new", new)):
        save([run], tmp_path / f"{name}.json")
    files = [f"--from={tmp_path / name}.json" for name in ("old", "new")]
    assert main([*files, f"--out={tmp_path / 'both.json'}"]) == 0
    assert [len(run.rows) for run in load(tmp_path / "both.json")] == [1, 1]


def test_wrong_rows_are_the_exit_code(tmp_path, capsys):
    for problem, code in ((None, 0), ("bad", 1)):
        save([report(row(problem=problem))], tmp_path / "r.json")
        assert main(["--from", str(tmp_path / "r.json")]) == code
    assert "INCORRECT: a|b, training, float32: fusedrnn: bad" in capsys.readouterr().out
    # A failure of another implementation does not count.
    other = row()
    other.results.append(Result("torch.compile", problem="bad"))
    save([report(other)], tmp_path / "r.json")
    assert main(["--from", str(tmp_path / "r.json")]) == 0


def test_figures_are_the_same_for_the_same_report(tmp_path):
    points = [Point(axis, n, row(shape="LSTM 1->2")) for axis in ("T", "L") for n in (1, 4)]
    on_gpu = [dataclasses.replace(p, row=dataclasses.replace(p.row, device="cuda")) for p in points]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        made = Report(ENVIRONMENT, "c", [row(), row("c", problem="bad")], points)
        names = plots.save([made], tmp_path / folder)
        assert names == ["faster-float32-1-threads", "sweep-lstm-training-float32"]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    labels = [axes.get_legend_handles_labels()[1] for axes in plots.growth(on_gpu).axes]
    assert labels[0] == ["torch.nn", "fusedrnn", "floor"]
    assert labels[1] == [*labels[0], "T + L - 1 steps"]
    pipeline = plots.growth(on_gpu).axes[1].lines[3]
    steps = 0.005 / 1e-4
    assert list(pipeline.get_ydata()) == pytest.approx([5.0, 5.0 * (steps + 3) / steps])


# The documentation


def test_pages_are_made_of_the_committed_results():
    """The pages hold what the tool would write: figures are not edited by hand."""
    if (pages.ROOT / "PKG-INFO").exists():
        pytest.skip("an sdist leaves the results out")
    text = (pages.ROOT / "README.md").read_text()
    assert pages.readme(text) == text
    assert pages.results() == (pages.ROOT / "docs/results.md").read_text()


def folder_of(tmp_path, **files):
    """A clone with these files of results, for `write_docs`."""
    (tmp_path / "docs").mkdir()
    (tmp_path / pages.RESULTS).mkdir(parents=True)
    marks = ("figures", "benchmarks")
    text = "".join(f"before\n<!-- {m} -->\nold\n<!-- /{m} -->\nafter\n" for m in marks)
    (tmp_path / "README.md").write_text(text)
    for name, runs in files.items():
        save(runs, tmp_path / pages.RESULTS / f"{name}.json")
    pages.write_docs(tmp_path)
    return [(tmp_path / page).read_text() for page in ("README.md", "docs/results.md")]


def test_docs_are_written_from_files_of_results(tmp_path):
    few = [row("few", threads=2), row(dtype="bfloat16"), row(mode="forward")]
    lstm = {"shape": "LSTM 64->256", "mode": "inference"}
    rows = [row("book-gru"), row("a-gru"), row("a-lstm", speed=0.5, shape="LSTM 1->2")]
    rows += [row("speech-lstm-256", speed=14), row("book-gru", speed=4, **lstm), row("a", **lstm)]
    job = Training("j", "LSTM", 1, "cpu", [10.0, 20.0], [5.0, 5.0], 3, around(2.4), "faster")
    run = dataclasses.replace(report(*rows, *few), training=[job])
    readme, results = folder_of(tmp_path, mine=[run], older=[report(row("other"), date="1999")])
    assert "## mine" in results and "**Forward, float32" in results
    assert "other" in results and "| few | GRU 1->2 |" in results
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "**2.3 times as fast in training, 2.8 in inference**: geometric means of 4" in readme
    assert "**14 times as fast in training on packed sequences**" in readme
    assert "**2.4 to 2.4 times as fast over the training loops**" in readme
    assert "| book-gru | GRU 1->2 | 1,000 | 2,000 | 2.00 | 4.00 |" in readme
    assert "| a-lstm | LSTM 1->2 | 1,000 | 500 | 0.50 |  |" in readme
    assert "from 0.50 (a-lstm) to 14.00 (speech-lstm-256)" in " ".join(readme.split())
    assert not any(word in readme for word in ("forward", "bfloat16", "few", "a-gru", "other"))


def test_figures_of_a_busy_machine_say_so_and_stay_out_of_the_readme(tmp_path):
    rows = [row("book-a"), row("book-b"), row("book-a", mode="inference")]
    busy = report(*(dataclasses.replace(r, case="busy") for r in rows), date="9999", busy=1)
    readme, results = folder_of(tmp_path, quiet=[report(*rows)], busy=[busy])
    assert "book-a" in readme and "busy" not in readme
    assert "1 of them kept busy by other processes" in results


def both_modes(*names, **changes):
    return [row(name, mode=mode, **changes) for name in names for mode in ("training", "inference")]


def test_a_newer_run_of_one_mode_keeps_the_columns_of_the_other(tmp_path):
    job = Training("j", "LSTM", 1, "cpu", [10.0, 20.0], [5.0, 5.0], 3, around(2.4), "faster")
    old = dataclasses.replace(
        report(*both_modes("book-gru-256", "book-rnn-256"), date="2001", commit="c0ffee"),
        training=[job],
    )
    grid = report(row("grid-gru-h8-b1"), date="2000", commit="d00d")  # none of it is shown
    busy = report(*both_modes("book-gru-256", speed=9.0), date="2004", busy=1)
    again = row("book-gru-256", mode="inference", speed=4.0)
    new = report(again, date="2003", commit="facade")
    new = dataclasses.replace(new, command="another command")
    # Rows of one mode make a machine no newer.
    late = report(row("book-other", mode="inference", speed=8.0), date="2005", cpu="abacus")
    older = report(*both_modes("book-other"), date="1999", cpu="abacus")
    newest = report(*both_modes("book-other"), date="2002", cpu="abacus")
    folder, mine = tmp_path / "a", latest([grid, old, busy, new])
    folder.mkdir()
    readme, _ = folder_of(folder, mine=mine, other=latest([older, late]))
    # In the order of the cases, not of the runs.
    assert "| book-rnn-256 | GRU 1->2 | 1,000 | 2,000 | 2.00 | 2.00 |\n| book-gru-256" in readme
    assert "| book-gru-256 | GRU 1->2 | 1,000 | 2,000 | 2.00 | 4.00 |" in readme
    assert "**2.0 times as fast in training, 2.8 in inference**: geometric means of 2" in readme
    assert "**2.4 to 2.4 times as fast over the training loops**" in readme
    text = " ".join(readme.split())
    assert "All 2 cases: geometric mean 2.00 in training" in text
    assert "at facade" in text and "2003; other rows: torch" in text
    assert "at c0ffee" in text and "2001. [Results](docs/results.md) has the commands." in text
    assert text.count(ENVIRONMENT["cpu"]) == 2  # of the figures, and of the table
    assert not any(word in text for word in ("d00d", "abacus", "book-other", "9.00"))
    folder = tmp_path / "b"
    folder.mkdir()
    readme, _ = folder_of(folder, mine=latest([old, new]), other=[newest])
    assert "abacus" in readme and ENVIRONMENT["cpu"] not in readme


def test_the_readme_says_of_which_cases_and_peers_its_rows_are(tmp_path):
    old = report(*both_modes("book-a", "book-b"), date="2001", absent=["JAX (jax)", "TVM (tvm)"])
    extra = [row("book-c", mode="inference"), row("book-d", mode="inference", problem="bad")]
    new = report(*(with_peer(r, "JAX", 2.0) for r in extra), date="2002")
    readme, _ = folder_of(tmp_path, mine=[old, new])
    text = " ".join(readme.split())
    assert "geometric means of 2 training and 3 inference cases" in text
    assert "All 2 training and 3 inference cases: geometric mean 2.00 in training" in text
    assert "| book-c | GRU 1->2 |  |  |  | 2.00 |" in readme  # no speed in inference by mistake
    assert "Also measured in some rows: JAX." in text
    assert "Not installed, and not measured: TVM (tvm)." in text


def test_results_of_the_gpu_command_have_their_own_tables(tmp_path):
    data = {"environment": {**ENVIRONMENT, "gpu": "a GPU"}, "commands": {"1": "gpu it"}}
    (tmp_path / pages.RESULTS).mkdir(parents=True)
    (tmp_path / pages.RESULTS / "gpu.json").write_text(compact.dumps(data, 3))
    assert "Made by `gpu it`." in pages.results(tmp_path)
    assert pages.readme_table(tmp_path) == "" == pages.figures(tmp_path)


@pytest.mark.parametrize("text", ["", "<!-- here -->", "<!-- /here --> <!-- here -->"])
def test_a_readme_without_its_marks_is_refused(text):
    with pytest.raises(ValueError, match="expected one '<!-- here -->'"):
        pages.fill(text, "here", "")


def with_peer(made: Row, peer: str, lead: float, noise: float = 1.02) -> Row:
    """A row in which ours is `lead` times as fast as `peer`."""
    other = Result(
        peer, None, around(0.01), 1000.0, around(1.5), "faster", lead=around(lead, noise)
    )
    return dataclasses.replace(made, results=[*made.results, other])


def test_implementations_that_are_ahead_are_named_in_the_readme(tmp_path):
    rows = [
        with_peer(row("a-gru"), "ONNX Runtime", 0.8),
        with_peer(row("b-gru"), "OpenVINO", 0.8, noise=1.5),  # a tie
        with_peer(row("book-a"), "torch int8", 1.3),
        with_peer(row("book-a", mode="inference"), "OpenVINO", 1.3),
    ]
    run = report(*rows, absent=["JAX (jax)"])
    readme, results = folder_of(tmp_path, mine=[run])
    assert "| a-gru | GRU 1->2 | 1,000 | 2,000 | 2.00, ONNX Runtime 1.25 |" in readme
    assert "b-gru" not in readme  # which only shows the book's, LSTMs and those
    assert "| book-a | GRU 1->2 | 1,000 | 2,000 | 2.00 | 2.00 |" in readme
    assert "Also measured: ONNX Runtime, OpenVINO, torch int8." in " ".join(readme.split())
    for page in (readme, results):
        assert "Not installed, and not measured: JAX (jax)." in page
    assert "| ONNX Runtime 1.25 |" in results


# Changes


def test_only_what_moves_beyond_the_noise_is_a_change():
    def moved(old, new):
        return [(c.what.rpartition(", ")[2], c.regression) for c in compare.changes([old], [new])]

    assert moved(report(row(speed=2.0)), report(row(speed=2.04))) == []
    assert moved(report(row(speed=2.0)), report(row(speed=1.5))) == [("speed", True)]
    assert moved(report(row(speed=2.0)), report(row(speed=3.0))) == [("speed", False)]
    # A noisy machine, then or now, proves nothing.
    assert moved(report(row(speed=2.0, noise=1.5)), report(row(speed=1.5))) == []
    assert moved(report(row(speed=2.0)), report(row(speed=1.5, noise=1.5))) == []
    wide = with_ours(row(speed=1.5), speedup=around(1.5, 1.3))
    assert moved(report(row(speed=2.0)), report(wide)) == []
    graphs = [report(with_ours(row(), graph_speedup=around(s))) for s in (4.0, 3.0)]
    assert moved(*graphs) == [("speed as a graph", True)]


def test_wrong_results_and_more_memory_are_regressions():
    good, bad = report(row()), report(row(problem="bad"))
    assert [(c.before, c.after, c.regression) for c in compare.changes([good], [bad])] == [
        ("correct", "bad", True)
    ]
    assert [c.regression for c in compare.changes([bad], [good])] == [False]
    assert compare.changes([bad], [bad]) == []
    more = report(with_ours(row(), saved_bytes=5000))
    assert [str(c) for c in compare.changes([good], [more])] == [
        "REGRESSION: a|b, training, float32, cpu, threads=1: fusedrnn, saved for backward: "
        "4,000 bytes -> 5,000 bytes"
    ]
    assert [c.regression for c in compare.changes([more], [good])] == [False]


def test_falling_behind_another_implementation_is_a_regression():
    ahead, tie, behind = (
        report(with_peer(row(), "ONNX Runtime", lead)) for lead in (1.2, 1.0, 0.9)
    )
    for old in (ahead, tie):
        assert [str(c) for c in compare.changes([old], [behind])] == [
            "REGRESSION: a|b, training, float32, cpu, threads=1: ours as a multiple of "
            f"ONNX Runtime: {old.rows[0].results[2].lead.median:.2f} -> 0.90"
        ]
    assert [c.regression for c in compare.changes([behind], [ahead])] == [False]
    assert compare.changes([ahead], [tie]) == compare.changes([behind], [behind]) == []
    assert compare.changes([report(row())], [behind]) == []  # not measured then


def test_runs_are_compared_with_runs_of_the_same_load():
    old = [report(row(speed=2.0)), report(row(speed=9.0), busy=1)]
    assert compare.changes(old, [report(row(speed=2.0))]) == []
    assert [c.after for c in compare.changes(old, [report(row(speed=3.0), busy=1)])] == ["3.00"]
    assert compare.unmatched(old, [report(row())]) == 1


def test_compare_exits_with_1_on_a_regression(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    save([report(row(speed=2.0), row("gone"), cpu="abacus")], old)
    for speed, code in ((2.0, 0), (3.0, 0), (1.0, 1)):
        save([report(row(speed=speed))], new)
        assert main(["--from", str(new), "--compare", str(old)]) == code
    text = " ".join(capsys.readouterr().out.split())
    assert "no change beyond the noise" in text
    assert "better: a|b, training, float32, cpu, threads=1: fusedrnn, speed: 2.00 -> 3.00" in text
    assert "REGRESSION: a|b" in text and "2.00 -> 1.00" in text
    assert "the runs differ in cpu: abacus" in text
    assert "rows of the old runs that were not measured now: 1" in text
    save([report(row("another"))], new)
    with pytest.raises(SystemExit) as exit:
        main(["--from", str(new), "--compare", str(old)])
    assert exit.value.code == 2 and "no row in common" in capsys.readouterr().err
