"""Sphinx extension: pages made of Markdown files that lie elsewhere in the repository, and links to those files.

The pages are written into docs/ before each build and are not committed. A link such as `../benchmarks/results/X.md`
is right on a code host, where the file is; on the site it becomes a link to the file's page.
"""

import os
import re
from pathlib import Path
from typing import Any

from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.transforms import SphinxTransform

_DOCS = Path(__file__).resolve().parent.parent
_ROOT = _DOCS.parent
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def repository_pages() -> dict[Path, str]:
    """Files that become pages, each with its page's name in docs/."""
    pages = {_ROOT / f"{name.upper()}.md": name for name in ("changelog", "contributing", "security")}
    pages |= {path: f"benchmarks/{path.stem}" for path in sorted((_ROOT / "benchmarks" / "results").glob("*.md"))}
    return {path: page for path, page in pages.items() if path.exists()}


def write_pages(app: Sphinx, config: Config) -> None:
    """Write the pages whose text has changed."""
    wanted = {_DOCS / f"{page}.md": _as_page(path, _DOCS / f"{page}.md") for path, page in repository_pages().items()}
    for page in (_DOCS / "benchmarks").glob("*.md"):
        if page not in wanted:
            page.unlink()
    for page, text in wanted.items():
        page.parent.mkdir(exist_ok=True)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def _as_page(path: Path, page: Path) -> str:
    """The file's text with its relative links as they are seen from the page."""
    return _LINK.sub(lambda link: os.path.relpath(path.parent / link[1], page.parent), path.read_text(encoding="utf-8"))


class LinkPages(SphinxTransform):
    """Turn a link to a repository file that has a page, or to README.md, into a link to the page."""

    default_priority = 400

    def apply(self, **_: Any) -> None:
        pages = {str(path.with_suffix("")): page for path, page in repository_pages().items()}
        pages[str(_ROOT / "README")] = "index"
        for link in self.document.findall(addnodes.pending_xref):
            if link.get("refdomain") == "doc" and os.path.normpath(_DOCS / link["reftarget"]) in pages:
                link["reftarget"] = pages[os.path.normpath(_DOCS / link["reftarget"])]


def setup(app: Sphinx) -> dict[str, bool]:
    """Write the pages, and resolve links to them."""
    app.connect("config-inited", write_pages)
    app.add_transform(LinkPages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
