"""The GPU command keeps going: items and tests that crash, hang or give up."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu import checks, summary, supervise

ROOT = Path(__file__).resolve().parent.parent


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
