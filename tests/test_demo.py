"""The demo: its batches, its errors, and a whole run with both implementations."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fusedrnn

pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from fusedrnn.__main__ import main
from fusedrnn.demo import cli, model, text
from fusedrnn.demo.options import DemoError
from fusedrnn.demo.report import Report
from fusedrnn.demo.result import Epoch, Result, perplexity

WORDS = ("the", "time", "traveller", "for", "so", "it", "will", "be", "convenient", "to", "speak")
TINY = ["--hidden=16", "--layers=1", "--batch=4", "--steps=8", "--epochs=2", "--device=cpu"]
# At higher rates training amplifies rounding faster than these tests allow.
TINY += ["--optimizer=sgd", "--lr=1"]


@pytest.fixture
def story(tmp_path: Path) -> Path:
    """A file of 600 words with capitals, digits and line ends."""
    rng = random.Random(0)
    path = tmp_path / "story.txt"
    path.write_text("42.\n".join(rng.choice(WORDS).title() for _ in range(600)))
    return path


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fusedrnn", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


# Text


def test_load_keeps_letters_and_single_spaces(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff  The TIME,\r\n\n1898 Traveller's \u00e9lan\n".encode())
    assert text.load(path) == "the time traveller s lan"


def test_default_text_has_the_28_tokens_of_english():
    content = text.load(None)
    vocabulary = text.Vocabulary(content)
    assert len(vocabulary) == 28
    assert vocabulary.tokens[:2] == ["<unk>", " "]
    assert len(content) > 100_000


def test_vocabulary_sorts_by_frequency_and_round_trips():
    vocabulary = text.Vocabulary("abbccc")
    assert vocabulary.tokens == ["<unk>", "c", "b", "a"]
    indices = vocabulary.encode("abcz").tolist()
    assert indices == [3, 2, 1, 0]
    assert vocabulary.decode(indices) == "abc<unk>"


# Batches


@pytest.mark.parametrize("sampling", ["sequential", "random"])
@pytest.mark.parametrize(("tokens", "batch", "steps"), [(15, 2, 5), (101, 3, 4), (50, 1, 1)])
def test_an_epoch_takes_each_of_its_tokens_once(sampling, tokens, batch, steps):
    corpus = torch.arange(tokens)  # each token is its own position
    count = text.batches_per_epoch(tokens, batch, steps)
    generator = torch.Generator().manual_seed(0)
    offsets = set()
    for _ in range(50):
        starts = text.draw_starts(tokens, batch, steps, sampling, generator)
        inputs, targets = text.gather(corpus, starts, steps)
        assert inputs.shape == (count, steps, batch)
        assert torch.equal(targets, inputs + 1)
        taken = inputs.flatten().sort().values
        offsets.add(int(taken[0]))
        assert torch.equal(taken, taken[0] + torch.arange(count * steps * batch))
    assert offsets == set(range(steps))


def test_sequential_batches_continue_each_other():
    starts = text.draw_starts(200, 3, 5, "sequential", torch.Generator().manual_seed(0))
    inputs, targets = text.gather(torch.arange(200), starts, 5)
    assert torch.equal(inputs[1:, 0], targets[:-1, -1])


def test_random_batches_differ_from_epoch_to_epoch():
    generator = torch.Generator().manual_seed(0)
    first, second = (text.draw_starts(200, 3, 5, "random", generator) for _ in range(2))
    assert not torch.equal(first - first.min(), second - second.min())


def test_too_few_tokens_for_one_batch():
    assert text.batches_per_epoch(15, 2, 5) == 1
    with pytest.raises(DemoError, match=r"14 characters are too few.* needs 15"):
        text.batches_per_epoch(14, 2, 5)


# Prefix


def test_prefix():
    content = "a valet met her elf in a cab today"
    vocabulary = text.Vocabulary(content)
    assert text.default_prefix(content, vocabulary, own_file=False) == "a valet met"
    assert text.default_prefix(content, vocabulary, own_file=True) == "time traveller"
    assert text.default_prefix("abc def", text.Vocabulary("abc def"), own_file=True) == "abc def"
    assert text.check_prefix("A Valet", vocabulary) == "a valet"


def test_generate_is_deterministic_and_keeps_the_mode():
    vocabulary = text.Vocabulary("abcdefgh")
    net = model.build(torch.nn, "lstm", len(vocabulary), hidden=8, layers=2, dropout=0.5)
    drawn = {model.generate(net, vocabulary, "bad", 20) for _ in range(3)}
    assert len(drawn) == 1
    assert drawn.pop().startswith("bad")
    assert net.training
    assert model.generate(net, vocabulary, "bad", 0) == "bad"


def test_temperature_of_the_sampling():
    vocabulary = text.Vocabulary("abcdefgh")
    net = model.build(torch.nn, "gru", len(vocabulary), hidden=8, layers=1, dropout=0.0)
    likeliest, cold, warm, again, other = (
        model.generate(net, vocabulary, "bad", 30, temperature, seed)
        for temperature, seed in ((0.0, 0), (1e-6, 0), (1.0, 0), (1.0, 0), (1.0, 1))
    )
    assert likeliest == cold != warm == again != other


def test_integers_are_the_same_model():
    models = [
        model.build(fusedrnn, "gru", 9, hidden=8, layers=2, dropout=0.0, integers=integers)
        for integers in (False, True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    tokens, seen = torch.randint(0, 9, (5, 3)), []
    models[1].rnn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert torch.equal(models[0](tokens)[0], models[1](tokens)[0])
    assert torch.equal(seen[0], tokens)


# Figures


def test_result():
    epochs = [
        Epoch(100, (4.0, 4.4), [(2.0, 1.0), (3.0, 1.0)]),
        Epoch(100, (2.0, 2.0), [(9.0, 1.0)]),
    ]
    result = Result({}, epochs, ["a", "b"])
    assert (epochs[0].ratio(), result.ratio()) == (2.5, 3.0)
    assert (epochs[0].speed(0), epochs[0].speed(1)) == (20.0, 50.0)
    assert result.largest_difference() == pytest.approx(0.1)


def test_what_is_not_finite_is_null_in_json():
    assert perplexity(1000.0) == math.inf
    result = Result({}, [Epoch(1, (math.inf, math.nan), [(1.0, 1.0)])], ["", ""])
    figures = json.loads(json.dumps(result.as_json(), allow_nan=False))
    assert figures["implementations"]["torch.nn"]["perplexity"] == [None]
    assert figures["largest_relative_perplexity_difference"] is None


# Whole runs


@pytest.mark.parametrize("sampling", ["sequential", "random"])
@pytest.mark.parametrize("cell", ["rnn", "relu", "gru", "lstm"])
def test_both_learn_the_same(cell, sampling, story, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    arguments = ["demo", *TINY, f"--cell={cell}", f"--sampling={sampling}", f"--text={story}"]
    assert main([*arguments, "--dtype=float64", "--generate=5", f"--out={out}"]) == 0

    assert (out / cli.PNG).read_bytes().startswith(b"\x89PNG")
    figures = json.loads((out / cli.JSON).read_text())
    assert figures["settings"]["cell"] == cell
    assert figures["settings"]["prefix"] == "time traveller"
    assert figures["largest_relative_perplexity_difference"] < 1e-4
    assert figures["median_ratio"] > 0
    assert len(figures["ratio"]) == 2
    reference, fused = (figures["implementations"][name] for name in ("torch.nn", "fusedrnn"))
    for implementation in (reference, fused):
        first, last = implementation["perplexity"]
        assert 1 < last < first < figures["settings"]["vocabulary"]
        assert len(implementation["tokens_per_second"]) == 2
        assert min(implementation["tokens_per_second"]) > 0
        assert len(implementation["text"]) == len("time traveller") + 5
    assert fused["perplexity"] == pytest.approx(reference["perplexity"], rel=1e-4)
    printed = capsys.readouterr().out
    assert "perplexity" in printed
    assert fused["text"] in printed


def test_a_seed_repeats_the_run_with_dropout(story, tmp_path):
    arguments = ["demo", *TINY, "--layers=2", "--dropout=0.5", "--dtype=float64", f"--text={story}"]
    curves = []
    for seed in ("1", "1", "2"):
        assert main([*arguments, f"--seed={seed}", f"--out={tmp_path}"]) == 0
        figures = json.loads((tmp_path / cli.JSON).read_text())
        assert figures["largest_relative_perplexity_difference"] < 1e-4  # the same masks, too
        curves.append(figures["implementations"]["fusedrnn"]["perplexity"])
    assert curves[0] == curves[1] != curves[2]


def test_interrupted_run_keeps_what_it_learned(story, tmp_path, capsys, monkeypatch):
    show = Report.epoch

    def interrupt(self, number, epoch):
        show(self, number, epoch)
        if number == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Report, "epoch", interrupt)
    arguments = ["demo", *TINY, "--epochs=9", f"--text={story}", f"--out={tmp_path}"]
    assert main(arguments) == 130
    assert len(json.loads((tmp_path / cli.JSON).read_text())["ratio"]) == 2
    assert "interrupted" in capsys.readouterr().out


@pytest.mark.slow
def test_the_defaults_end_well(tmp_path):
    """Less than half of the default run: curves that coincide, and a text that can be read."""
    assert main(["demo", "--epochs=45", "--device=cpu", f"--out={tmp_path}"]) == 0
    figures = json.loads((tmp_path / cli.JSON).read_text())
    assert figures["largest_relative_perplexity_difference"] < 1e-4
    theirs, ours = (figures["implementations"][name] for name in ("torch.nn", "fusedrnn"))
    assert ours["perplexity"][-1] < 2
    assert ours["text"][:30] == theirs["text"][:30]
    words, known = ours["text"].split(), set(text.load(None).split())
    assert sum(word in known for word in words) > 0.7 * len(words)
    assert len(set(words)) > 0.4 * len(words)  # and not the same ones again and again


def test_half_precision_takes_sgd(story, tmp_path):
    arguments = ["demo", *TINY[:-2], "--dtype=float16", f"--text={story}", f"--out={tmp_path}"]
    assert main(arguments) == 0
    figures = json.loads((tmp_path / cli.JSON).read_text())
    assert figures["settings"]["optimizer"] == "sgd"
    assert None not in figures["implementations"]["fusedrnn"]["perplexity"]


# Errors


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"", [], "no letter"),
        (b"123 \n 456", [], "no letter"),
        (b"\xff\xfe caf\xe9", [], "not UTF-8"),
        (b"too short", [], "too few"),
        (b"plenty " * 100, ["--max-tokens=9"], "too few"),
        (b"plenty " * 100, ["--prefix=zebra!"], "prefix has characters"),
        (b"plenty " * 100, ["--prefix="], "prefix is empty"),
        (
            b"plenty " * 100,
            ["--device=toaster"],
            "'toaster' cannot be used: torch has no device of this name",
        ),
        (b"plenty " * 100, ["--device=meta"], "'meta' cannot be used"),
        (b"plenty " * 100, ["--device=cuda:99"], "'cuda:99' cannot be used"),
        (b"plenty " * 100, ["--out=/dev/null/x"], "cannot make /dev/null/x"),
    ],
)
def test_unusable_input_is_one_sentence(content, arguments, message, tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    assert main(["demo", *TINY, f"--out={tmp_path}", f"--text={path}", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out


@pytest.mark.parametrize(
    "argument",
    [
        "--epochs=0",
        "--max-tokens=-1",
        f"--seed={2**63}",
        "--lr=nan",
        "--temperature=-1",
        "--dropout=1",
        "--cell=cnn",
        "--hidden=x",
    ],
)
def test_bad_option(argument, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["demo", argument])
    assert exit_info.value.code == 2
    assert argument.split("=")[0] in capsys.readouterr().err


def test_exit_code_and_no_traceback(tmp_path):
    missing = tmp_path / "missing.txt"
    done = run_demo(f"--text={missing}")
    assert done.returncode == 2
    assert (
        done.stderr == f"fusedrnn demo: error: cannot read {missing}: No such file or directory.\n"
    )


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_package_is_named(package):
    code = f"import sys; sys.modules[{package!r}] = None; from fusedrnn.__main__ import main; "
    command = [sys.executable, "-c", code + "sys.exit(main(['demo']))"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == f'the demo needs {package}: pip install "fusedrnn[demo]"\n'


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize("sampling", ["sequential", "random"])
def test_two_processes_match_one(sampling, story, tmp_path):
    arguments = [*TINY, "--dtype=float64", f"--sampling={sampling}", f"--text={story}"]
    arguments += ["--layers=2", "--threads=1"]
    assert run_demo(*arguments, f"--out={tmp_path / 'one'}").returncode == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node=2", "-m", "fusedrnn", "demo"]
    command = [*torchrun, *arguments, f"--out={tmp_path / 'two'}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / out / cli.JSON).read_text()) for out in ("one", "two"))
    assert (one["settings"]["processes"], two["settings"]["processes"]) == (1, 2)
    for name in ("torch.nn", "fusedrnn"):
        a, b = (figures["implementations"][name] for figures in (one, two))
        assert b["perplexity"] == pytest.approx(a["perplexity"], rel=1e-9)
        assert b["text"] == a["text"]
    assert done.stdout.count("after 2 epochs") == 1  # one rank speaks
