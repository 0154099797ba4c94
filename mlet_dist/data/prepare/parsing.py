"""Parsing of a block of lines or a Parquet row group into typed columns, with a reason for each malformed line."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from mlet_dist.data.prepare.chunks import (
    TIME,
    ChunkInfo,
    Rejected,
    dense_column,
    label_column,
    sparse_column,
    weight_column,
)
from mlet_dist.data.prepare.json_lines import json_columns
from mlet_dist.data.prepare.list_columns import list_values
from mlet_dist.data.prepare.raw_blocks import Block, open_parquet
from mlet_dist.data.prepare.raw_formats import JsonLines, TableSpec, TextFormat
from mlet_dist.data.prepare.text_lines import MAX_EXAMPLES, Lines, classify_lines, free_character, plain_lines
from mlet_dist.data.prepare.time_columns import KINDS, TypedTimes, time_values
from mlet_dist.data.prepare.typed_columns import (
    InvalidRows,
    TypedColumn,
    dense_values,
    label_values,
    sample_weights,
    value_texts,
)
from mlet_dist.data.schema import SAMPLE_WEIGHT
from mlet_dist.errors import UserError

SHOWN_CHARACTERS = 200  # of a malformed line

Constants = Sequence[tuple[str, str | None]]

_DICTIONARY = pa.dictionary(pa.int32(), pa.string())


def parse_block(
    spec: TableSpec, columns: tuple[str, ...], block: Block, constants: Constants = ()
) -> tuple[pa.Table, ChunkInfo]:
    """Parse a block into a chunk's columns.

    Args:
        spec: description of the table.
        columns: the names of all columns of the block's file.
        block: the block.
        constants: columns that have one value in all rows of the file; None is a missing value.

    Raises:
        UserError: the file cannot be read.
    """
    if spec.text is None:
        return _parse_row_group(spec, block, constants)
    data = block.read()
    if isinstance(spec.text, JsonLines):
        raw, lines = json_columns(spec, block.path, data, dict(constants))
    else:
        raw, lines = _parse_text(spec, spec.text, columns, block, data, constants)
    typed = _typed(spec, raw | _constant_columns(constants, len(lines.numbers)))
    table = typed.table
    times = {kind: int(lines.numbers[row]) + 1 for kind, row in typed.times.items()}
    noticed = (times, typed.other_labels, typed.counts)
    first = typed.invalid.rows[:MAX_EXAMPLES].tolist()
    reasons = lines.reasons | {int(lines.numbers[row]): typed.invalid[row] for row in first}
    malformed = lines.malformed + len(typed.invalid)
    if not malformed:
        return table, ChunkInfo(table.num_rows, lines.count, lines.passed, 0, (), *noticed)
    examples = tuple(
        Rejected(row + 1, reasons[row], text[:SHOWN_CHARACTERS].decode(errors="backslashreplace"))
        for row, text in _lines_at(data, sorted(reasons)[:MAX_EXAMPLES])
    )
    return table, ChunkInfo(table.num_rows, lines.count, lines.passed, malformed, examples, *noticed)


def _parse_text(
    spec: TableSpec, text: TextFormat, columns: tuple[str, ...], block: Block, data: bytes, constants: Constants
) -> tuple[dict[str, pa.Array], Lines]:
    """Return the used columns of delimited lines, each as a dictionary of texts, and the lines that they are from."""
    used = tuple(name for name in spec.used_columns if name not in dict(constants))
    delimiter = text.delimiter
    is_replaced = len(delimiter.encode()) > 1  # Arrow cuts lines at one ASCII character
    if is_replaced:
        try:
            delimiter = free_character(data, text.quote)
        except ValueError as error:
            raise UserError(f"{block.path}: cannot be cut at {delimiter!r}: {error}; is it a text file?") from None
        data = data.replace(text.delimiter.encode(), delimiter.encode())
    skip_first = text.header and block.index == 0
    lines = None if skip_first else plain_lines(data, text.quote)
    try:
        raw = None if lines is None else _fields(text.quote, delimiter, used, columns, lines)
    except pa.ArrowInvalid:  # a line has another number of fields; classify_lines finds it
        raw = None
    if lines is None or raw is None:
        lines = classify_lines(data, len(columns), delimiter, text.quote, skip_first, text.encoding)
        raw = _fields(text.quote, delimiter, used, columns, lines)
        if is_replaced and text.quote is not None:  # within quotes, the delimiter is part of a value
            raw = {name: _replaced(column, delimiter, text.delimiter) for name, column in raw.items()}
    return raw, lines


def _fields(
    quote: str | None, delimiter: str, used: Sequence[str], columns: tuple[str, ...], lines: Lines
) -> dict[str, pa.Array]:
    """Return the used columns, each as a dictionary of texts."""
    if not lines.text or not used:
        return {name: pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), [""]) for name in used}
    # Columns that are not used may have equal names; rename them to what no column can be named.
    names = [name if name in used else f"\n{i}" for i, name in enumerate(columns)]
    table = pyarrow.csv.read_csv(
        pa.BufferReader(lines.text),
        # One block per call, so that each column is one array with one dictionary.
        read_options=pyarrow.csv.ReadOptions(column_names=names, block_size=len(lines.text) + 1, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(delimiter=delimiter, quote_char=quote or False, escape_char=False),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(used, _DICTIONARY),
            include_columns=used,
            strings_can_be_null=False,
            check_utf8=False,  # checked already, at once for the whole block
        ),
    )
    return {name: table[name].combine_chunks() for name in table.column_names}


def _replaced(column: pa.DictionaryArray, found: str, wanted: str) -> pa.DictionaryArray:
    texts = pc.replace_substring(column.dictionary, found, wanted)
    return pa.DictionaryArray.from_arrays(column.indices, texts)


def _constant_columns(constants: Constants, rows: int) -> dict[str, pa.Array]:
    """Return columns of one value, as dictionaries of texts."""
    first = pa.array(np.zeros(rows, np.int32))
    return {
        name: pa.DictionaryArray.from_arrays(first if value is not None else pa.nulls(rows, pa.int32()), [value or ""])
        for name, value in constants
    }


def _lines_at(block: bytes, positions: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Yield the lines at ascending positions, without their ends."""
    ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
    for position in positions:
        start = int(ends[position - 1]) + 1 if position else 0
        yield position, block[start : int(ends[position])]


def _parse_row_group(spec: TableSpec, block: Block, constants: Constants) -> tuple[pa.Table, ChunkInfo]:
    columns = [name for name in spec.used_columns if name not in dict(constants)]
    with open_parquet(block.path) as file:
        raw = file.read_row_group(block.index, columns=columns, use_threads=False)
        raw.validate(full=True)  # raises if a text is not UTF-8
    fields = {name: raw[name].combine_chunks() for name in raw.column_names}
    typed = _typed(spec, fields | _constant_columns(constants, raw.num_rows))
    examples = tuple(
        Rejected(row + 1, typed.invalid[row], str(raw.slice(row, 1).to_pylist()[0])[:SHOWN_CHARACTERS])
        for row in typed.invalid.rows[:MAX_EXAMPLES].tolist()
    )
    times = {kind: row + 1 for kind, row in typed.times.items()}
    noticed = (times, typed.other_labels, typed.counts)
    return typed.table, ChunkInfo(
        typed.table.num_rows, raw.num_rows, raw.num_rows, len(typed.invalid), examples, *noticed
    )


@dataclass(frozen=True)
class _TypedRows:
    """The rows of a block.

    Attributes:
        table: the valid rows as a chunk's columns.
        invalid: why each other row is invalid.
        times: the first valid row of each kind of time.
        other_labels, counts: as in ``ChunkInfo``.
    """

    table: pa.Table
    invalid: InvalidRows
    times: dict[str, int]
    other_labels: dict[str, dict[str, int]]
    counts: dict[str, dict[str, int]]


def _typed(spec: TableSpec, raw: dict[str, pa.Array]) -> _TypedRows:
    labels = {label.column_name: label_values(raw[label.column], label) for label in spec.labels}
    typed: dict[str, TypedColumn] = {label_column(name): each for name, each in labels.items()}
    if spec.sample_weight is not None:
        typed[SAMPLE_WEIGHT] = sample_weights(raw[spec.sample_weight], spec.sample_weight)
    if spec.split.column is not None:
        typed[TIME] = time_values(raw[spec.split.column], spec.split.column)
    for dense in spec.dense:
        typed[dense_column(dense.name)] = dense_values(raw[dense.column], dense)
    for sparse in spec.sparse:
        if not sparse.multi_valued:
            typed[sparse_column(sparse.name)] = value_texts(raw[sparse.column], sparse)
            continue
        raw_weights = None if sparse.weights is None else raw[sparse.weights]
        typed[sparse_column(sparse.name)], weights = list_values(raw[sparse.column], raw_weights, sparse)
        if weights is not None:
            typed[weight_column(sparse.name)] = weights
    table = pa.table({name: each.values for name, each in typed.items()})
    kept = np.ones(table.num_rows, dtype=bool)
    for each in typed.values():
        kept[each.invalid.rows] = False
    reasons = [each.invalid for each in typed.values()]
    invalid = InvalidRows(np.flatnonzero(~kept), lambda row: next(each[row] for each in reasons if row in each))
    times = typed.get(TIME)
    kinds = _first_rows(times.kinds, kept) if isinstance(times, TypedTimes) else {}
    if invalid:
        table = table.filter(pa.array(kept)).combine_chunks()
    counts = {sparse.name: typed[sparse_column(sparse.name)].counts for sparse in spec.sparse if sparse.multi_valued}
    counts |= {label_column(name): each.counts for name, each in labels.items()}
    others = {name: each.others for name, each in labels.items() if each.others}
    return _TypedRows(table, invalid, kinds, others, counts)


def _first_rows(kinds: npt.NDArray[np.uint8], kept: npt.NDArray[np.bool_]) -> dict[str, int]:
    """Return the first valid row of each kind of time."""
    of_kind = {kind: (kinds == code) & kept for code, kind in enumerate(KINDS)}
    return {kind: int(rows.argmax()) for kind, rows in of_kind.items() if rows.any()}
