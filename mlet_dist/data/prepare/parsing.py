"""Parsing of a block of lines or a Parquet row group into typed columns, with a reason for each malformed line."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

from mlet_dist.data.prepare.chunks import (
    LABEL,
    TIME,
    ChunkInfo,
    Rejected,
    dense_column,
    sparse_column,
    weight_column,
)
from mlet_dist.data.prepare.list_columns import list_values
from mlet_dist.data.prepare.raw_blocks import Block, open_parquet
from mlet_dist.data.prepare.raw_formats import TableSpec
from mlet_dist.data.prepare.time_columns import KINDS, TypedTimes, time_values
from mlet_dist.data.prepare.typed_columns import TypedColumn, dense_values, label_values, value_texts

MAX_LINE_BYTES = 1 << 20  # with the line end
MAX_EXAMPLES = 5  # malformed lines to keep per block
SHOWN_CHARACTERS = 200  # of a malformed line

_DICTIONARY = pa.dictionary(pa.int32(), pa.string())
_NEWLINE = ord("\n")

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Lines:
    """The lines of a block, before their fields are parsed.

    Attributes:
        text: the lines that can be parsed; no blank ones.
        numbers: (lines of ``text``,) the position of each in the block, from 0 on.
        count: number of lines without blank ones.
        passed: number of all lines.
        malformed: the reason why each other line cannot be parsed, by position.
    """

    text: bytes
    numbers: Positions
    count: int
    passed: int
    malformed: dict[int, str]


def parse_block(spec: TableSpec, columns: tuple[str, ...], block: Block) -> tuple[pa.Table, ChunkInfo]:
    """Parse a block into a chunk's columns; ``columns`` are the names of all columns of its file.

    Raises:
        UserError: the file cannot be read.
    """
    if spec.text is None:
        return _parse_row_group(spec, block)
    data = block.read()
    skip_first = spec.text.header and block.index == 0
    lines = None if skip_first else plain_lines(data, spec.text.quote)
    try:
        raw = None if lines is None else _fields(spec, columns, lines)
    except pa.ArrowInvalid:  # a line has another number of fields; classify_lines finds it
        raw = None
    if lines is None or raw is None:
        lines = classify_lines(data, len(columns), spec.text.delimiter, spec.text.quote, skip_first)
        raw = _fields(spec, columns, lines)
    typed = _typed(spec, raw)
    table = typed.table
    times = {kind: int(lines.numbers[row]) + 1 for kind, row in typed.times.items()}
    noticed = (times, typed.other_labels, typed.counts)
    reasons = lines.malformed | {int(lines.numbers[row]): reason for row, reason in typed.invalid.items()}
    if not reasons:
        return table, ChunkInfo(table.num_rows, lines.count, lines.passed, 0, (), *noticed)
    shown = data.split(b"\n")
    examples = tuple(
        Rejected(row + 1, reasons[row], shown[row][:SHOWN_CHARACTERS].decode(errors="backslashreplace"))
        for row in sorted(reasons)[:MAX_EXAMPLES]
    )
    return table, ChunkInfo(table.num_rows, lines.count, lines.passed, len(reasons), examples, *noticed)


def _fields(spec: TableSpec, columns: tuple[str, ...], lines: Lines) -> dict[str, pa.Array]:
    """Return the used columns, each as a dictionary of texts."""
    assert spec.text is not None
    if not lines.text:
        return {name: pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), [""]) for name in spec.used_columns}
    # Columns that are not used may have equal names; rename them to what no column can be named.
    names = [name if name in spec.used_columns else f"\n{i}" for i, name in enumerate(columns)]
    table = pyarrow.csv.read_csv(
        pa.BufferReader(lines.text),
        # One block per call, so that each column is one array with one dictionary.
        read_options=pyarrow.csv.ReadOptions(column_names=names, block_size=len(lines.text) + 1, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=spec.text.delimiter, quote_char=spec.text.quote or False, escape_char=False
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            column_types=dict.fromkeys(spec.used_columns, _DICTIONARY),
            include_columns=spec.used_columns,
            strings_can_be_null=False,
            check_utf8=False,  # checked already, at once for the whole block
        ),
    )
    return {name: table[name].combine_chunks() for name in table.column_names}


def _parse_row_group(spec: TableSpec, block: Block) -> tuple[pa.Table, ChunkInfo]:
    with open_parquet(block.path) as file:
        raw = file.read_row_group(block.index, columns=list(spec.used_columns), use_threads=False)
        raw.validate(full=True)  # raises if a text is not UTF-8
    typed = _typed(spec, {name: raw[name].combine_chunks() for name in raw.column_names})
    examples = tuple(
        Rejected(row + 1, typed.invalid[row], str(raw.slice(row, 1).to_pylist()[0])[:SHOWN_CHARACTERS])
        for row in sorted(typed.invalid)[:MAX_EXAMPLES]
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
    invalid: dict[int, str]
    times: dict[str, int]
    other_labels: dict[str, int]
    counts: dict[str, dict[str, int]]


def _typed(spec: TableSpec, raw: dict[str, pa.Array]) -> _TypedRows:
    labels = label_values(raw[spec.label.column], spec.label)
    typed: dict[str, TypedColumn] = {LABEL: labels}
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
    invalid: dict[int, str] = {}
    for each in typed.values():
        for row, reason in each.invalid.items():
            invalid.setdefault(row, reason)
    table = pa.table({name: each.values for name, each in typed.items()})
    kept = _kept(table.num_rows, invalid)
    times = typed.get(TIME)
    kinds = _first_rows(times.kinds, kept) if isinstance(times, TypedTimes) else {}
    if invalid:
        table = table.filter(pa.array(kept)).combine_chunks()
    counts = {sparse.name: typed[sparse_column(sparse.name)].counts for sparse in spec.sparse if sparse.multi_valued}
    return _TypedRows(table, invalid, kinds, labels.others, counts)


def _first_rows(kinds: npt.NDArray[np.uint8], kept: npt.NDArray[np.bool_]) -> dict[str, int]:
    """Return the first valid row of each kind of time."""
    of_kind = {kind: (kinds == code) & kept for code, kind in enumerate(KINDS)}
    return {kind: int(rows.argmax()) for kind, rows in of_kind.items() if rows.any()}


def _kept(rows: int, invalid: dict[int, str]) -> npt.NDArray[np.bool_]:
    kept = np.ones(rows, dtype=bool)
    kept[list(invalid)] = False
    return kept


def plain_lines(block: bytes, quote: str | None) -> Lines | None:
    """Return the lines of a block in which the only possible error is the number of fields, which the parser finds.

    Return None for a block with quotes, carriage returns, blank or long lines, NULs or bytes that are not UTF-8.
    """
    if b"\r" in block or b"\0" in block or (quote is not None and quote.encode() in block):
        return None
    try:
        block.decode()
    except UnicodeDecodeError:
        return None
    lengths = np.diff(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == _NEWLINE), prepend=-1)
    if lengths.min() == 1 or lengths.max() > MAX_LINE_BYTES:
        return None
    return Lines(block, np.arange(len(lengths)), len(lengths), len(lengths), {})


def classify_lines(block: bytes, fields: int, delimiter: str, quote: str | None, skip_first: bool) -> Lines:
    """Sort the lines of a block into those that can be parsed and malformed ones; ``skip_first`` skips a header.

    A line is malformed if it has another number of fields, is not UTF-8, contains a NUL or a stray carriage return, has
    a quote that does not enclose a whole field, or is longer than ``MAX_LINE_BYTES``.
    """
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    data = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero(data == _NEWLINE)
    lengths = np.diff(ends, prepend=-1)
    delimiters = np.flatnonzero(data == ord(delimiter))
    malformed: dict[int, str] = {}
    if quote is not None and quote.encode() in block:
        delimiters = _outside_quotes(data, ends, delimiters, quote, malformed)
    found = 1 + np.diff(np.searchsorted(delimiters, ends), prepend=0)
    blank = lengths == 1
    if skip_first:
        blank[0] = True
    for row in np.flatnonzero((found != fields) & ~blank).tolist():
        malformed.setdefault(row, f"{found[row]} fields instead of {fields}")
    for row in np.flatnonzero(lengths > MAX_LINE_BYTES).tolist():
        malformed[row] = f"a line of {lengths[row] - 1} bytes; at most {MAX_LINE_BYTES - 1} are allowed"
    for byte, name in ((b"\r", "a carriage return"), (b"\0", "a NUL byte")):
        if byte in block:
            for row in np.searchsorted(ends, np.flatnonzero(data == byte[0])).tolist():
                malformed.setdefault(row, f"{name} within the line")
    try:
        block.decode()
    except UnicodeDecodeError:
        for row, line in enumerate(block.split(b"\n")[:-1]):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                malformed.setdefault(row, f"byte {line[error.start]:#04x} is not UTF-8")
    if skip_first:
        malformed.pop(0, None)
    kept = ~blank
    kept[list(malformed)] = False
    text = block if kept.all() else data[np.repeat(kept, lengths)].tobytes()
    return Lines(text, np.flatnonzero(kept), int((~blank).sum()), len(ends), malformed)


def _outside_quotes(
    data: npt.NDArray[np.uint8], ends: Positions, delimiters: Positions, quote: str, malformed: dict[int, str]
) -> Positions:
    """Return the delimiters outside quotes, and add lines with misplaced quotes to ``malformed``."""
    quotes = np.flatnonzero(data == ord(quote))
    line = np.searchsorted(ends, quotes)
    before_line = np.concatenate([[0], np.searchsorted(quotes, ends)])
    rank = np.arange(len(quotes)) - before_line[line]  # position among the quotes of its line
    odd = np.diff(before_line) % 2 == 1
    breaks = data == _NEWLINE
    breaks[delimiters] = True
    padded = np.concatenate([[True], breaks, [True]])
    is_quote = np.concatenate([[False], data == ord(quote), [False]])
    opening = rank % 2 == 0
    # A quote must open at the start of a field and close at its end; a doubled quote closes and opens again.
    placed = np.where(opening, padded[quotes] | is_quote[quotes], padded[quotes + 2] | is_quote[quotes + 2])
    for row in np.flatnonzero(odd).tolist():
        malformed[row] = "a quote that is not closed on its line"
    for row in line[~placed].tolist():
        malformed.setdefault(row, "a quote that does not enclose a whole field")
    of_line = before_line[np.searchsorted(ends, delimiters)]
    return delimiters[(np.searchsorted(quotes, delimiters) - of_line) % 2 == 0]
