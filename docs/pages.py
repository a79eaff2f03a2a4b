"""What mkdocs.yml adds to the pages of docs/: the reference, and pages from other folders."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import fusedrnn

ROOT = Path(__file__).parents[1]
ELSEWHERE = ("CHANGELOG.md", "CONTRIBUTING.md", "examples/README.md")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    names = [name for name in fusedrnn.__all__ if not name.startswith("_")]
    objects = [f"fusedrnn.{name}" for name in names]
    objects += ["fusedrnn.modules.AllStates", "fusedrnn.swap.Report", "fusedrnn.swap.Layer"]
    reference = "# Reference\n\n" + "\n\n".join(f"::: {name}" for name in objects)
    files.append(File.generated(config, "reference.md", content=reference))
    for name in (*ELSEWHERE, *(f"examples/{p.name}" for p in (ROOT / "examples").glob("*.py"))):
        text = (ROOT / name).read_text().replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to pages from elsewhere, which are beside those of docs/ here."""
    for name in ELSEWHERE:
        markdown = markdown.replace(f"](../{name}", f"]({name}")
    return markdown
