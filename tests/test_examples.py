"""The scripts of examples/, with fewer updates: they learn, both models the same."""

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = [path.stem for path in sorted(EXAMPLES.glob("*.py")) if path.stem != "compare"]
# Updates, the measure of quality, the worst value that shows learning, and whether less is better.
SETTINGS = {
    "character_model": (30, "test perplexity", 26.0, True),
    "forecasting": (40, "test error of a day ahead", 0.68, True),
    "reinforcement_learning": (100, "mazes solved, %", 75.0, False),
    "streaming_speech": (20, "test accuracy, %", 75.0, False),
    "tagging": (20, "test accuracy, %", 60.0, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_examples_learn(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    updates, measure, worst, less = SETTINGS[script]
    figure = importlib.import_module(script).main(updates)
    theirs, ours = figure[measure]
    assert ours < worst if less else ours > worst
    assert ours == pytest.approx(theirs, rel=0.05)
    assert min(figure["training, s"]) > 0
    assert measure in capsys.readouterr().out


def test_examples_are_listed_and_short():
    listed = (EXAMPLES / "README.md").read_text()
    for script in SCRIPTS:
        assert f"({script}.py)" in listed
        assert len((EXAMPLES / f"{script}.py").read_text().splitlines()) <= 110
