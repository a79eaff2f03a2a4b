"""What the benchmarks say of a run: tables, pages, plots, and what moved since another run."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import compare, machine, pages, plots, tables
from benchmarks.__main__ import main
from benchmarks.measure import Summary
from benchmarks.report import Report
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
    good = "| a\\|b | GRU 1->2 | 1,000 | 2,000 | 2.00 (1.96..2.04) | 100 | 50% | 0.99..1.01 |"
    assert good in text
    assert "| a\\|b | GRU 1->2 | 1,000 | wrong: bad |  |  |  | 0.99..1.01 |" in text
    assert "| a\\|b | fusedrnn | wrong: bad |" in text  # the table of every implementation


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


def test_the_grid_is_one_table_for_each_cell():
    points = [row(f"grid-gru-h{size}-b{batch}") for size, batch in ((8, 1), (8, 64), (32, 64))]
    wrong = row("grid-lstm-h8-b1", problem="y is off")
    text = pages.page(Report(ENVIRONMENT, "c", [row("book-gru-256"), *points, wrong], [], []))
    assert (
        "| GRU | B=1 | B=64 |\n| --- | ---: | ---: |\n| H=8 | 2.00 | 2.00 |\n| H=32 |  | 2.00 |"
        in text
    )
    assert "| LSTM | B=1 |\n| --- | ---: |\n| H=8 | wrong: y is off |" in text
    assert "grid-" not in text and text.count("book-gru-256") == 3  # a line, and one for each peer
    assert pages.headline(Report(ENVIRONMENT, "c", points, [], [])).count("GRU") == 0


def test_training_stands_beside_what_others_reported():
    job = Training(
        "book-lstm-256x2", "LSTM", 2, "cpu", [10.0, 20.0], [5.0, 5.0], 3, around(2.0), "faster"
    )
    bad = dataclasses.replace(job, job="book-rnn-1027-256", problem="they part")
    text = tables.training([job, bad])[0].markdown()
    assert "reported (other machines)" in text
    assert "| 10 | 20 | 2.00 (1.96..2.04) | 224,250, 116,174 |" in text
    assert "wrong: they part" in text
    assert "other machines" in pages.page(Report(ENVIRONMENT, "c", [], [], [job]))


def test_a_saved_report_is_read_back(tmp_path):
    job = Training("j", "LSTM", 2, "cpu", [10.0, 20.0], [5.0, 5.0], 3, around(2.0), "faster")
    saved = Report(ENVIRONMENT, "c", [row(), row(problem="bad")], [Point("T", 8, row())], [job])
    saved.save(tmp_path / "r.json")
    assert Report.load(tmp_path / "r.json") == saved
    (tmp_path / "other.json").write_text('{"rows": 3}')
    with pytest.raises(ValueError, match="not a report"):
        Report.load(tmp_path / "other.json")


def test_parts_of_one_run_are_put_together():
    whole = Report.join([report(row()), report(row("c"))])
    assert [r.case for r in whole.rows] == ["a|b", "c"]
    assert whole.command == "a command; a command"
    with pytest.raises(ValueError, match="differ in their torch"):
        Report.join([report(row()), report(row(), torch="0.1")])


def test_wrong_rows_are_the_exit_code(tmp_path, capsys):
    for problem, code in ((None, 0), ("bad", 1)):
        report(row(problem=problem)).save(tmp_path / "r.json")
        assert main(["--from", str(tmp_path / "r.json")]) == code
    assert "WRONG: a|b, training, float32: fusedrnn: bad" in capsys.readouterr().out
    # Another's failure is in its row, and nobody else's fault.
    other = row()
    other.results.append(Result("torch.compile", problem="bad"))
    report(other).save(tmp_path / "r.json")
    assert main(["--from", str(tmp_path / "r.json")]) == 0


def test_figures_are_the_same_for_the_same_report(tmp_path):
    points = [Point(axis, n, row(shape="LSTM 1->2")) for axis in ("T", "L") for n in (1, 4)]
    on_gpu = [dataclasses.replace(p, row=dataclasses.replace(p.row, device="cuda")) for p in points]
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        made = Report(ENVIRONMENT, "c", [row(), row("c", problem="bad")], points)
        names = plots.save(made, tmp_path / folder)
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
    """What the tool would write is what is there: nobody edits figures by hand."""
    if (pages.ROOT / "PKG-INFO").exists():
        pytest.skip("an sdist leaves the results out")
    readme = (pages.ROOT / "README.md").read_text()
    assert pages.fill(readme, pages.readme_tables()) == readme
    assert pages.results() == (pages.ROOT / "docs/results.md").read_text()


def test_docs_are_written_from_a_folder_of_results(tmp_path):
    folder = tmp_path / "benchmarks/results/cpu-mine"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    few = [row("few", threads=2), row(dtype="bfloat16"), row(mode="forward")]
    report(row(), row("b"), *few).save(folder / "results.json")
    (folder / "faster.svg").write_text("<svg/>")
    pages.write_docs(tmp_path)
    text = (tmp_path / "docs/results.md").read_text()
    assert "## cpu-mine" in text and "](../benchmarks/results/cpu-mine/faster.svg)" in text
    assert "**Forward, float32" in text
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("after\n") and "old" not in readme
    assert "**Training, float32, 1 thread" in readme
    assert not any(word in readme for word in ("Forward", "bfloat16", "2 threads"))


def test_figures_of_a_busy_machine_say_so_and_stay_out_of_the_readme(tmp_path):
    quiet = report(row("quiet"))
    busy = dataclasses.replace(
        report(row("busy")), environment={**ENVIRONMENT, "date": "9999", "busy": 1}
    )
    for name, made in (("quiet", quiet), ("busy", busy)):
        (tmp_path / "benchmarks/results" / name).mkdir(parents=True)
        made.save(tmp_path / "benchmarks/results" / name / "results.json")
    assert "quiet" in pages.readme_tables(tmp_path)
    assert "busy" not in pages.readme_tables(tmp_path)
    assert "1 of them kept busy by other processes" in pages.results(tmp_path)


@pytest.mark.parametrize(
    "text", ["", "<!-- benchmarks -->", "<!-- /benchmarks --> <!-- benchmarks -->"]
)
def test_a_readme_without_its_markers_is_refused(text):
    with pytest.raises(ValueError, match="expected one '<!-- benchmarks -->'"):
        pages.fill(text, "")


# What moved


def test_only_what_moves_beyond_the_noise_is_a_change():
    def moved(old, new):
        return [(c.what.rpartition(", ")[2], c.regression) for c in compare.changes(old, new)]

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
    assert [(c.before, c.after, c.regression) for c in compare.changes(good, bad)] == [
        ("right", "bad", True)
    ]
    assert [c.regression for c in compare.changes(bad, good)] == [False]
    assert compare.changes(bad, bad) == []
    more = report(with_ours(row(), saved_bytes=5000))
    assert [str(c) for c in compare.changes(good, more)] == [
        "REGRESSION: a|b, training, float32, cpu, threads=1: fusedrnn, saved for backward: "
        "4,000 bytes -> 5,000 bytes"
    ]
    assert [c.regression for c in compare.changes(more, good)] == [False]


def test_compare_exits_with_1_on_a_regression(tmp_path, capsys):
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    report(row(speed=2.0), row("gone"), cpu="abacus").save(old)
    for speed, code in ((2.0, 0), (3.0, 0), (1.0, 1)):
        report(row(speed=speed)).save(new)
        assert main(["--from", str(new), "--compare", str(old)]) == code
    text = " ".join(capsys.readouterr().out.split())
    assert "nothing moved beyond the noise" in text
    assert "better: a|b, training, float32, cpu, threads=1: fusedrnn, speed: 2.00 -> 3.00" in text
    assert "REGRESSION: a|b" in text and "2.00 -> 1.00" in text
    assert "not the same: cpu: abacus" in text and "1 rows of the old report" in text
    report(row("another")).save(new)
    with pytest.raises(SystemExit) as exit:
        main(["--from", str(new), "--compare", str(old)])
    assert exit.value.code == 2 and "no row in common" in capsys.readouterr().err
