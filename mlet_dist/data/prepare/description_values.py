"""The kinds of values in the YAML description of a table: each checks a value, and says what would be right."""

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from mlet_dist.data.column_names import (
    LABEL_NAME_RULE,
    NAME_RULE,
    TABLE_NAME_RULE,
    is_label_name,
    is_name,
    is_table_name,
)
from mlet_dist.data.prepare.description_section import check, is_integer, is_number, is_text
from mlet_dist.data.prepare.raw_formats import MAX_MIN_COUNT
from mlet_dist.data.prepare.splits import DATES
from mlet_dist.data.prepare.text_encoding import canonical_encoding
from mlet_dist.data.prepare.time_columns import parse_time
from mlet_dist.data.prepare.typed_columns import FLOAT32_MAX
from mlet_dist.data.schema import MAX_NUM_EMBEDDINGS, SPLITS


def shares(value: Any) -> dict[str, Fraction]:
    """Return the shares of the splits, which add up to 1."""
    expected = "shares of the splits, such as {train: 0.8, valid: 0.1, test: 0.1} or {train: 6/7, …}, that add up to 1"
    if not isinstance(value, Mapping) or not value or not set(value) <= set(SPLITS):
        raise ValueError(expected)
    try:
        shares = {str(split): Fraction(str(share)) for split, share in value.items()}
    except (ValueError, ZeroDivisionError):
        raise ValueError(expected) from None
    if min(shares.values()) <= 0 or sum(shares.values()) != 1:
        raise ValueError(expected)
    return shares


def starts(value: Any) -> tuple[dict[str, int | float], bool]:
    """Return the first times of valid, test or both, and whether they are dates or times."""
    if not isinstance(value, Mapping) or not value or not set(value) <= {"valid", "test"}:
        raise ValueError("the first times of valid, test or both, such as {valid: 1700000000, test: 1700600000}")
    parsed = {split: parse_time(each) for split, each in value.items()}
    kinds = {kind == DATES for _, kind in parsed.values()}
    if len(kinds) != 1 or len(set(parsed.values())) < len(parsed):
        raise ValueError("different times, as the column writes them")
    return {split: time for split, (time, _) in parsed.items()}, kinds == {True}


def files(value: Any) -> dict[str, tuple[str, ...]]:
    """Return the names or patterns of raw files by split."""
    expected = "names or patterns of raw files by split, such as {valid: valid.csv, test: [test_1.csv, test_2.csv]}"
    if not isinstance(value, Mapping) or not value or not set(value) <= set(SPLITS):
        raise ValueError(expected)
    files = {str(split): tuple(names) if isinstance(names, list) else (names,) for split, names in value.items()}
    if not all(names and all(map(is_text, names)) for names in files.values()):
        raise ValueError(expected)
    return files


def encoding(value: Any) -> str:
    """Return the canonical name of a text encoding."""
    try:
        return canonical_encoding(value if isinstance(value, str) else "")
    except ValueError:
        raise ValueError("the name of an encoding, such as utf-8, latin-1, cp1252 or utf-16") from None


def missing(value: Any) -> float | str:
    """Return what a missing number becomes: a number, ``mean`` or ``refuse``."""
    if value in ("mean", "refuse"):
        return str(value)
    if not is_number(value) or abs(value) > FLOAT32_MAX:
        raise ValueError("a number in the range of float32, mean or refuse")
    return float(value)


def spellings(value: Any) -> tuple[str, ...]:
    """Return spellings of missing values; YAML may have read them as null, numbers or booleans."""
    if not isinstance(value, list) or any(isinstance(each, list | dict) for each in value):
        raise ValueError("""a list of texts, such as ["", "NULL", '\\N']""")
    if any(isinstance(each, bool) or each is None for each in value):
        raise ValueError("a list of texts in quotes; YAML reads null, true and no without quotes as other than text")
    if "\x85" in value:
        raise ValueError(
            r"a list of texts in which \N is in single quotes, since YAML reads it in double ones as U+0085"
        )
    return tuple(dict.fromkeys(str(each) for each in value))


def labels(value: Any) -> tuple[str, ...]:
    """Return the spellings of labels."""
    if not isinstance(value, list) or not value or any(isinstance(each, list | dict | None) for each in value):
        raise ValueError('a list of one label or more, such as [2] or ["yes", click]')
    if any(isinstance(each, bool) for each in value):
        raise ValueError("a list of labels in quotes, as the column writes them; YAML reads yes and true as the same")
    return tuple(map(str, value))


def _is_characters(value: Any, most: int) -> bool:
    # Single bytes, as the parser of lines needs, and no line ends.
    return isinstance(value, str) and 0 < len(value) <= most and value.isascii() and not set(value) & set("\r\n")


text = check("text", is_text)
texts = check("a list of names", lambda value: isinstance(value, list) and value != [] and all(map(is_text, value)))
flag = check("true or false", lambda value: isinstance(value, bool))
number = check("a number", is_number)
share = check("a share from 0 to 1", lambda value: is_number(value) and 0 <= value <= 1)
seed = check("a whole number, 0 or more", lambda value: is_integer(value, 0, 2**63 - 1))
min_count = check(f"at least 1 and at most {MAX_MIN_COUNT}", lambda value: is_integer(value, 1, MAX_MIN_COUNT))
length = check("a whole number, 1 or more", lambda value: is_integer(value, 1, 2**31 - 1))
columns = check(
    "a list of columns, ranges such as C1..C26, or patterns such as C*",
    lambda value: isinstance(value, list) and value != [] and all(map(is_text, value)),
)
table_size = check(f"from 1 to {MAX_NUM_EMBEDDINGS}", lambda value: is_integer(value, 1, MAX_NUM_EMBEDDINGS))
_ESCAPE = re.compile(r"\\(t|x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|[0-9]{3})")  # as YAML leaves it without double quotes
delimiter = check(
    '1 to 8 characters without line ends ("\\t" in double quotes for a tab)',
    lambda value: (
        isinstance(value, str) and 0 < len(value) <= 8 and not set(value) & set("\r\n\0") and not _ESCAPE.search(value)
    ),
)
quote = check("one ASCII character, or null for none", lambda value: value is None or _is_characters(value, 1))
separator = check(
    '1 to 8 ASCII characters without line ends ("\\t" in double quotes for a tab)',
    lambda value: value is None or (_is_characters(value, 8) and not _ESCAPE.search(value)),
)
name = check(f"{NAME_RULE}; choose another `name`", is_name)
label_name = check(f"{LABEL_NAME_RULE}; choose another `name`", is_label_name)
table_name = check(f"{TABLE_NAME_RULE}; choose another `name`", is_table_name)
