"""Every block of Python in the README and in docs/ runs, page by page, from top to bottom."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [Path("README.md"), *sorted(p.relative_to(ROOT) for p in (ROOT / "docs").glob("*.md"))]
TEXTS = {str(page): (ROOT / page).read_text() for page in PAGES}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("page", [name for name, text in TEXTS.items() if "```python\n" in text])
def test_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": page}
    for block in re.finditer(r"^```python\n(.*?)^```$", TEXTS[page], re.M | re.S):
        before = TEXTS[page].count("\n", 0, block.start(1))  # tracebacks then name the page's line
        exec(compile("\n" * before + block[1], str(ROOT / page), "exec"), names)


def test_pages_are_listed():
    """docs/README.md links every page."""
    listed = TEXTS["docs/README.md"]
    assert [p.name for p in PAGES if p.name != "README.md" and f"({p.name})" not in listed] == []
