"""The GPU command: figures, their targets, and the fit of the planner's constants."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from fusedrnn import _C

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu import points, summary, sweep
from benchmarks.gpu.__main__ import main


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
        "flashrnn/bfloat16/forward": record([1.0], [0.0019]),
        "flashrnn/float16/training": record([1.0], [0.0051]),
        "step/float32": record([1e-6], [2e-6], peers=["fusedrnn"] * 2, steps=[1, 2]),
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
        ("", "not measured"),
        ("", "not measured"),
        ("5.1 ms", "MISSED"),
        ("1 us", "met"),
        ("", "not measured"),
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
        "commands": {"3": "c"},
        "targets": {"found": {"book": wrong}, "planned": 2, "grid": 0, "incomplete": None},
    }
    assert "book: error of output" in summary.text(data)
    assert "1 of 2, 1 with problems" in summary.text(data)
    assert not summary.good(data)
    data["targets"]["found"] = {"book": record([1.0], [1.0])}
    assert summary.good(data)
    skipped = {"passed": 0, "skipped": 3, "struck": 0, "skip_reasons": ["no kernels"], "failed": {}}
    every = {**data, "tests": {**skipped, "incomplete": None}}
    assert not summary.good(
        every
    ) and "3 skipped, 0 of struck families (no kernels)" in summary.text(every)
    data["targets"]["incomplete"] = "out of time"
    assert not summary.good(data) and "INCOMPLETE: out of time" in summary.text(data)


SPEC = {
    **{"capability": 90, "processors": 132, "shared_bytes": 232448},
    **{"clusters": [132, 66, *(8 * (16 // n) for n in range(3, 17))]},  # a list, as in JSON
}


def test_the_best_plans_and_their_neighbours_are_measured():
    groups = sweep.groups(points.CUDA)
    assert len({g.id for g in groups}) == len(groups) and len({g.case for g in groups}) == 8
    assert {g.dtype for g in groups} == {"float32", "bfloat16", "float16"}
    group = next(g for g in groups if g.id == "book-lstm-256x2/tf32/forward")
    plans = sweep.chosen(group, SPEC, points.CUDA)
    best = [p for p, _ in sweep.plans(group.request(), SPEC, _C.cuda_model())]
    assert plans[:6] == best[:6] and len(plans) == len(set(plans))
    first = sweep.words(best[0])
    differing = {
        name
        for plan in plans[1:]
        for name, value in sweep.words(plan).items()
        if {k for k in first if first[k] != sweep.words(plan).get(k)} == {name} and value
    }
    assert differing >= {"units", "rows", "engine"} and "stepwise" in plans
    point = group.point(plans[0])
    assert point.plan == f"forward:{plans[0]}" and point.works[0].mode == "forward"


def test_every_planned_plan_can_be_forced():
    for group in sweep.groups(points.CUDA)[::5]:
        for plan in sweep.chosen(group, SPEC, points.CUDA):
            forced = group.point(plan).plan
            assert [p for p, _ in sweep.plans(group.request(), SPEC, _C.cuda_model(), forced)] == [
                plan
            ]


def test_a_run_that_ends_early_has_the_best_of_every_group():
    group = sweep.groups(points.CUDA)[0]
    one, two, three = (group.point(p) for p in ("stepwise", "grid", "cluster"))
    assert sweep.in_turns([[one, two], [three]]) == [one, three, two]


def invented(model, offset=1e-4, every=7):
    """A sweep on a GPU of which `model` is true, besides what all plans of a group share."""
    groups = sweep.groups(points.CUDA)[::every]
    found = {}
    for group in groups:
        for plan in sweep.chosen(group, SPEC, points.CUDA):
            us = sweep.plans(group.request(), SPEC, model, plan)[0][1]
            found[f"{group.id}/{plan}"] = record([us * 1e-6 + offset], peers=["fusedrnn"])
    found[f"{groups[0].id}/grid,units=8,rows=8,layers=1,engine=ffma"] = {"problem": "it hung"}
    # Plans that a planner of another day made.
    for plan in ("grid,units=8,rows=5,layers=1,engine=ffma", "spiral,units=8"):
        found[f"{groups[0].id}/{plan}"] = record([1.0], peers=["fusedrnn"])
    return {"spec": SPEC, "groups": {g.id: g.request() for g in groups}, "found": found}


def test_the_fit_finds_the_constants_behind_the_times():
    slow = {"cluster_exchange": 500, "grid_exchange": 3000, "value_exchange": 2500, "ffma_tile": 14}
    true = {**_C.cuda_model(), **slow}
    data = json.loads(json.dumps(invented(true)))
    fit = sweep.fit(data)
    assert fit["error_after"] < 0.02 < fit["error_before"]
    for name in slow:
        assert fit["constants"][name] == pytest.approx(true[name], rel=0.25), name
    for group, found in fit["groups"].items():
        assert found["fitted"][1] <= 1.02 * found["fastest"][1], (group, found)
    (_, plans), (_, constants) = summary.fit_tables(fit)
    assert len(plans) == 1 + len(data["groups"])
    assert ["grid_exchange", "2200"] in [line[:2] for line in constants]
    # Where another clock rate was measured, cycles are its cycles.
    faster = sweep.fit({**data, "rate": 2 * true["cycles_per_microsecond"]})["constants"]
    assert faster["grid_exchange"] == pytest.approx(2 * true["grid_exchange"], rel=0.25)


def test_without_times_nothing_is_fitted():
    fit = sweep.fit({"spec": SPEC, "groups": {}, "found": {"a/grid": {"problem": "hung"}}})
    assert fit["constants"] == _C.cuda_model() and fit["groups"] == {}


def test_an_old_result_can_be_fitted_again(tmp_path, capsys):
    data = {"sweep": invented(_C.cuda_model(), every=20)}
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    assert main(["fit", str(tmp_path / "gpu.json")]) == 0
    assert "error of a plan's time" in capsys.readouterr().out
