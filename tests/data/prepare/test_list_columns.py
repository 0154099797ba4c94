"""Tests of mlet_dist.data.prepare.list_columns."""

from typing import Any

import pyarrow as pa
import pytest

from mlet_dist.data.prepare.list_columns import BEYOND, EMPTY, SPLIT, list_values
from mlet_dist.data.prepare.raw_formats import SparseColumn


def texts(*values: str | None) -> pa.Array:
    return pa.array(values, pa.string()).dictionary_encode()


def lists(raw: pa.Array, raw_weights: pa.Array | None = None, **keys: Any) -> tuple[list[Any], list[int], Any, Any]:
    """Return the lists, the malformed rows, the counts and the weights."""
    found, weights = list_values(raw, raw_weights, SparseColumn("g", "g", multi_valued=True, **keys))
    invalid = sorted(set(found.invalid) | set(weights.invalid if weights is not None else ()))
    values = [None if row in invalid else value for row, value in enumerate(found.values.to_pylist())]
    if weights is None:
        return values, invalid, found.counts, None
    shown = [None if row in invalid else value for row, value in enumerate(weights.values.to_pylist())]
    for value, weight in zip(values, shown, strict=True):
        assert value is None or len(value) == len(weight)
    return values, invalid, found.counts, shown


def test_empty_elements_are_left_out_and_counted_by_row() -> None:
    raw = texts("3|4|", "3|4|", "|", "", None, "a||b", "x")
    values, invalid, counts, _ = lists(raw, separator="|")
    assert values == [["3", "4"], ["3", "4"], [], [], [], ["a", "b"], ["x"]]
    assert invalid == []
    assert counts == {EMPTY: 1 + 1 + 2 + 1, BEYOND: 0, SPLIT: 4}


def test_missing_elements_follow_the_spellings_of_the_column() -> None:
    assert lists(texts("1|NULL|2|nan"), separator="|", cast="integer")[0] == [["1", "2"]]
    assert lists(texts("a|NULL"), separator="|")[0] == [["a", "NULL"]]
    assert lists(texts("a|NULL"), separator="|", missing_values=("NULL",))[0] == [["a"]]
    assert lists(pa.array([["a", None], [None]]))[0] == [["a"], []]
    assert lists(pa.array([[1, None], [-1]]), missing_values=("-1",))[0] == [["1"], []]
    assert lists(pa.array([[1.0, float("nan")], None]))[0] == [["1"], []]


@pytest.mark.parametrize("separator", [",", ", ", None])
def test_lists_in_brackets(separator: str | None) -> None:
    raw = texts("[27, 9]", "[1]", "[]", "['a', 'b c']", '["x","y"]', "[None, 3]", " [ 5 ,6 ] ", "[1.0, nan]")
    expected = [["27", "9"], ["1"], [], ["a", "b c"], ["x", "y"], ["3"], ["5", "6"], ["1.0"]]
    assert lists(raw, separator=separator)[:2] == (expected, [])


def test_lists_in_brackets_of_other_separators() -> None:
    assert lists(texts("[27  9]", "[1]"), separator=" ")[0] == [["27", "9"], ["1"]]
    assert lists(texts("[a|b]", "c|d"), separator="|")[0] == [["a", "b"], ["c", "d"]]
    # Brackets that do not enclose the whole text belong to its values, and parentheses always do.
    assert lists(texts("[a]|[b]", "(no genres listed)"), separator="|")[0] == [["[a]", "[b]"], ["(no genres listed)"]]


def test_white_space_around_elements_is_no_part_of_them() -> None:
    assert lists(texts("a | b", "a|b ", " a", " | "), separator="|")[0] == [["a", "b"], ["a", "b"], ["a"], []]
    assert lists(texts("Drama, Crime", "Drama,Crime"), separator=",")[0] == [["Drama", "Crime"]] * 2
    assert lists(texts("New York|b  c"), separator="|")[0] == [["New York", "b  c"]]
    pairs = lists(texts("a : 1 | b :2"), separator="|", weight_separator=":")
    assert (pairs[0], pairs[3]) == ([["a", "b"]], [[1.0, 2.0]])


def test_lists_as_numpy_writes_them() -> None:
    raw = texts("[27 9]", "[ 1  20 3]", "[4]", "['a' 'b c' 'd']", "[0.5 1.]", "[New York, x]", "[-1 1e3]")
    expected = [
        ["27", "9"],
        ["1", "20", "3"],
        ["4"],
        ["a", "b c", "d"],
        ["0.5", "1."],
        ["New York", "x"],
        ["-1", "1e3"],
    ]
    assert lists(raw)[:2] == (expected, [])


def test_numbers_where_texts_are_split_are_lists_of_one() -> None:
    assert lists(pa.array([5, None, 7]), separator="|")[:2] == ([["5"], [], ["7"]], [])
    assert lists(pa.array([5.0, None, 7.5]), separator="|")[:2] == ([["5"], [], None], [2])
    assert lists(pa.array([5, 7]))[1] == [0, 1]


def test_texts_that_are_no_lists_are_malformed() -> None:
    assert lists(texts("[1, 2]", "1, 2", "x"), separator=None)[:2] == ([["1", "2"], None, None], [1, 2])
    assert lists(texts('["a,b", "c"]'), separator=",")[1] == [0]  # the separator within a quoted text
    assert lists(texts("1|x", "2"), separator="|", cast="integer")[:2] == ([None, ["2"]], [0])
    assert lists(pa.array([3, 4]))[1] == [0, 1]
    assert lists(pa.array([[1.5], [2.0]]))[:2] == ([None, ["2"]], [0])


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_view(pa.int64()), pa.list_(pa.uint64())]
)
def test_every_kind_of_arrow_list(kind: pa.DataType) -> None:
    raw = pa.array([[1, 2], None, [], [3]], kind)
    assert lists(raw)[0] == [["1", "2"], [], [], ["3"]]
    assert lists(raw[1:])[0] == [[], [], ["3"]]
    fixed = pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int64(), 2))
    assert lists(fixed)[0] == [["1", "2"], [], ["3", "4"]]
    assert lists(fixed[1:])[0] == [[], ["3", "4"]]
    assert lists(pa.nulls(2))[0] == [[], []]


@pytest.mark.parametrize(
    ("elements", "expected"),
    [
        (pa.array([True, False]), ["true", "false"]),
        (pa.array([b"a", b"b"]), ["a", "b"]),
        (pa.array(["a", "b"], pa.string_view()), ["a", "b"]),
        (pa.array(["a", "a"]).dictionary_encode(), ["a", "a"]),
    ],
)
def test_every_type_of_element(elements: pa.Array, expected: list[str]) -> None:
    assert lists(pa.ListArray.from_arrays(pa.array([0, 2]), elements))[0] == [expected]


def test_the_longest_lists_are_cut() -> None:
    raw = texts("a|b||c", "d", "e|f")
    first = lists(raw, separator="|", max_len=2)
    assert first[0] == [["a", "b"], ["d"], ["e", "f"]]
    assert first[2] == {EMPTY: 1, BEYOND: 1, SPLIT: 2}
    assert lists(raw, separator="|", max_len=2, keep="last")[0] == [["b", "c"], ["d"], ["e", "f"]]
    assert lists(raw, separator="|", max_len=1, keep="last")[0] == [["c"], ["d"], ["f"]]


def test_weights_belong_to_the_values_at_their_place() -> None:
    values = texts("a|b|", "a|b|", "b|c", "a||b", "a|b|c", "x|y", "q|r")
    weights = texts("1|2", "3|4|", "1|", "1|9|2", "1|2|3", "1|2|3", "1|z")
    found, invalid, _, shown = lists(values, weights, separator="|", weights="w", max_len=2)
    # Row 2 lacks a weight, row 5 has one too many, and row 6 has one that is no number.
    assert invalid == [2, 5, 6]
    assert found == [["a", "b"], ["a", "b"], None, ["a", "b"], ["a", "b"], None, None]
    assert shown == [[1, 2], [3, 4], None, [1, 2], [1, 2], None, None]
    last = lists(values[4:5], weights[4:5], separator="|", weights="w", max_len=2, keep="last")
    assert (last[0], last[3]) == ([["b", "c"]], [[2, 3]])


def test_weights_of_arrow_lists() -> None:
    values = pa.array([["a", None, "b"], ["c"], None, ["d", "e"]])
    weights = pa.array([[1.0, 2.0, 3.0], [4.0], None, [5.0, None]])
    assert lists(values, weights, weights="w")[:4:3] == ([["a", "b"], ["c"], [], None], [[1, 3], [4], [], None])


def test_pairs_of_a_value_and_a_weight() -> None:
    raw = texts("a:1|b:0.5|", "x:y:2", "c", "d:z", "", "a:1|b:0.5|")
    found, invalid, counts, weights = lists(raw, separator="|", weight_separator=":")
    assert found == [["a", "b"], ["x:y"], None, None, [], ["a", "b"]]
    assert weights == [[1, 0.5], [2], None, None, [], [1, 0.5]]
    assert invalid == [2, 3]
    assert counts[BEYOND] == 0
    assert lists(pa.array([["7:1", "8:2"]]), weight_separator=":", cast="integer")[3] == [[1, 2]]
