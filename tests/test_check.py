"""``python -m fusedrnn check``: what it lists, what it finds, and what it makes of crashes."""

from __future__ import annotations

import endings
import pytest
import torch

from fusedrnn import _C, check, cuda, families
from fusedrnn.__main__ import main


def test_each_way_to_fail(monkeypatch, capsys):
    """One line says what is right, one names each that is not, and the exit code is 1."""
    functions = (
        endings.right, endings.wrong, endings.raises, endings.crashes, endings.hangs,
    )  # fmt: skip
    tasks = [check.Task("some", f.__name__, f, ()) for f in functions]
    monkeypatch.setattr(check, "cpu_tasks", lambda: tasks)
    assert main(["check", "--device", "cpu", "--seconds", "8", "--jobs", "5"]) == 1
    text = capsys.readouterr().out
    table = text[text.rindex("some ") :].splitlines()
    assert "5 families  4 WRONG" in table[0]
    for line in (
        "  wrong: has an error",
        "  raises: failed: ValueError: no such thing",
        "  crashes: crashed with exit code -11",
        "  hangs: hangs: no result within 8 s",
    ):
        assert line in table
    assert main(["check", "--device", "cpu", "--only", "right"]) == 0
    assert "1 families  right" in capsys.readouterr().out
    assert main(["check", "--device", "cpu", "--only", "nothing of it"]) == 2


def test_every_family_of_the_cpu_is_listed():
    found = families.cpu_families()
    here = {name for name, supported in _C.cpu_variants() if supported}
    assert {f.variant for f in found} == here
    assert len(found) == len(here) * 4 * len(families.MODES) * 2
    assert len({f.name for f in found}) == len(found)


@pytest.mark.parametrize("name", ["LSTM backward, float32", "RNN_RELU backward, float16"])
def test_kernels_of_the_cpu(name, monkeypatch, capsys):
    """The weakest instruction set: the process chooses it."""
    variant = _C.cpu_variants()[-1][0]
    monkeypatch.setenv("FUSEDRNN_CPU", _C.cpu_variant())
    assert main(["check", "--device", "cpu", "--only", f"{variant} {name}"]) == 0
    assert f"CPU {variant}" in capsys.readouterr().out


@pytest.mark.slow
def test_all_kernels_of_the_cpu():
    assert main(["check", "--device", "cpu"]) == 0


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mode", families.MODES)
def test_the_small_case_finds_a_missing_state(mode, backward, monkeypatch):
    """In every dtype: what rounding explains is less than that."""
    exact = families._Call.exact

    def changed(self, backward):
        self.hx = self.hx.clone()
        self.hx[:, -1] = 0  # of one row
        return exact(self, backward)

    monkeypatch.setattr(families._Call, "exact", changed)
    for family in families.cpu_families():
        if family.variant == _C.cpu_variant() and family[2:] == (mode, backward):
            assert "has an error" in families.cpu_problem(family)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("mode", families.MODES)
def test_the_small_case_of_an_ensemble_finds_weights_of_another_member(mode, backward, monkeypatch):
    by_member = families._Call.by_member

    def exchanged(self, compute):
        if self.members:
            self.weights[1] = self.weights[1].flip(0)  # W_hh
        return by_member(self, compute)

    monkeypatch.setattr(families._Call, "by_member", exchanged)
    for family in families.cpu_families():
        if family.variant == _C.cpu_variant() and family[2:] == (mode, backward):
            assert "of an ensemble has an error" in families.cpu_problem(family)


def test_every_family_of_cuda_has_a_case():
    """The plan that its case forces is of the family; every plan is of one that is listed."""
    spec = cuda.Spec(
        capability=90, processors=132, shared_bytes=227 << 10,
        clusters=tuple(132 // n for n in range(1, 17)),
    )  # fmt: skip
    found = families.cuda_families()
    assert len({f.name for f in found}) == len({f.number for f in found}) == len(found)
    assert len(found) == len(families.MODES) * 2 * (3 * 5 * 2 + 4 + 4)
    for family in found:
        assert {case.members for case in families.cases(family)} == {0, 2}
        for case in families.cases(family):
            plan = cuda.plan(
                case.config, family.dtype, case.steps, case.batch, family.backward, spec,
                forced=case.plan, tf32=case.tf32, tangent=family.tangent,
                members=max(1, case.members),
            )  # fmt: skip
            assert plan.family == family.number, (family, plan)
        assert families.runs_on(family, spec)
    old = cuda.Spec(capability=70, processors=80, shared_bytes=98304, clusters=())
    assert {f.exchange for f in found if families.runs_on(f, old)} == {"stepwise"}


def test_without_a_gpu_check_of_cuda_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["check", "--device", "cuda"]) == 2
    assert "no GPU: torch finds none" in capsys.readouterr().out
