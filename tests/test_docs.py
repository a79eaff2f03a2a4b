"""Every block of Python in the README and in docs/ runs, page by page, from top to bottom."""

import re
from pathlib import Path

import pytest

import fusedrnn

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


def test_the_readme_is_short():
    assert TEXTS["README.md"].count("\n") <= 120


def test_lines_are_short():
    """At most 100 columns; rows of generated tables may be longer."""
    texts = TEXTS | {
        name: (ROOT / name).read_text() for name in ("CHANGELOG.md", "CONTRIBUTING.md")
    }
    long = [
        f"{name}:{number}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > 100 and not (name == "docs/results.md" and line.startswith("|"))
    ]
    assert not long


def test_links_lead_to_pages_and_their_headings():
    for name, text in TEXTS.items():
        prose = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        for page, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", prose):
            target = (ROOT / name).parent / page if page else ROOT / name
            assert target.exists(), f"{name} links to {page}"
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if heading else ()
            anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
            assert not heading or heading in anchors, f"{name} links to {page}#{heading}"


@pytest.mark.parametrize("page", sorted(name for name in TEXTS if name.startswith("docs/")))
def test_files_that_pages_name_exist(page):
    folders = ("benchmarks", "csrc", "examples", "fusedrnn", "tests")
    files = [f"/{p.relative_to(ROOT).as_posix()}" for f in folders for p in (ROOT / f).rglob("*.*")]
    files += [f"/{p.name}" for p in ROOT.glob("*.*")]
    text = re.sub(r"^```(?:python|cmake)\n.*?^```$", "", TEXTS[page], flags=re.M | re.S)
    named = set(re.findall(r"(?<![\w/.*<>~-])[\w/]+\.(?:py|h|cpp|cu|inc)\b", text))
    assert {n for n in named if not any(f.endswith(f"/{n}") for f in files)} == set()


def test_pages_are_listed():
    """docs/README.md links every page."""
    listed = TEXTS["docs/README.md"]
    assert [p.name for p in PAGES if p.name != "README.md" and f"({p.name})" not in listed] == []


def test_the_citation_has_the_version():
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {fusedrnn.__version__}\n" in text
