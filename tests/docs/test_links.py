"""Every link and every repository path in the Markdown files leads somewhere."""

import re
from pathlib import Path

import pytest

from tests.helpers.mlet_command import ROOT

DOCS = ROOT / "docs"
# Copies that `make docs` writes; their originals are checked.
GENERATED = {DOCS / "benchmarks", DOCS / "_build"}
PAGES = sorted(
    path
    for path in [*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "benchmarks" / "results").glob("*.md")]
    if not GENERATED & set(path.parents) and path.name not in {"changelog.md", "contributing.md", "security.md"}
)
TOP_FOLDERS = ("mlet_dist", "benchmarks", "configs", "docs", "k8s", "launch", "tests", r"\.ci", r"\.github")
FENCE = re.compile(r"^(`{3,}|:{3,}).*?^\1", re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    """The text without blocks of code."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The anchors that code hosts and MyST give to headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose(path), re.MULTILINE):
        text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        number = sum(each == slug or re.fullmatch(rf"{re.escape(slug)}-\d+", each) is not None for each in found)
        found.add(f"{slug}-{number}" if number else slug)
    return found


def broken_links(path: Path) -> list[str]:
    """Relative links whose file or anchor does not exist."""
    broken = []
    for target in re.findall(r"(?<!`)\]\(<?([^)\s>]+)>?\)", prose(path)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = path if not name else path.parent / name
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    return broken


def missing_paths(path: Path) -> list[str]:
    """Paths of the repository in backticks that do not exist."""
    pattern = rf"`((?:{'|'.join(TOP_FOLDERS)})/[\w./-]*)`"
    return [name for name in re.findall(pattern, prose(path)) if not (ROOT / name).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_of_a_page_exist(page: Path) -> None:
    assert broken_links(page) == []
    assert missing_paths(page) == []


def test_what_leads_nowhere_is_found(tmp_path: Path) -> None:
    other = tmp_path / "other.md"
    other.write_text("# One `mlet plan`, two\n\n```text\n# no heading\n```\n\n## One\n\n## One\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md) [b](other.md#one-mlet-plan-two) [c](other.md#one-1) [d](https://example.org/x)\n"
        "[e](gone.md) [f](other.md#no-heading) [g](#nowhere) `mlet_dist/gone.py` `mlet_dist/errors.py` `docs/*.md`\n"
        "```text\n[h](code.md)\n```\n"
    )
    assert broken_links(page) == ["gone.md", "other.md#no-heading", "#nowhere"]
    assert missing_paths(page) == ["mlet_dist/gone.py"]
