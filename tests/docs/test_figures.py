"""The committed figures are what their script draws, and every one of them is a picture that stands alone."""

import importlib
import re
from collections.abc import Iterator
from types import ModuleType
from xml.etree import ElementTree

import pytest

from tests.helpers.mlet_command import ROOT

FIGURES = ROOT / "docs" / "figures"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FIGURES)  # as for a script that is run
        yield importlib.import_module("make_figures")


def test_the_script_draws_the_committed_figures_byte_for_byte(script: ModuleType) -> None:
    assert {path.name for path in FIGURES.glob("*.svg")} == set(script.FIGURES)
    for name, draw in script.FIGURES.items():
        assert (FIGURES / name).read_bytes() == draw().encode(), f"run python docs/figures/make_figures.py: {name}"


def test_figures_have_a_background_a_title_and_nothing_from_the_network(script: ModuleType) -> None:
    for name in script.FIGURES:
        root = ElementTree.parse(FIGURES / name).getroot()
        title, background = list(root)[:2]
        assert title.tag.endswith("title"), name
        assert title.text, name
        assert background.get("fill") == importlib.import_module("figure").BACKGROUND, name
        assert re.findall(r"https?://[^\"' ]+", (FIGURES / name).read_text()) == ["http://www.w3.org/2000/svg"], name


def test_text_stays_inside_the_figure(script: ModuleType) -> None:
    for name in script.FIGURES:
        root = ElementTree.parse(FIGURES / name).getroot()
        width, height = (float(root.get(key) or 0) for key in ("width", "height"))
        for element in root.iter("{http://www.w3.org/2000/svg}text"):
            x, y = float(element.get("x") or 0), float(element.get("y") or 0)
            size, letters = float(element.get("font-size") or 0), len(element.text or "")
            half = 0.62 * size * letters / 2  # of a wide font
            left, right = (x, x + 2 * half) if element.get("text-anchor") == "start" else (x - half, x + half)
            assert 0 <= left, (name, element.text)
            assert right <= width, (name, element.text)
            assert size <= y <= height - 4, (name, element.text)
