"""The YAML description of a table for ``mlet prepare table``; configs/tables/movielens.yaml explains its keys."""

from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from mlet_dist.config.parser import load_yaml
from mlet_dist.data.prepare.raw_formats import (
    LABEL,
    MAX_MIN_COUNT,
    DenseColumn,
    LabelColumn,
    SparseColumn,
    TableSpec,
    TextFormat,
)
from mlet_dist.data.prepare.splits import EIGHTY_TEN_TEN, HALVES, SplitRule
from mlet_dist.data.prepare.typed_columns import FLOAT32_MAX
from mlet_dist.data.schema import MAX_NUM_EMBEDDINGS, NAME_RULE, SPLITS, TABLE_NAME_RULE, is_name, is_table_name
from mlet_dist.errors import UserError

_REQUIRED = object()  # the default of a key that has none


def load_table(path: Path) -> TableSpec:
    """Read the YAML description of a table; configs/tables/movielens.yaml explains its keys.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing or has an invalid value.
    """
    top = _Section(str(path), "", load_yaml(path, "description of the table"))
    form = top.take("format", _one_of("csv", "parquet"))
    text = None
    if form == "csv":
        header = top.take("header", _flag, True)
        columns = None if header else tuple(top.take("columns", _texts))
        text = TextFormat(top.take("delimiter", _character, ","), top.take("quote", _quote, '"'), header, columns)
        if text.delimiter == text.quote:
            top.fail("quote", text.quote, "another character than the delimiter")
    spec = TableSpec(
        source="table",
        text=text,
        label=_label(top.section("label")),
        dense=tuple(_dense(each) for each in top.sections("dense", [])),
        sparse=tuple(_sparse(each, form == "csv") for each in top.sections("sparse")),
        split=_split(top.section("split", {"by": "rows"})),
        max_malformed=top.take("max_malformed", _share, 0.1),
    )
    top.end()
    names: set[str] = {LABEL}
    for name in (*(d.name for d in spec.dense), *(s.name for s in spec.sparse)):
        if name in names:
            raise UserError(f"{path}: two features are named {name!r} (label is the label's name); change one `name`")
        names.add(name)
    if text is not None and text.columns is not None:
        for column in spec.used_columns:
            if text.columns.count(column) != 1:
                raise UserError(f"{path}: columns must name {column!r} exactly once, since the description uses it")
    return spec


def _label(section: "_Section") -> LabelColumn:
    label = LabelColumn(section.take("column", _text), section.take("positive_from", _number, None))
    section.end()
    return label


def _dense(section: "_Section") -> DenseColumn:
    column = section.take("column", _text)
    transform = section.take("transform", _one_of("log1p", "standardise", "raw"), "log1p")
    missing = section.take("missing", _missing, 0.0)
    if missing == "mean" and transform != "standardise":
        section.fail("missing", missing, "a number or refuse; mean goes with `transform: standardise` only")
    name = section.take("name", _name, column)
    dense = DenseColumn(name, column, transform, missing, section.take("integer", _flag, False))
    section.end()
    return dense


def _sparse(section: "_Section", is_text: bool) -> SparseColumn:
    column = section.take("column", _text)
    encoding = section.take("encoding", _one_of("vocabulary", "hash"), "vocabulary")
    hashed = encoding == "hash"
    min_count = 1 if hashed else section.take("min_count", _min_count, 1)
    rows = section.take("num_embeddings", _table_size) if hashed else None
    separator = section.take("separator", _separator, None) if is_text else None
    multi = separator is not None if is_text else section.take("multi_valued", _flag, False)
    weights = section.take("weights", _text, None) if multi else None
    integer = section.take("integer", _flag, False) if is_text else False
    name = section.take("name", _table_name, column)
    section.end()
    return SparseColumn(name, column, encoding, min_count, rows, multi, separator, weights, integer)


def _split(section: "_Section") -> SplitRule:
    by = section.take("by", _one_of("rows", "time", "random", "file"))
    column = section.take("column", _text) if by == "time" else None
    starts = section.take("starts", _starts, None) if by == "time" else None
    seed = section.take("seed", _seed, 0) if by == "random" else 0
    shares = HALVES if by == "file" else EIGHTY_TEN_TEN
    if starts is None:
        shares = section.take("shares", _shares, shares)
    if by == "file" and set(shares) != {"valid", "test"}:
        section.fail("shares", sorted(shares), "shares of valid and test; all files but the last are train")
    if by != "file" and set(shares) != set(SPLITS):
        section.fail("shares", sorted(shares), "shares of train, valid and test")
    section.end()
    return SplitRule(by, dict(shares), seed, column, starts)


class _Section:
    """A mapping of the YAML file; keys are taken out one by one, and ``end`` raises for any that remain."""

    def __init__(self, path: str, key: str, content: Any) -> None:
        if not isinstance(content, dict):
            raise UserError(
                f"{path}: {key or 'the file'} is {content!r:.80}; it must be a section of `key: value` lines"
            )
        self._path, self._key, self._content = path, key, dict(content)

    def take(self, key: str, parse: Callable[[Any], Any], default: Any = _REQUIRED) -> Any:
        """Return the value of ``key``; ``parse`` raises ValueError with a description of valid values."""
        if key not in self._content:
            if default is _REQUIRED:
                raise UserError(f"{self._path}: key {self._within(key)!r} is missing")
            return default if not isinstance(default, str) else self._parsed(key, parse, default)
        return self._parsed(key, parse, self._content.pop(key))

    def section(self, key: str, default: Any = _REQUIRED) -> "_Section":
        """Return the value of ``key`` as a section."""
        return _Section(self._path, self._within(key), self.take(key, lambda value: value, default))

    def sections(self, key: str, default: Any = _REQUIRED) -> list["_Section"]:
        """Return the value of ``key``, a list, as sections; without a default it must not be empty."""
        entries = self.take(key, _list if default is _REQUIRED else _any_list, default)
        return [_Section(self._path, f"{self._within(key)}[{i}]", entry) for i, entry in enumerate(entries)]

    def end(self) -> None:
        """Raise UserError if a key was not taken."""
        for key in self._content:
            raise UserError(f"{self._path}: {self._within(str(key))} is not a valid key here")

    def fail(self, key: str, value: Any, expected: str) -> None:
        """Raise UserError for the value of ``key``."""
        raise UserError(f"{self._path}: {self._within(key)} is {value!r:.80}; it must be {expected}")

    def _parsed(self, key: str, parse: Callable[[Any], Any], value: Any) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            return self.fail(key, value, str(error))

    def _within(self, key: str) -> str:
        return f"{self._key}.{key}" if self._key else key


def _check(expected: str, is_valid: Callable[[Any], bool]) -> Callable[[Any], Any]:
    """Return a function for ``take`` that returns valid values and raises ValueError for others."""

    def parse(value: Any) -> Any:
        if not is_valid(value):
            raise ValueError(expected)
        return value

    return parse


def _one_of(*choices: str) -> Callable[[Any], Any]:
    return _check(" or ".join(choices), lambda value: value in choices)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < float("inf")


def _is_integer(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _shares(value: Any) -> dict[str, Fraction]:
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


def _starts(value: Any) -> dict[str, int]:
    if not isinstance(value, Mapping) or set(value) != {"valid", "test"}:
        raise ValueError("the first times of valid and test, such as {valid: 1700000000, test: 1700600000}")
    if not all(_is_integer(each, -(2**63), 2**63 - 1) for each in value.values()) or value["valid"] == value["test"]:
        raise ValueError("two different whole numbers, as in the column; microseconds since 1970 for dates and times")
    return dict(value)


def _missing(value: Any) -> float | str:
    if value in ("mean", "refuse"):
        return str(value)
    if not _is_number(value) or abs(value) > FLOAT32_MAX:
        raise ValueError("a number in the range of float32, mean or refuse")
    return float(value)


def _is_characters(value: Any, most: int) -> bool:
    # Single bytes, as the parser of lines needs, and no line ends.
    return isinstance(value, str) and 0 < len(value) <= most and value.isascii() and not set(value) & set("\r\n")


_list = _check("a list of one entry or more", lambda value: isinstance(value, list) and value != [])
_any_list = _check("a list", lambda value: isinstance(value, list))
_text = _check("text", _is_text)
_texts = _check("a list of names", lambda value: isinstance(value, list) and value != [] and all(map(_is_text, value)))
_flag = _check("true or false", lambda value: isinstance(value, bool))
_number = _check("a number", _is_number)
_share = _check("a share from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
_seed = _check("a whole number, 0 or more", lambda value: _is_integer(value, 0, 2**63 - 1))
_min_count = _check(f"at least 1 and at most {MAX_MIN_COUNT}", lambda value: _is_integer(value, 1, MAX_MIN_COUNT))
_table_size = _check(f"from 1 to {MAX_NUM_EMBEDDINGS}", lambda value: _is_integer(value, 1, MAX_NUM_EMBEDDINGS))
_character = _check('one ASCII character ("\\t" for a tab)', lambda value: _is_characters(value, 1))
_quote = _check("one ASCII character, or null for none", lambda value: value is None or _is_characters(value, 1))
_separator = _check(
    "1 to 8 ASCII characters without line ends", lambda value: value is None or _is_characters(value, 8)
)
_name = _check(f"{NAME_RULE}; choose another `name`", is_name)
_table_name = _check(f"{TABLE_NAME_RULE}; choose another `name`", is_table_name)
