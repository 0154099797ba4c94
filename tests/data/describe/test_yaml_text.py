"""Tests of the YAML that `mlet describe` writes: every text is read back as the same text."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mlet_dist.config.strict_yaml import parse_yaml
from mlet_dist.data.describe.yaml_text import ranges, yaml_list, yaml_scalar
from mlet_dist.data.prepare.table_description import _named_columns

HARD = ("y", "No", "1e3", "~", "007", "C1: x", "#c", "null", "", " a ", "2020-07-04", "- x", "{a}", "[a]", "*z", "&b")
HARD += (
    "!t",
    "%d",
    "@u",
    "`q`",
    "'",
    '"',
    "a\tb",
    "\x01",
    "é",
    "😀",
    "0x1F",
    "1_000",
    "1:30",
    ".5",
    ".inf",
    "=",
    "<<",
    "|",
)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@pytest.mark.parametrize("text", HARD)
def test_hard_texts(text: str) -> None:
    assert parse_yaml(f"key: {yaml_scalar(text)}") == {"key": text}
    assert parse_yaml(f"key: {yaml_list([text, text], 5)}") == {"key": [text, text]}


@given(st.lists(texts, min_size=1, max_size=40))
def test_any_texts(values: list[str]) -> None:
    assert parse_yaml(f"key:\n  {yaml_list(values, 2)}") == {"key": values}
    for value in values:
        assert yaml.safe_load(yaml_scalar(value)) == value


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**63))
def test_any_numbers(number: float) -> None:
    found = parse_yaml(yaml_scalar(number))
    assert isinstance(found, int | float)
    assert found == pytest.approx(number, rel=1e-15, abs=1e-17)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["C1", "C2", "C3", "D"], ["C1..C3", "D"]),
        (["C1", "C2"], ["C1", "C2"]),
        (["x8", "x9", "x10", "x11"], ["x8..x11"]),
        (["x08", "x09", "x10"], ["x08..x10"]),
        (["x1", "x02", "x3"], ["x1", "x02", "x3"]),
        (["x0", "x1", "x2", "x4", "x5", "x6"], ["x0..x2", "x4..x6"]),
        (["a1_1", "a1_2", "a1_3"], ["a1_1..a1_3"]),
        (["1", "2", "3"], ["1..3"]),
        (["v٣", "v٤", "v٥"], ["v٣", "v٤", "v٥"]),  # digits that are not ASCII
    ],
)
def test_ranges(names: list[str], expected: list[str]) -> None:
    assert ranges(names) == expected


@given(st.lists(st.from_regex(r"[a-c]{0,2}[0-9]{1,3}", fullmatch=True), unique=True, max_size=30))
def test_ranges_name_the_columns_that_the_description_expands_them_to(names: list[str]) -> None:
    names.sort(key=lambda name: (name.rstrip("0123456789"), len(name), name))
    assert [name for entry in ranges(names) for name in _named_columns(entry, lambda: names)] == names
