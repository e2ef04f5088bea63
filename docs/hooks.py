"""README.md as the start page; a link to a file that only a checkout has is its path."""  # noqa: INP001

from __future__ import annotations

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"\[([^\]]+)\]\(((?:\.\./)*)([^)#:]+)[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md as index.md; its links to docs/ are links beside it."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, *, page: Page, **_: object) -> str:
    """A link to what is not below docs/ becomes the path in a checkout."""
    here = (ROOT / "docs" / page.file.src_uri).parent

    def shown(link: re.Match[str]) -> str:
        path = (here / link[2] / link[3]).resolve()
        if path.is_relative_to(ROOT / "docs") and path.exists():
            return link[0]
        inside = (ROOT / link[3]) if page.file.src_uri == "index.md" else path
        if not inside.exists():
            return link[0]  # the strict build reports it
        name = str(inside.relative_to(ROOT))
        return f"`{name}`" if link[1] in name else f"{link[1]} (`{name}`)"

    return _LINK.sub(shown, markdown)
