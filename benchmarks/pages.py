"""docs/results.md and parts of the README, generated from benchmarks/results/."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report, tables
from benchmarks.cases import CASES
from benchmarks.gpu import summary as gpu_summary
from benchmarks.report import Report
from benchmarks.suite import Row, is_ours
from benchmarks.tables import OURS, Table, filled

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
README_MODES = ("training", "inference")
BOOK = "book-"
HEAD = """# Results

Generated from `benchmarks/results/` by `python -m benchmarks --docs`.
[benchmarks.md](benchmarks.md) describes how the figures are measured. The shapes of the cases are
in [the last table](#cases)."""
PACKED = "speech-lstm-256"


def page(run: Report) -> str:
    """A run as Markdown."""
    parts = [filled(f"Made by `{run.command}`.")]
    if absent := run.environment.get("absent"):
        parts.append(filled(f"Not installed, and not measured: {', '.join(absent)}."))
    shown = tables.headlines(run.rows, shapes=False) + tables.others(run.rows)
    shown += (
        tables.grids(run.rows)
        + tables.training(run.training, shapes=False)
        + tables.sweeps(run.sweeps)
    )
    return "\n\n".join([*parts, *(table.markdown() for table in shown)])


def results(root: Path = ROOT) -> str:
    """docs/results.md: a section for each file of results, with all of its runs."""
    parts = [HEAD, filled(tables.NOTE), filled(tables.TRAINING_NOTE)]
    rows: list[Row] = []
    for path in sorted((root / RESULTS).glob("*.json")):
        parts.append(f"## {path.stem}")
        if gpu_summary.recognises(json.loads(path.read_text())):
            parts.append(gpu_summary.markdown(path).strip())
            continue
        for run in report.load(path):
            e = run.environment
            parts += [f"### {report.versions(e)}", filled(f"{report.machine(e)}.")]
            parts.append(page(run))
            rows += run.rows
    parts += ["## Cases", tables.cases(rows).markdown().partition("\n\n")[2]]
    return "\n\n".join(parts) + "\n"


def figures(root: Path = ROOT) -> str:
    """The README's reasons: three figures of the newest CPU, with their commands."""
    runs = _machines(root).get(False, [])
    modes = _shown(runs)
    if len(modes) < len(README_MODES):
        return ""
    training, inference = (modes[mode] for mode in README_MODES)
    threads = training[0].threads
    command = f"python -m benchmarks --threads {threads}"
    found = [
        (
            f"**{_mean(training)} times as fast in training, {_mean(inference)} in inference**: "
            f"geometric means of {_counts(modes)} cases",
            f"{command} --dtype float32 --part cases --peer fusedrnn",
        )
    ]
    for row in training:
        speedup = tables.of_peer(row, OURS).speedup
        if row.case == PACKED and speedup:
            text = (
                f"**{speedup.median:.0f} times as fast in training on packed sequences** of 50 to "
            )
            found.append((f"{text}200 steps, LSTM of 256 units", f"{command} --case {PACKED}"))
    loops = [
        t.speedup.median for r in runs for t in r.training if t.threads == threads and not t.problem
    ]
    if loops:
        text = f"**{min(loops):.1f} to {max(loops):.1f} times as fast over the training loops** of "
        text += f"a textbook's {len(loops)} jobs, with loss, clipping and update"
        found.append((text, f"{command} --part training"))
    cpu = runs[0].environment["cpu"]
    head = f"Compared with torch.nn in float32 on {threads} threads of {cpu}:"
    return "\n".join([f"{filled(head)}\n", *(f"{_item(text)}:\n  `{do}`" for text, do in found)])


def _mean(rows: Sequence[Row]) -> str:
    mean = tables.geometric_mean(rows)
    return "" if mean is None else f"{mean:.1f}"


def _item(text: str) -> str:
    """An item of a Markdown list."""
    return filled(f"- {text}").replace("\n", "\n  ")


def _where(row: Row) -> str:
    return f"{row.threads} CPU threads" if row.device == "cpu" else row.device


def readme_table(root: Path = ROOT) -> str:
    """The README's speeds: those of the newest CPU and those of the newest GPU."""
    return "\n\n".join(headline(runs) for _, runs in sorted(_machines(root).items()))


def headline(runs: Sequence[Report]) -> str:
    """The book's jobs, the LSTM of every other source, every row in which another implementation is
    faster, and the mean and range of all cases: of the rows of several runs of a machine.
    """
    modes = _shown(runs)
    shown = [row for rows in modes.values() for row in rows]
    jobs: dict[str, dict[str, Row]] = {}
    for row in shown:
        if row.case.startswith(BOOK) or row.shape.startswith("LSTM") or row.ahead():
            jobs[row.case] = {r.mode: r for r in shown if r.case == row.case}
    first = next(iter(modes))
    title = f"{first} speed in tokens/s, and {tables.TIMES}; {shown[0].dtype}, {_where(shown[0])}"
    header = ["job", "layers, T steps, B rows", "torch.nn", OURS]
    header += [f"faster, {mode}" for mode in modes]
    lines = []
    for case in sorted(jobs, key=_place):
        found = jobs[case]
        speeds = tables.speeds(found[first]) if first in found else ["", ""]
        ratios = [tables.ratio(found[mode]) if mode in found else "" for mode in modes]
        lines.append([case, next(iter(found.values())).shape, *speeds, *ratios])
    made = _sources(runs, shown)
    parts = [filled(_caption(made)), Table(title, header, lines).markdown()]
    peers = [[r.peer for r in row.results[1:] if not is_ours(r.peer)] for row in shown]
    others = list(dict.fromkeys(peer for of_row in peers for peer in of_row))
    if others:
        where = "" if all(peers) else " in some rows"
        parts.append(
            filled(
                f"Also measured{where}: {', '.join(others)}. What is faster than fusedrnn, or in "
                "8 bits than fusedrnn's in 8 bits, is named in its row, with how many times as "
                "fast."
            )
        )
    absent = dict.fromkeys(peer for run in made for peer in run.environment.get("absent") or [])
    if never := [peer for peer in absent if peer.partition(" (")[0] not in others]:
        parts.append(filled(f"Not installed, and not measured: {', '.join(never)}."))
    means = filter(None, (_range(mode, rows) for mode, rows in modes.items()))
    parts.append(filled(f"All {_counts(modes)} cases: geometric mean {', '.join(means)}."))
    return "\n\n".join(parts)


def _caption(runs: Sequence[Report]) -> str:
    """The machine of several runs, and the software of each."""
    first, *others = runs
    parts = [report.caption(first.environment)]
    parts += [f"other rows: {report.versions(r.environment)}" for r in others]
    return f"{'; '.join(parts)}. [Results](docs/results.md) has the commands."


def _counts(modes: dict[str, list[Row]]) -> str:
    """How many cases were measured, as one number if it is the same in every mode."""
    ratios = [[tables.of_peer(row, OURS).speedup for row in rows] for rows in modes.values()]
    counts = [len(of_mode) - of_mode.count(None) for of_mode in ratios]
    if len(set(counts)) == 1:
        return str(counts[0])
    return " and ".join(f"{n} {mode}" for n, mode in zip(counts, modes, strict=True))


def _place(case: str) -> int:
    """Where a case stands among all, of whichever run it is."""
    return next((i for i, known in enumerate(CASES) if known.name == case), len(CASES))


def _range(mode: str, rows: Sequence[Row]) -> str:
    """The mean and the extremes of a mode."""
    found = {r.case: s.median for r in rows if (s := tables.of_peer(r, OURS).speedup)}
    mean = tables.geometric_mean(rows)
    if mean is None:
        return ""
    low, high = min(found, key=found.__getitem__), max(found, key=found.__getitem__)
    extremes = f"{found[low]:.2f} ({low}) to {found[high]:.2f} ({high})"
    return f"{mean:.2f} in {mode}, from {extremes}"


def _shown(runs: Sequence[Report]) -> dict[str, list[Row]]:
    """Rows in float32 by mode, at the number of threads with the most cases."""
    rows = [r for run in runs for r in run.rows if r.mode in README_MODES and r.dtype == "float32"]
    rows = [r for r in rows if not tables.grid_point(r)]
    counts = Counter(r.threads for r in rows)
    threads = max(counts, key=lambda n: (counts[n], n), default=0)
    rows = [row for row in rows if row.threads == threads]
    modes = {mode: [row for row in rows if row.mode == mode] for mode in README_MODES}
    return {mode: rows for mode, rows in modes.items() if rows}


def _machines(root: Path) -> dict[bool, list[Report]]:
    """The newest CPU (False) and GPU (True): the quiet runs of its file, newest first."""
    files = [
        sorted(report.load(path), key=_date, reverse=True)
        for path in sorted((root / RESULTS).glob("*.json"))
        if not gpu_summary.recognises(json.loads(path.read_text()))
    ]
    found = {}
    for gpu in (False, True):
        quiet = [[r for r in f if not r.busy and bool(r.environment["gpu"]) == gpu] for f in files]
        if shown := [runs for runs in quiet if _shown(runs)]:
            found[gpu] = max(shown, key=_age)
    return found


def _age(runs: Sequence[Report]) -> list[str]:
    """The newest date of each mode, oldest first: new rows of one mode make no machine new."""
    modes = _shown(runs)
    dates = [[_date(run) for run in _sources(runs, modes.get(mode, []))] for mode in README_MODES]
    return sorted(max(of_mode, default="") for of_mode in dates)


def _date(run: Report) -> str:
    return str(run.environment["date"])


def _sources(runs: Sequence[Report], rows: Sequence[Row]) -> list[Report]:
    """The runs that have some of these rows."""
    return [run for run in runs if any(row in rows for row in run.rows)]


def readme(text: str, root: Path = ROOT) -> str:
    """The README's text with its generated parts made anew."""
    return fill(fill(text, "figures", figures(root)), "benchmarks", readme_table(root))


def write_docs(root: Path = ROOT) -> None:
    """Writes docs/results.md and the README's generated parts."""
    path = root / "README.md"
    made = readme(path.read_text(), root)
    (root / "docs" / "results.md").write_text(results(root))
    path.write_text(made)


def fill(text: str, name: str, content: str) -> str:
    """``text`` with ``content`` between ``<!-- name -->`` and ``<!-- /name -->``.

    Raises:
        ValueError: there is not exactly one such pair of marks.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, opened, rest = text.partition(begin)
    old, closed, after = rest.partition(end)
    if not opened or not closed or begin in old + after or end in before + after:
        raise ValueError(f"expected one '{begin}' and, after it, one '{end}'")
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"
