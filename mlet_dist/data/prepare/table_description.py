"""The YAML description of a table for ``mlet prepare table``; configs/tables/movielens.yaml explains its keys."""

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from mlet_dist.config.strict_yaml import load_yaml
from mlet_dist.data.prepare import description_values as values
from mlet_dist.data.prepare.description_section import Section, one_of
from mlet_dist.data.prepare.raw_formats import (
    DenseColumn,
    JsonLines,
    LabelColumn,
    SparseColumn,
    TableSpec,
    TextFormat,
)
from mlet_dist.data.prepare.splits import EIGHTY_TEN_TEN, HALVES, SplitRule
from mlet_dist.data.schema import SAMPLE_WEIGHT
from mlet_dist.errors import UserError

_MAX_RANGE = 10_000  # columns of a range such as C1..C26
_MAX_DIGITS = 18  # of the numbers of a range


def load_table(
    path: Path, columns_of: Callable[[TextFormat | JsonLines | None], Sequence[str]] | None = None
) -> TableSpec:
    """Read the YAML description of a table; configs/tables/movielens.yaml explains its keys.

    Args:
        path: the description.
        columns_of: returns the names of the raw files' columns, given how lines are split into fields. It is called if
            the description has patterns of column names, such as ``C*``.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing or has an invalid value.
    """
    top = Section(str(path), "", load_yaml(path, "description of the table"))
    form = top.take("format", one_of("csv", "jsonl", "parquet"))
    text: TextFormat | JsonLines | None = None
    if form == "csv":
        text = _delimited(top)
    elif form == "jsonl":
        text = JsonLines(top.take("encoding", values.encoding, None))
    missing = top.take("missing_values", values.spellings, None)
    label, *more_labels = _labels(top, missing)

    def find() -> Sequence[str]:
        if isinstance(text, TextFormat) and text.columns is not None:
            return text.columns
        return () if columns_of is None else columns_of(text)

    spec = TableSpec(
        source="table",
        text=text,
        label=label,
        more_labels=tuple(more_labels),
        sample_weight=top.take("sample_weight", values.text, None),
        dense=tuple(_dense(each, missing) for each in _each_column(top.sections("dense", []), find)),
        sparse=tuple(_sparse(each, missing) for each in _each_column(top.sections("sparse"), find)),
        split=_split(top.section("split", {"by": "rows"})),
        max_malformed=top.take("max_malformed", values.share, 0.1),
    )
    top.end()
    labels = [each.column_name for each in spec.labels]
    names = {*labels} if spec.sample_weight is None else {*labels, SAMPLE_WEIGHT}
    for name in (*(d.name for d in spec.dense), *(s.name for s in spec.sparse)):
        if name in names:
            raise UserError(
                f"{path}: two features are named {name!r} ({', '.join(labels)} and sample_weight are taken); change "
                "one `name`"
            )
        names.add(name)
    _check_shared_tables(path, spec.sparse)
    if isinstance(text, TextFormat) and text.columns is not None:
        for column in spec.used_columns:  # one that it lacks may be a directory column=… of the files
            if text.columns.count(column) > 1:
                raise UserError(f"{path}: columns must name {column!r} once, since the description uses it")
    return spec


def _check_shared_tables(path: Path, features: Sequence[SparseColumn]) -> None:
    """Raise UserError if features of one table were to give their values different ids."""
    keys = ("encoding", "min_count", "num_embeddings", "max_num_embeddings", "cast")
    first: dict[str, SparseColumn] = {}
    for feature in features:
        other = first.setdefault(feature.table_name, feature)
        for key in keys:
            one, two = getattr(other, key), getattr(feature, key)
            if one != two:
                raise UserError(
                    f"{path}: features {other.name!r} and {feature.name!r} share the table {feature.table_name!r}, but "
                    f"{key} is {one!r} of one and {two!r} of the other; give both the same, or tables of their own"
                )


def _delimited(top: Section) -> TextFormat:
    header = top.take("header", values.flag, True)
    columns = None if header else tuple(top.take("columns", values.texts))
    delimiter, quote = top.take("delimiter", values.delimiter, ","), top.take("quote", values.quote, '"')
    if quote is not None and quote in delimiter:
        top.fail("quote", quote, "another character than the delimiter")
    return TextFormat(delimiter, quote, header, columns, top.take("encoding", values.encoding, None))


def _labels(top: Section, missing: tuple[str, ...] | None) -> list[LabelColumn]:
    """Return the labels: one section, or a list of several with names."""
    if not top.is_list("label"):
        return [_label(top.section("label"), missing)]
    sections = top.sections("label")
    if len(sections) < 2:
        top.fail("label", f"a list of {len(sections)}", "a section, or a list of two labels or more")
    found = [_label(each, missing, named=True) for each in sections]
    names = [each.column_name for each in found]
    if len(set(names)) < len(names):
        top.fail("label", names, "labels of different names")
    return found


def _label(section: Section, missing: tuple[str, ...] | None, *, named: bool = False) -> LabelColumn:
    column = section.take("column", values.text)
    label = LabelColumn(
        column,
        section.take("positive_from", values.number, None),
        section.take("positive", values.labels, None),
        section.take("negative", values.labels, None),
        section.take("missing_values", values.spellings, missing),
        section.take("name", values.label_name, column) if named else None,
        section.take("missing", one_of("unknown"), None) if named else None,
    )
    if label.positive is not None and label.positive_from is not None:
        section.fail("positive_from", label.positive_from, "left out where label.positive lists the labels")
    if label.negative is not None and label.positive is None:
        section.fail("negative", list(label.negative), "given together with label.positive")
    if both := set(label.positive or ()) & set(label.negative or ()):
        section.fail("negative", sorted(both), "other values than those of label.positive")
    section.end(hints=_LABEL_HINTS)
    return label


def _each_column(sections: list[Section], find: Callable[[], Sequence[str]]) -> list[Section]:
    """Return the sections with one for each column of those that have ``columns``: names, ranges or patterns."""
    found: list[Section] = []
    for section in sections:
        if not section.has("columns"):
            found.append(section)
            continue
        for key in ("column", "name"):
            if section.has(key):
                section.fail(key, section.take(key, lambda value: value), "left out where `columns` lists the columns")
        for entry in section.take("columns", values.columns):
            names = _named_columns(entry, find)
            if names is None:
                section.fail("columns", entry, f"a range of at most {_MAX_RANGE:,} columns, such as C1..C26")
            elif not names:
                section.fail("columns", entry, f"a column, range or pattern of columns; there are {_shown(find())}")
            else:
                taken = {each.column for each in found}
                found += [section.with_column(name) for name in names if name not in taken]
    return found


def _named_columns(entry: str, find: Callable[[], Sequence[str]]) -> list[str] | None:
    """Return the columns of a name, of a range such as ``C1..C26``, or of a pattern such as ``C*``.

    None if the range is too long, or looks like one but is none, such as ``c1..C26``.
    """
    span = re.fullmatch(r"(.*?)(\d+)\.\.(.*?)(\d+)", entry)
    if span is not None and span[1] == span[3]:
        if max(len(span[2]), len(span[4])) > _MAX_DIGITS or int(span[4]) - int(span[2]) >= _MAX_RANGE:
            return None
        first, last, digits = int(span[2]), int(span[4]), len(span[2]) if span[2].startswith("0") else 0
        return [f"{span[1]}{number:0{digits}}" for number in range(first, last + 1)]
    if set(entry) & set("*?["):
        return [name for name in find() if fnmatchcase(name, entry)]
    return None if ".." in entry and entry not in find() else [entry]


def _shown(names: Sequence[str]) -> str:
    return f"{', '.join(names):.300}" or "no columns"


def _dense(section: Section, missing_values: tuple[str, ...] | None) -> DenseColumn:
    column = section.take("column", values.text)
    transform = section.take("transform", one_of("log1p", "standardise", "raw"), "log1p")
    missing = section.take("missing", values.missing, 0.0)
    if missing == "mean" and transform != "standardise":
        section.fail("missing", missing, "a number or refuse; mean goes with `transform: standardise` only")
    name = section.take("name", values.name, column)
    integer = section.take("integer", values.flag, False)
    dense = DenseColumn(
        name, column, transform, missing, integer, section.take("missing_values", values.spellings, missing_values)
    )
    section.end()
    return dense


def _sparse(section: Section, missing_values: tuple[str, ...] | None) -> SparseColumn:
    column = section.take("column", values.text)
    encoding = section.take("encoding", one_of("vocabulary", "hash"), "vocabulary")
    hashed = encoding == "hash"
    separator = section.take("separator", values.separator, None)
    multi = section.take("multi_valued", values.flag, separator is not None)
    if separator is not None and not multi:
        section.fail("multi_valued", multi, "true, or left out, where separator is set")
    cast = section.take("cast", one_of("text", "integer"), None)
    if section.take("integer", values.flag, False):
        if cast == "text":
            section.fail("cast", cast, "left out where integer is true, which means `cast: integer`")
        cast = "integer"
    name = section.take("name", values.table_name, column)
    table = section.take("table", values.table_name, name)
    sparse = SparseColumn(
        name=name,
        column=column,
        table=None if table == name else table,
        encoding=encoding,
        min_count=1 if hashed else section.take("min_count", values.min_count, 1),
        num_embeddings=section.take("num_embeddings", values.table_size) if hashed else None,
        max_num_embeddings=None if hashed else section.take("max_num_embeddings", values.table_size, None),
        multi_valued=multi,
        separator=separator,
        weights=section.take("weights", values.text, None) if multi else None,
        weight_separator=section.take("weight_separator", values.separator, None) if multi else None,
        max_len=section.take("max_len", values.length, None) if multi else None,
        keep=section.take("keep", one_of("first", "last"), "first") if multi else "first",
        cast=cast,
        missing_values=section.take("missing_values", values.spellings, missing_values),
    )
    if sparse.weights is not None and sparse.weight_separator is not None:
        section.fail("weights", sparse.weights, "left out where weight_separator is set")
    if sparse.weight_separator is not None and sparse.weight_separator == separator:
        section.fail("weight_separator", separator, "another text than separator")
    section.end(hints=_SPARSE_HINTS)
    return sparse


_LABEL_HINTS = dict.fromkeys(("name", "missing"), "it goes with a list of several labels")

# Keys of sparse features that go with others only.
_SPARSE_HINTS = {
    "num_embeddings": "it goes with `encoding: hash`; for a vocabulary, max_num_embeddings limits the rows",
    "min_count": "it goes with `encoding: vocabulary`",
    "max_num_embeddings": "it goes with `encoding: vocabulary`; for hashing, set num_embeddings",
    **dict.fromkeys(
        ("weights", "weight_separator", "max_len", "keep"), "it goes with lists: set separator or multi_valued"
    ),
}


def _split(section: Section) -> SplitRule:
    by = section.take("by", one_of("rows", "time", "random", "file"))
    column = section.take("column", values.text) if by == "time" else None
    starts, are_dates = section.take("starts", values.starts, (None, False)) if by == "time" else (None, False)
    seed = section.take("seed", values.seed, 0) if by == "random" else 0
    files = section.take("files", values.files, None) if by == "file" else None
    shares = HALVES if by == "file" else EIGHTY_TEN_TEN
    if starts is None and files is None:
        shares = section.take("shares", values.shares, shares)
    if by == "file" and "train" in shares:
        section.fail("shares", sorted(shares), "shares of valid, test or both; all files but the last are train")
    if by != "file" and "train" not in shares:
        section.fail("shares", sorted(shares), "shares of train and of valid, test or both")
    section.end()
    return SplitRule(by, dict(shares), seed, column, starts, are_dates, files)
