"""Tables of a GPU run's JSON, for the terminal and as Markdown."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import micro
from benchmarks.measure import Summary, speedup
from fusedrnn import _C

# The findings of a stage that failed.
NOTHING: dict[str, Any] = {
    **{"crashed": True, "found": {}, "planned": 0, "grid": 0, "runs": {}},
    **{"passed": 0, "failed": {}, "skipped": 0, "struck": 0, "skip_reasons": []},
}
WORKED = ("driver", "canaries", "micro", "sweep", "targets")  # stages of items, in order
Record = dict[str, Any]  # a point, as the worker wrote it


@dataclass(frozen=True)
class Target:
    """A figure and its target; ``met`` is None where nothing was measured."""

    what: str
    measured: str
    wanted: str
    met: bool | None

    def cells(self, on_gpu: bool) -> list[str]:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[self.met]
        # Tiny sizes on a CPU only show that the command works.
        return [self.what, self.measured, self.wanted, verdict if on_gpu else "dry run"]


# ---- figures ----


def ratio(record: Record | None, key: str = "seconds") -> Summary | None:
    """The speed of the second work, fusedrnn, as a multiple of the first's, torch.nn."""
    if record is None or len(record.get("works", ())) < 2:
        return None
    theirs, ours = (work.get(key) for work in record["works"][:2])
    return speedup(theirs, ours) if theirs and ours else None


def step_seconds(record: Record | None, peer: str = "fusedrnn") -> float | None:
    """The time of a step: the difference of two lengths, preferably of graph replays."""
    works = [w for w in (record or {}).get("works", ()) if w["peer"] == peer]
    for key in ("graph_seconds", "seconds"):
        times = [work.get(key) for work in works]
        if len(times) == 2 and all(times):
            steps = works[1]["steps"] - works[0]["steps"]
            return statistics.median((b - a) / steps for a, b in zip(*times, strict=True))
    return None


def median_of(record: Record | None, work: int, key: str = "seconds") -> float | None:
    works = (record or {}).get("works", ())
    times = works[work].get(key) if work < len(works) else None
    return statistics.median(times) if times else None


def problems(found: dict[str, Record]) -> dict[str, str]:
    """The problems of each point that has any."""
    bad = {}
    for name, record in found.items():
        wrong = [w["problem"] for w in record.get("works", ()) if w.get("problem")]
        if record.get("problem") or wrong:
            bad[name] = record.get("problem") or "; ".join(dict.fromkeys(wrong))
    return bad


def targets(found: dict[str, Record], planned: int = 0) -> list[Target]:
    """Every target and its figure; ``planned`` is the number of points of the means."""
    get = found.get
    made = [
        _at_least("LSTM 28->256 x2, T=35, B=32, float32, training", get("book"), 5),
        _at_least("the same, no TF32 for fusedrnn", get("book/no-tf32"), 3),
    ]
    grid = {k: v for k, v in found.items() if k.startswith("grid/")}
    for mode in ("training", "inference"):
        made += _mean(
            mode, {k: v for k, v in grid.items() if k.startswith(f"grid/{mode}/")}, planned
        )
    for dtype in ("bfloat16", "float16"):
        for mode, most in (("forward", 2.0), ("training", 5.0)):
            record = get(f"flashrnn/{dtype}/{mode}")
            what = f"LSTM 768, T=1024, B=16, {dtype}, {mode}"
            made.append(_at_most(what, median_of(record, 1), 1e3, "ms", most))
    for dtype in ("float32", "bfloat16", "float16"):
        slope = step_seconds(get(f"step/{dtype}"))
        made.append(_at_most(f"a step of LSTM 256, B=32, forward, {dtype}", slope, 1e6, "us", 1.2))
    for mode in ("inference", "training"):
        made.append(_layers(mode, get(f"layers/{mode}")))
    for mode in ("inference", "training"):
        made.append(_at_least(f"lengths 50..200, B=32, LSTM 256, {mode}", get(f"speech/{mode}"), 4))
    made.append(_saved(found))
    return made


def _at_least(what: str, record: Record | None, least: float) -> Target:
    found, graph = ratio(record), ratio(record, "graph_seconds")
    if found is None:
        return Target(what, _why(record), f">= {least:g}x", None)
    text = f"{found.median:.2f}x ({found.lower:.2f}..{found.upper:.2f})"
    text += f", graphs {graph.median:.2f}x" if graph else ""
    return Target(what, text, f">= {least:g}x", found.median >= least)


def _at_most(what: str, value: float | None, scale: float, unit: str, most: float) -> Target:
    if value is None:
        return Target(what, "", f"<= {most:g} {unit}", None)
    return Target(what, f"{value * scale:.3g} {unit}", f"<= {most:g} {unit}", value * scale <= most)


def _mean(mode: str, records: dict[str, Record], planned: int) -> list[Target]:
    ratios = {name: r.median for name, record in records.items() if (r := ratio(record))}
    if not ratios:
        return [Target(f"geometric mean, {mode}", "", ">= 3x", None)]
    mean = statistics.geometric_mean(ratios.values())
    worst = min(ratios, key=lambda name: ratios[name])
    of = f" of {planned // 2}" if planned else ""
    below = sum(r < 1 for r in ratios.values())
    short = worst.removeprefix(f"grid/{mode}/")
    return [
        Target(f"geometric mean of {len(ratios)}{of}, {mode}", f"{mean:.2f}x", ">= 3x", mean >= 3),
        Target(
            f"the slowest of them ({below} below 1)",
            f"{ratios[worst]:.2f}x, {short}",
            ">= 1x",
            ratios[worst] >= 1,
        ),
    ]


def _layers(mode: str, record: Record | None) -> Target:
    """The time of L layers divided by that of one, from the same rounds."""
    what, wanted = f"4 layers / 1 layer, LSTM 256, T=512, {mode}", "<= 1.3x"
    for key in ("graph_seconds", "seconds"):
        times = {w["layers"]: w[key] for w in (record or {}).get("works", ()) if w.get(key)}
        if 1 in times and len(times) > 1:
            by = {n: speedup(t, times[1]).median for n, t in times.items() if n > 1}
            text = ", ".join(f"{n}: {r:.2f}x" for n, r in by.items())
            return Target(what, text, wanted, by[4] <= 1.3 if 4 in by else None)
    return Target(what, _why(record), wanted, None)


def _saved(found: dict[str, Record]) -> Target:
    """The largest ratio of fusedrnn's bytes to torch.nn's over all pairs in training."""
    ratios = {}
    for name, record in found.items():
        works = record.get("works", ())
        if len(works) == 2 and [w["peer"] for w in works] == ["torch.nn", "fusedrnn"]:
            theirs, ours = (w.get("saved_bytes") for w in works)
            if theirs and ours is not None:
                ratios[name] = ours / theirs
    wanted = "<= 1x torch.nn's"
    if not ratios:
        return Target("bytes saved for backward", "", wanted, None)
    worst = max(ratios, key=lambda name: ratios[name])
    text = f"at most {ratios[worst]:.2f}x, {worst.removeprefix('grid/training/')}"
    return Target("bytes saved for backward", text, wanted, ratios[worst] <= 1)


def _why(record: Record | None) -> str:
    return "; ".join(problems({"": record}).values()) if record else ""


# ---- tables ----


def clusters_table(found: dict[str, Any]) -> list[list[str]]:
    """How many clusters fit, by blocks and shared memory."""
    counts = found["clusters"]
    sizes = range(1, len(next(iter(counts.values()))) + 1)
    lines = [["blocks", *(f"{int(shared) >> 10} KiB" for shared in counts), "cooperative launch"]]
    for n in sizes:
        error = found["launched"].get(str(n), "not tried")
        numbers = [str(column[n - 1]) for column in counts.values()]
        lines.append([str(n), *numbers, "accepted" if error is None else error])
    return lines


def micro_table(found: dict[str, Record]) -> list[list[str]]:
    """Cycles of each microbenchmark beside what the planner assumes."""
    model = _C.cuda_model()
    lines = [["microbenchmark", "blocks", "cycles", "the planner's"]]
    for m in micro.runs():
        record = found.get(m.id)
        if record and "cycles" in record:
            assumed = f"{m.constant} {model[m.constant]:g}" if m.constant else ""
            lines.append([m.what, str(m.blocks), f"{record['cycles']:.4g}", assumed])
    if rate := found.get("rate/1/1/0", {}).get("cycles_per_microsecond"):
        assumed = f"{model['cycles_per_microsecond']:g}"
        lines.append(["cycles in a microsecond", "", f"{rate:.4g}", assumed])
    return lines


def fit_tables(fit: dict[str, Any]) -> Iterable[tuple[str, list[list[str]]]]:
    """The plans that were fastest, and the constants with which the planner's model fits best."""

    def cells(plan: str, time: float | None) -> list[str]:
        return [plan, "not measured" if time is None else f"{time:.4g}"]

    lines = [["shape", "plans", "fastest", "us", "planned", "us", "with fitted constants", "us"]]
    for group, found in fit["groups"].items():
        columns = [cells(*found[key]) for key in ("fastest", "planned", "fitted")]
        lines.append([group, str(found["plans"]), *(cell for pair in columns for cell in pair)])
    yield "plans", lines
    before = _C.cuda_model()
    lines = [["constant", "planner", "fitted"]]
    lines += [[k, f"{before[k]:g}", f"{v:.4g}"] for k, v in fit["constants"].items()]
    if fit["error_before"] is not None:
        errors = [f"{100 * fit[key]:.1f} %" for key in ("error_before", "error_after")]
        lines.append(["error of a plan's time", *errors])
    yield "constants of the planner's model", lines


def counters_table(runs: dict[str, Any]) -> list[list[str]]:
    """What Nsight Compute counted."""
    names = list(dict.fromkeys(name for run in runs.values() for name in run.get("metrics", {})))
    lines = [["kernel", *names]]
    for kernel, run in runs.items():
        if metrics := run.get("metrics"):
            lines.append([kernel, *(metrics.get(name, "") for name in names)])
    return lines


def checks(data: dict[str, Any]) -> list[list[str]]:
    """A line for each check."""
    lines = [["check", "outcome"]]
    if tests := data.get("tests"):
        counts = (tests["passed"], len(tests["failed"]), tests["skipped"], tests["struck"])
        text = "{} passed, {} failed, {} skipped, {} of struck families".format(*counts)
        if tests["skip_reasons"]:
            text += f" ({'; '.join(tests['skip_reasons'])[:200]})"
        lines.append(["GPU tests", _with(text, tests["incomplete"])])
    for tool in ("profile", "sanitizer"):
        for name, run in data.get(tool, {}).get("runs", {}).items():
            text = {
                "clean": f"clean, {run.get('calls')} calls",
                "errors": f"{run.get('errors')} ERRORS: {run.get('first')}",
                "measured": "measured",
            }.get(run["verdict"], f"{run['verdict']}: {run.get('why')}")
            lines.append([name, text])
        if incomplete := data.get(tool, {}).get("incomplete"):
            lines.append([tool, incomplete])
    for part in WORKED:
        if part in data:
            found, planned = data[part]["found"], data[part]["planned"]
            bad = len(problems(found))
            left_out = sum("left_out" in record for record in found.values())
            text = f"{len(found)} of {planned}, {bad} with problems, {left_out} left out"
            lines.append([part, _with(text, data[part]["incomplete"])])
    return lines


def _with(text: str, incomplete: str | None) -> str:
    return f"{text}; INCOMPLETE: {incomplete}" if incomplete else text


def failures(data: dict[str, Any], most: int = 12) -> list[str]:
    """The first failures, and the number of the others."""
    found = dict(data.get("tests", {}).get("failed", {}))
    for part in WORKED:
        found |= problems(data.get(part, {}).get("found", {}))
    lines = [f"{name}: {problem}" for name, problem in list(found.items())[:most]]
    return lines + ([f"... and {len(found) - most} more"] if len(found) > most else [])


def good(data: dict[str, Any]) -> bool:
    """Whether all requested work ran and was correct. Targets and missing tools do not count."""
    sanitizer = data.get("sanitizer", {})
    on_gpu = data.get("environment", {}).get("gpu") is not None
    return (
        not failures(data)
        and not any(isinstance(stage, dict) and stage.get("crashed") for stage in data.values())
        and not (on_gpu and "tests" in data and data["tests"]["passed"] == 0)
        and not any(run["verdict"] == "errors" for run in sanitizer.get("runs", {}).values())
        and not any(data.get(p, {}).get("incomplete") for p in ("tests", *WORKED))
    )


def sections(data: dict[str, Any]) -> Iterable[tuple[str, list[list[str]]]]:
    """All tables, the targets last."""
    if "clusters" in (found := data.get("driver", {}).get("found", {}).get("clusters", {})):
        yield "clusters that run at once, as the driver says", clusters_table(found)
    if "micro" in data:
        yield "cycles", micro_table(data["micro"]["found"])
    if fit := data.get("sweep", {}).get("fit"):
        yield from fit_tables(fit)
    if runs := data.get("profile", {}).get("runs"):
        yield "counters", counters_table(runs)
    yield "checks", checks(data)
    if "targets" in data:
        on_gpu = data["environment"]["gpu"] is not None
        lines = [
            t.cells(on_gpu) for t in targets(data["targets"]["found"], data["targets"]["grid"])
        ]
        yield "targets", [["against torch.nn", "measured", "target", ""], *lines]


def caption(data: dict[str, Any]) -> str:
    e = data["environment"]
    where = e["gpu"] or f"{e['cpu']} (a dry run: no GPU)"
    return f"{where}, driver {e['gpu_driver']}, CUDA {e['cuda']}, cuDNN {e['cudnn']}, " + (
        f"torch {e['torch']}, fusedrnn {e['fusedrnn']} at {e['commit']}, {e['date'][:10]}"
    )


def text(data: dict[str, Any]) -> str:
    """For the terminal."""
    parts = [caption(data)]
    failed = failures(data)
    if failed:
        parts.append("failures\n" + "\n".join(f"  {line}" for line in failed))
    parts += [f"{title}\n{aligned(lines)}" for title, lines in sections(data)]
    return "\n\n".join(parts)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def recognises(data: dict[str, Any]) -> bool:
    """Whether a file of results is one of ``python -m benchmarks.gpu``."""
    return "commands" in data


def markdown(path: Path) -> str:
    """For the documentation."""
    data = json.loads(path.read_text())
    escape: Callable[[str], str] = lambda cell: cell.replace("|", "\\|")  # noqa: E731
    made = ", ".join(f"`{command}`" for command in data["commands"].values())
    parts = [f"{caption(data)}. Made by {made}."]
    for title, lines in sections(data):
        head, *rest = lines
        table = [head, ["---"] * len(head), *([escape(c) for c in line] for line in rest)]
        parts.append(f"**{title[0].upper()}{title[1:]}**")
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in table))
    if failed := failures(data):
        parts.append("Failures:\n\n" + "\n".join(f"- {line}" for line in failed))
    return "\n\n".join(parts) + "\n"
