"""Pages made of reports: results.md beside each, docs/results.md of all, the README's tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tables
from benchmarks.gpu import summary as gpu_summary
from benchmarks.report import Report, caption
from benchmarks.suite import Row

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
README_MODES = ("training", "inference")
ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"
HEAD = """# Results

Made by `python -m benchmarks --docs` of what lies in `benchmarks/results/`; not written by hand.
[Benchmarks](benchmarks.md) says how it was measured and how to read it.
"""


def page(report: Report, figures: Sequence[str] = (), folder: str = ".") -> str:
    """All of a report as Markdown; ``folder`` is where its figures are, seen from the page."""
    parts = [_made(report)]
    parts += [f"![{name}]({folder}/{name}.svg)" for name in figures]
    if headlines := tables.headlines(report.rows):
        parts += [*(table.markdown() for table in headlines), tables.NOTE]
    parts += [table.markdown() for table in tables.grids(report.rows)]
    if report.training:
        parts += [table.markdown() for table in tables.training(report.training)]
        parts.append(tables.TRAINING_NOTE)
    if every := tables.details(report.rows):
        parts += ["### Every implementation", *(table.markdown() for table in every)]
        parts.append(tables.DETAILS_NOTE)
    return "\n\n".join(parts) + "\n"


def headline(report: Report) -> str:
    """What the README has of a report: float32, at the number of threads with the most cases."""
    rows = _readme_rows(report)
    counts = Counter(r.threads for r in rows)
    threads = max(counts, key=lambda n: (counts[n], n), default=0)
    shown = tables.headlines([r for r in rows if r.threads == threads])
    shown += tables.training(report.training)
    parts = [_made(report), *(table.markdown() for table in shown), tables.NOTE]
    return "\n\n".join(parts) + "\n"


def _readme_rows(report: Report) -> list[Row]:
    return [r for r in report.rows if r.mode in README_MODES and r.dtype == "float32"]


def _made(report: Report) -> str:
    return f"{caption(report.environment)}. Made by `{report.command}`."


def results(root: Path = ROOT) -> str:
    """docs/results.md: of each folder of results the report, and what the GPU command left."""
    parts = [HEAD.strip()]
    for where in sorted(path for path in (root / RESULTS).iterdir() if path.is_dir()):
        parts.append(f"## {where.name}")
        if (where / "gpu.json").is_file():
            parts.append(gpu_summary.markdown(where / "gpu.json").strip())
        if (where / "results.json").is_file():
            figures = sorted(path.stem for path in where.glob("*.svg"))
            folder = f"../{where.relative_to(root)}"
            parts.append(page(Report.load(where / "results.json"), figures, folder).strip())
    return "\n\n".join(parts) + "\n"


def readme_tables(root: Path = ROOT) -> str:
    """The README's part: the headlines of the newest report of a CPU and of the newest of a GPU."""
    found = [Report.load(path) for path in (root / RESULTS).glob("*/results.json")]
    newest = {
        bool(r.environment["gpu"]): r
        for r in sorted(found, key=lambda r: str(r.environment["date"]))
        if not r.environment.get("busy") and (tables.headlines(_readme_rows(r)) or r.training)
    }
    return "\n".join(headline(newest[gpu]) for gpu in sorted(newest))


def write_docs(root: Path = ROOT) -> None:
    """docs/results.md and the README's tables, of benchmarks/results/."""
    readme = root / "README.md"
    filled = fill(readme.read_text(), readme_tables(root))
    (root / "docs" / "results.md").write_text(results(root))
    readme.write_text(filled)


def fill(text: str, content: str) -> str:
    """``text`` with ``content`` in place of what stood between the two markers.

    Raises:
        ValueError: there is not one pair of markers, in that order.
    """
    before, begin, rest = text.partition(BEGIN)
    old, end, after = rest.partition(END)
    if not begin or not end or BEGIN in old + after or END in before + after:
        raise ValueError(f"expected one '{BEGIN}' and, behind it, one '{END}'")
    return f"{before}{BEGIN}\n\n{content.strip()}\n\n{END}{after}"
