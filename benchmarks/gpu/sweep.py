"""Plans against each other, and the constants of the planner's model that fit them.

`python -m benchmarks.gpu fit FILE` fits the constants to the plans of an earlier run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import Case, select
from benchmarks.gpu.points import Point, Sizes, Work, divided
from fusedrnn import _C

MODES = {"RNN": "RNN_TANH"}
FREE = [  # what is fitted; the clock rate scales all of them and is measured by itself
    *("cluster_exchange", "grid_exchange", "value_exchange", "cell", "shared_bytes"),
    *("exchange_bytes", "launch", "stepwise_step"),
    *("ffma_tile", "ffma_narrow_tile", "tf32_tile", "half_tile", "tile_load", "uniform_read"),
]
PRIOR = 1e-3  # weight of a constant's change, squared: what no plan tells of stays as it was


@dataclass(frozen=True)
class Group:
    """Plans of one shape in one direction."""

    case: Case
    dtype: str
    tf32: bool
    backward: bool

    @property
    def id(self) -> str:
        kind = "tf32" if self.tf32 else self.dtype
        return f"{self.case.name}/{kind}/{'backward' if self.backward else 'forward'}"

    def request(self) -> dict[str, Any]:
        """What the planner is asked."""
        return {
            "mode": MODES.get(self.case.cell, self.case.cell),
            "dtype": self.dtype,
            "hidden_size": self.case.hidden_size,
            "proj_size": 0,
            "num_layers": self.case.layers,
            "bidirectional": self.case.bidirectional,
            "steps": self.case.steps,
            "batch": self.case.batch,
            "backward": self.backward,
            "tf32": self.tf32,
        }

    def point(self, plan: str) -> Point:
        """Backward runs after a forward pass that is the same for all plans of the group."""
        way = "backward" if self.backward else "forward"
        mode = "training" if self.backward else "forward"
        work = Work("fusedrnn", self.case, mode, self.dtype, self.tf32)
        name = f"{self.id}/{plan}"
        return Point(name, [work], f"{way}:{plan}", graph=True, seconds=0.05, rounds=5)


def groups(sizes: Sizes) -> list[Group]:
    """Eight shapes: those that have a target, and the kinds that users run."""
    float32 = [("float32", True), ("float32", False)]
    half = [(d, False) for d in sizes.dtypes if d != "float32"]
    long = Case("lstm-256", "LSTM", 256, 256, 1, 512, 32)
    shapes: list[tuple[Case, list[tuple[str, bool]]]] = [
        (select(["book-lstm-256x2"])[0], float32),
        (select(["flashrnn-lstm-768"])[0], half),
        (long, [*float32, *half]),
        (Case("lstm-256x4", "LSTM", 256, 256, 4, 512, 32), [*float32, *half]),
        (select(["speech-lstm-256"])[0], float32),
        (select(["stack-lstm-512x3"])[0], [*float32, *half]),
        (select(["book-rnn-512x2"])[0], float32),
        (Case("gru-256-b1", "GRU", 256, 256, 1, 512, 1), [*float32, *half]),
    ]
    if sizes.divide > 1:
        shapes = [(case, float32[1:]) for case, _ in shapes[:1]]
    return [
        Group(divided(case, sizes.divide), dtype, tf32, backward)
        for case, kinds in shapes
        for dtype, tf32 in kinds
        for backward in (False, True)
    ]


def plans(
    request: dict[str, Any], spec: dict[str, Any], model: dict[str, float], forced: str = ""
) -> list[tuple[str, float]]:
    """The planner's: [(FUSEDRNN_PLAN, estimated microseconds)], fastest first."""
    device: Any = {**spec, "clusters": tuple(spec["clusters"])}  # JSON has made a list of it
    return _C.cuda_plans(**request, device=device, forced=forced, model=model)


def chosen(group: Group, spec: dict[str, Any], sizes: Sizes) -> list[str]:
    """The plans to measure: the best by the model, and the neighbours of the first."""
    model, request = _C.cuda_model(), group.request()
    found = [plan for plan, _ in plans(request, spec, model)]
    best = found[: sizes.best]
    if not sizes.neighbours:
        return best
    everything = [*found]
    if group.tf32:  # the planner chooses TF32 where it may, but FFMA can be asked for
        for engine in ("ffma", "ffma_narrow"):
            everything += [p for p, _ in plans(request, spec, model, f"engine={engine}")]
    return list(dict.fromkeys([*best, *neighbours(best[0], everything), "stepwise"]))


def words(plan: str) -> dict[str, str]:
    """{"backend": "grid", "units": "8", ...}."""
    backend, *rest = plan.split(",")
    return {"backend": backend, **dict(word.split("=") for word in rest)}


def neighbours(plan: str, among: Sequence[str]) -> Iterator[str]:
    """Plans that differ in one respect: next units and rows, all layers, engines and backends."""
    mine = words(plan)
    for name in mine:
        others = [
            (words(p), p)
            for p in among
            if words(p).keys() == mine.keys()
            and [k for k, v in words(p).items() if mine[k] != v] == [name]
        ]
        if name in ("units", "rows"):
            at = int(mine[name])
            for side in (-1, 1):
                close = [(abs(int(w[name]) - at), p) for w, p in others if _is(w, name, at, side)]
                yield from [min(close)[1]] if close else []
        else:
            yield from (p for _, p in others)
    # Another backend seldom fits the same units: its best.
    for backend in {words(p)["backend"] for p in among} - {mine["backend"]}:
        yield next(p for p in among if words(p)["backend"] == backend)


def _is(other: dict[str, str], name: str, at: int, side: int) -> bool:
    return (int(other[name]) - at) * side > 0


def in_turns(lists: Sequence[Sequence[Point]]) -> list[Point]:
    """The first of each, then the second of each: a run that ends early has the best of all."""
    longest = max(map(len, lists), default=0)
    return [points[i] for i in range(longest) for points in lists if i < len(points)]


# ---- the fit ----


def measured(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Microseconds of the plans of each group, of graph replays where there are any."""
    found: dict[str, dict[str, float]] = {}
    for name, record in data["found"].items():
        for work in record.get("works", ()):
            if times := work.get("graph_seconds") or work.get("seconds"):
                group, _, plan = name.rpartition("/")
                found.setdefault(group, {})[plan] = statistics.median(times) * 1e6
    return found


def fit(data: dict[str, Any]) -> dict[str, Any]:
    """Constants for ``data``: {"spec", "groups": {id: request}, "found": records of points}.

    With "rate" they are in cycles of that many a microsecond, and else of the planner's. The model
    estimates what plans differ in. What all plans of a group share, such as weight
    gradients and the forward pass before a backward one, is one more unknown of each group.
    """
    before = _C.cuda_model()
    known = {group: _known(of, data, group) for group, of in measured(data).items()}
    times = {group: of for group, of in known.items() if len(of) > 1}

    def estimate(model: dict[str, float]) -> dict[str, dict[str, float]]:
        return {
            group: {
                plan: plans(data["groups"][group], data["spec"], model, plan)[0][1] for plan in of
            }
            for group, of in times.items()
        }

    def error(model: dict[str, float]) -> float:
        estimates = estimate(model)
        return statistics.fmean(
            residual**2
            for group, of in times.items()
            for residual in _residuals(list(of.values()), [estimates[group][p] for p in of])
        )

    def cost(model: dict[str, float]) -> float:
        moved = sum(math.log(model[name] / before[name]) ** 2 for name in FREE)
        return error(model) + PRIOR * moved / len(FREE)

    if not times:
        return {"constants": before, "error_before": None, "error_after": None, "groups": {}}
    rate = data.get("rate") or before["cycles_per_microsecond"]
    after = _minimum(cost, {**before, "cycles_per_microsecond": rate})
    return {
        "constants": after,
        "error_before": math.sqrt(error(before)),
        "error_after": math.sqrt(error(after)),
        "groups": {
            group: _verdict(of, data["groups"][group], data["spec"], before, after)
            for group, of in known.items()
            if of
        },
    }


def _known(times: dict[str, float], data: dict[str, Any], group: str) -> dict[str, float]:
    """The plans of an earlier run that the planner of today still makes."""
    found, model = {}, _C.cuda_model()
    for plan, time in times.items():
        try:
            if plans(data["groups"][group], data["spec"], model, plan):
                found[plan] = time
        except ValueError:  # a word that it does not have any more
            continue
    return found


def _residuals(times: Sequence[float], estimates: Sequence[float]) -> list[float]:
    """Relative errors, with the best constant of at least 0 added to all estimates."""
    weights = [1 / t**2 for t in times]
    gap = sum(w * (t - e) for w, t, e in zip(weights, times, estimates, strict=True))
    shared = max(0.0, gap / sum(weights))
    return [(e + shared - t) / t for t, e in zip(times, estimates, strict=True)]


def _minimum(cost: Any, model: dict[str, float]) -> dict[str, float]:
    """By steps of one constant at a time, which halve when none helps."""
    best, step = cost(model), 0.5
    while step > 0.01:
        improved = False
        for name in FREE:
            for factor in (math.exp(step), math.exp(-step)):
                other = {**model, name: model[name] * factor}
                if (value := cost(other)) < best - 1e-9:
                    model, best, improved = other, value, True
                    break
        step = step if improved else step / 2
    return model


def _verdict(
    times: dict[str, float],
    request: dict[str, Any],
    spec: dict[str, Any],
    before: dict[str, float],
    after: dict[str, float],
) -> dict[str, Any]:
    fastest = min(times, key=lambda plan: times[plan])
    old, new = (plans(request, spec, model)[0][0] for model in (before, after))
    return {
        "plans": len(times),
        "fastest": [fastest, times[fastest]],
        "planned": [old, times.get(old)],
        "fitted": [new, times.get(new)],
    }
