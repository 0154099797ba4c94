"""Tests of mlet_dist.data.prepare.text_lines: the classification of lines, against a check of each line by itself."""

import csv
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from mlet_dist.data.prepare.text_lines import MAX_EXAMPLES, classify_lines, plain_lines

# A field without quotes, or a quoted field in which quotes are doubled.
FIELD = r'(?:[^",]*|"(?:[^"]|"")*")'


def one_by_one(line: bytes, quoted: bool) -> int | None:
    """Return the number of fields of a line, or None if it cannot be parsed."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return None
    if "\r" in text or "\0" in text:
        return None
    if not quoted:
        return text.count(",") + 1
    if re.fullmatch(f"{FIELD}(?:,{FIELD})*", text) is None:
        return None
    return len(next(csv.reader([text]), [""]))


FRAGMENTS = st.sampled_from([b"a", b",", b'"', b'""', b'","', b"\xff", b"\r", b"\0", "é".encode(), b" "])
LINES = st.lists(FRAGMENTS, max_size=9).map(b"".join)


@settings(deadline=None)
@given(lines=st.lists(LINES, max_size=8), quoted=st.booleans(), fields=st.integers(1, 4), skip=st.booleans())
def test_any_lines(lines: list[bytes], quoted: bool, fields: int, skip: bool) -> None:
    lines = [line.rstrip(b"\r") for line in lines]  # a carriage return before the line end is part of it
    block = b"".join(line + b"\n" for line in lines) or b"\n"
    lines = lines or [b""]
    found = classify_lines(block, fields, ",", '"' if quoted else None, skip)
    first = 1 if skip else 0
    good = [i for i, line in enumerate(lines) if i >= first and line and one_by_one(line, quoted) == fields]
    bad = [i for i, line in enumerate(lines) if i >= first and line and i not in good]
    assert found.numbers.tolist() == good
    assert (found.malformed, sorted(found.reasons)) == (len(bad), bad[:MAX_EXAMPLES])
    assert found.text == b"".join(lines[i] + b"\n" for i in good)
    assert (found.count, found.passed) == (len(good) + len(bad), len(lines))


@settings(deadline=None)
@given(lines=st.lists(LINES, min_size=1, max_size=4), quoted=st.booleans())
def test_plain_lines_can_only_have_a_wrong_number_of_fields(lines: list[bytes], quoted: bool) -> None:
    block = b"".join(line + b"\n" for line in lines)
    found = plain_lines(block, '"' if quoted else None)
    wanted = all(line and one_by_one(line, False) is not None and not (quoted and b'"' in line) for line in lines)
    assert (found is not None) == wanted
    if found is not None:
        assert (found.text, found.numbers.tolist()) == (block, list(range(len(lines))))
        assert (found.count, found.passed, found.malformed) == (len(lines), len(lines), 0)
    assert plain_lines(b"x" * (1 << 20) + b"\n", None) is None
