"""Tests of the form of delimited lines that `mlet describe` guesses."""

import random

import pytest

from mlet_dist.data.describe.delimited_head import DELIMITERS, guess_delimiter, has_header, split_head, split_line


def lines_of(delimiter: str, rows: int = 50, fields: int = 4) -> list[str]:
    rng = random.Random(1)
    return [delimiter.join(f"{rng.choice('abc')}{rng.randrange(20)}" for _ in range(fields)) for _ in range(rows)]


@pytest.mark.parametrize("delimiter", DELIMITERS)
def test_every_delimiter_is_found(delimiter: str) -> None:
    assert guess_delimiter(lines_of(delimiter)) == (delimiter, '"', 4)


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        # The delimiter is the sign that occurs equally often in all lines, the first one too.
        (["u,tags", *("7,a|b", "8,c", "9,a|b|c") * 9], (",", '"', 2)),
        (["user;price", *("u1;1,5", "u2;20,25", "u3;7,0") * 9], (";", '"', 2)),
        (["a\tb", *("Smith, John\t1", "Doe, Jane\t0") * 9], ("\t", '"', 2)),
        (["39, Private, 0", "50, Self-emp, 1"], (", ", '"', 3)),
        (["a, b,c", *("1, 2,3",) * 9], (",", '"', 3)),
        (["1::1193::5::978300760", "1::661::3::978302109"], ("::", '"', 4)),
        # Quotes that enclose fields, and those that do not.
        (['a,"b, c"', *('1,"x, y"', "2,z") * 9], (",", '"', 2)),
        (["'a','b'", *("'1','x, y'", "'2','z'") * 9], (",", "'", 2)),
        (["size,brand", *('15" screen,b', "a 7 inch one,c") * 9], (",", None, 2)),
        (["a,b", *("it's,x", "don't,y") * 9], (",", '"', 2)),
        # A few damaged lines do not matter; lines without common fields are no table.
        (["a,b", *("1,2",) * 30, "1,2,3", "4"], (",", '"', 2)),
        (["a text", "of some, words", "and, of, others"], None),
        (["one", "two", "three"], None),
    ],
)
def test_delimiter_and_quote(lines: list[str], expected: object) -> None:
    assert guess_delimiter(lines) == expected


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ('a,"b, ""c""",d', ["a", 'b, "c"', "d"]),
        ('"",x', ["", "x"]),
        ('x,"', None),
        ('x,"y"z', None),
        ('x"y,z', None),
        ("x\0,y", None),
        ("x\r,y", None),
    ],
)
def test_fields_of_a_line_are_those_of_prepare(line: str, fields: list[str] | None) -> None:
    assert split_line(line, ",", '"') == fields


@pytest.mark.parametrize(
    ("first", "rows", "expected"),
    [
        (["user", "click"], [["u1", "0"], ["u2", "1"]], True),
        (["0", "u1"], [["1", "u1"], ["0", "u2"]], False),
        (["label", "2019"], [["0", "x"], ["1", "y"]], True),  # a number is the name of a column of texts
        (["red", "small"], [["red", "large"], ["blue", "small"]], False),  # values that occur again
        (["colour", "size"], [["red", "large"], ["blue", "small"]], True),
        (["", "a", "b"], [["0", "x", "1"], ["1", "y", "0"]], True),  # pandas writes its index without a name
        (["0", "1", "2"], [["5", "x", "1"], ["6", "y", "0"]], True),  # and numbers columns without names
        (["", "", "x"], [["", "1", "x"]], False),
        (["NULL", "3"], [["1", "4"], ["2", "5"]], False),  # a missing value is no name
        (["city", "city"], [["a", "b"], ["c", "d"]], False),
    ],
)
def test_header(first: list[str], rows: list[list[str]], expected: bool) -> None:
    assert has_header(first, rows) is expected


def test_columns_and_malformed_lines() -> None:
    found = split_head(["user,y", "a,0", "b", "c,1", *("d,1",) * 9], None)
    assert found is not None
    assert found.names == ("user", "y")
    assert [column.to_pylist()[:2] for column in found.columns] == [["a", "c"], ["0", "1"]]
    assert found.malformed == 1
    found = split_head(["3\t1\t7"] * 5, None)
    assert found is not None
    assert (found.text.header, found.text.columns) == (False, ("c1", "c2", "c3"))
