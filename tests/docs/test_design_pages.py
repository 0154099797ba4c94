"""What the pages of docs/ name is there."""

import re
from pathlib import Path

import pytest

from tests.helpers.mlet_command import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PACKAGES = {path.parent.name for path in (ROOT / "mlet_dist").glob("*/__init__.py")} - {"launch"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_python_files_that_a_page_names_exist(page: Path) -> None:
    for path in re.findall(r"`((?:\w+/)+\w+\.py)`", page.read_text(encoding="utf-8")):
        assert (ROOT / path).exists() or (ROOT / "mlet_dist" / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_design_index_names_every_package_and_every_page() -> None:
    index = (DOCS / "design" / "index.md").read_text(encoding="utf-8")
    for package in PACKAGES:
        assert f"`mlet_dist/{package}" in index, package
    for page in (DOCS / "design").glob("*.md"):
        if page.name != "index.md":
            assert f"({page.name})" in index, page.name
            assert f"\n{page.stem}\n" in index, page.name


def test_the_design_pages_name_every_module_of_training_and_of_the_sharded_embeddings() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "design").glob("*.md"))
    for folder in ("mlet_dist/training", "mlet_dist/checkpoint", "mlet_dist/embeddings/sharded"):
        for module in (ROOT / folder).glob("*.py"):
            if module.name != "__init__.py":
                assert f"`{folder}/{module.name}`" in text, module.name
