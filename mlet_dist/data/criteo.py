"""Reads raw Criteo click logs: tab-separated text, plain or gzip, without a header.

A line holds a label (0 or 1), 13 integers I1-I13 and 26 categorical strings C1-C26. Integers may be missing or
negative; an empty category is a value like any other.
"""

import gzip
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from mlet_dist.errors import UserError
from mlet_dist.progress import Progress

LABEL = "label"
DENSE = tuple(f"I{i}" for i in range(1, 14))
SPARSE = tuple(f"C{i}" for i in range(1, 27))
COLUMNS = (LABEL, *DENSE, *SPARSE)

BLOCK_BYTES = 16 << 20
MAX_EXAMPLES = 3
TOLERATED_LINES, TOLERATED_SHARE = 10, 0.1

_GZIP_MAGIC = b"\x1f\x8b"
_LABEL_PATTERN, _INTEGER_PATTERN = "^[01]$", "^(-?[0-9]{1,18})?$"
_logger = logging.getLogger(__name__)


class CriteoReader:
    """Streams one raw file as typed tables; malformed lines are counted, skipped and logged as a warning.

    Malformed are lines that do not have 40 fields, are not UTF-8, hold a stray carriage return, a label other than 0
    or 1, or something in I1-I13 that is not an integer. Blank lines are no lines.

    Attributes:
        size: bytes of the file.
        lines: lines read so far, blank ones not counted.
        malformed: how many of them were skipped.

    Raises:
        UserError: the file is missing or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
        self.lines = 0
        self.malformed = 0
        self._path = path
        self._examples: list[str] = []

    def read(self, progress: Progress) -> Iterator[pa.Table]:
        """Yield the valid lines in order, in tables of about 16 MiB of text.

        Columns: label int8; I1-I13 float32, log(1 + max(x, 0)), missing = 0; C1-C26 string. ``progress`` counts the
        bytes of the file.

        Raises:
            UserError: the file is unreadable, empty, a truncated or corrupt .gz, or is probably not Criteo:
                no line is valid, or more than 10 lines and 10% of those read so far are malformed.
        """
        first_line = 1
        for block in _blocks(self._path, progress):
            table = self._parse(block, first_line)
            first_line += block.count(b"\n")
            if self.malformed > max(TOLERATED_LINES, TOLERATED_SHARE * self.lines):
                raise UserError(self._not_criteo())
            if table.num_rows:
                yield table
        if not self.lines:
            raise UserError(f"{self._path}: holds no lines; a raw Criteo log is expected")
        if self.malformed == self.lines:
            raise UserError(self._not_criteo())
        if self.malformed:
            _logger.warning(
                "%s: skipped %d malformed of %d lines, e.g. %s",
                self._path,
                self.malformed,
                self.lines,
                "; ".join(self._examples),
            )

    def _not_criteo(self) -> str:
        return (
            f"{self._path}: {self.malformed} of {self.lines} lines are malformed, e.g. {self._examples[0]}; a raw "
            "Criteo line is label, I1-I13 and C1-C26, tab-separated"
        )

    def _parse(self, block: bytes, first_line: int) -> pa.Table:
        block, line_numbers = self._whole_lines(block, first_line)
        if not block:
            return _typed(pa.table({name: pa.array([], pa.string()) for name in COLUMNS}))
        text = pyarrow.csv.read_csv(
            pa.BufferReader(block),
            # The lines are split already: one block a call, so that rows and line numbers stay aligned.
            read_options=pyarrow.csv.ReadOptions(column_names=COLUMNS, block_size=len(block) + 1),
            parse_options=pyarrow.csv.ParseOptions(delimiter="\t", quote_char=False, escape_char=False),
            convert_options=pyarrow.csv.ConvertOptions(
                column_types=dict.fromkeys(COLUMNS, pa.string()), strings_can_be_null=False
            ),
        )
        valid = np.ones(len(line_numbers), dtype=bool)
        for name in (LABEL, *DENSE):
            pattern = _LABEL_PATTERN if name == LABEL else _INTEGER_PATTERN
            fits = pc.match_substring_regex(text[name], pattern).to_numpy()
            for row in np.flatnonzero(valid & ~fits):
                expected = "0 or 1" if name == LABEL else "an integer"
                self._skip(int(line_numbers[row]), f"{name} is {_shown(text[name][row].as_py())} instead of {expected}")
            valid &= fits
        return _typed(text if valid.all() else text.filter(pa.array(valid)))

    def _whole_lines(self, block: bytes, first_line: int) -> tuple[bytes, npt.NDArray[np.int64]]:
        """Drop the lines that cannot be parsed; returns the others and their line numbers.

        pyarrow's own ``invalid_row_handler`` does not serve: it fails on rows that are not UTF-8, and its row numbers
        leave out blank lines.
        """
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n")
        data = np.frombuffer(block, dtype=np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        lengths = np.diff(ends, prepend=-1)
        fields = 1 + np.diff(np.searchsorted(np.flatnonzero(data == ord("\t")), ends), prepend=0)
        blank = lengths == 1
        reasons = {
            int(row): f"{fields[row]} fields instead of {len(COLUMNS)}"
            for row in np.flatnonzero((fields != len(COLUMNS)) & ~blank)
        }
        for row in np.searchsorted(ends, np.flatnonzero(data == ord("\r"))):
            reasons.setdefault(int(row), "a carriage return within the line")
        try:
            block.decode()
        except UnicodeDecodeError:
            for row, line in enumerate(block.split(b"\n")[:-1]):
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    reasons.setdefault(row, f"byte {line[error.start]:#04x} is not UTF-8")
        self.lines += int((~blank).sum())
        for row in sorted(reasons):
            self._skip(first_line + row, reasons[row])
        kept = ~blank
        kept[list(reasons)] = False
        if not kept.all():
            block = data[np.repeat(kept, lengths)].tobytes()
        return block, first_line + np.flatnonzero(kept)

    def _skip(self, line: int, reason: str) -> None:
        self.malformed += 1
        if len(self._examples) < MAX_EXAMPLES:
            self._examples.append(f"line {line}: {reason}")


def _blocks(path: Path, progress: Progress) -> Iterator[bytes]:
    """Yield the file's text in blocks of whole lines, each line with its line end."""
    rest = b""
    try:
        with path.open("rb") as raw, _decompressed(path, raw) as text:
            position = 0
            while chunk := text.read(BLOCK_BYTES):
                progress.update(raw.tell() - position)
                position = raw.tell()
                end = chunk.rfind(b"\n") + 1
                if end:
                    yield rest + chunk[:end]
                    rest = chunk[end:]
                elif len(rest) > BLOCK_BYTES:
                    raise UserError(f"{path}: a line of more than {BLOCK_BYTES} bytes; a raw Criteo log is text lines")
                else:
                    rest += chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: truncated or corrupt gzip file: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if rest:
        yield rest + b"\n"


def _decompressed(path: Path, raw: IO[bytes]) -> IO[bytes]:
    magic = raw.read(len(_GZIP_MAGIC))
    raw.seek(0)
    if not magic:
        raise UserError(f"{path}: is empty; a raw Criteo log is expected")
    if magic == _GZIP_MAGIC:
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]
    if path.suffix == ".gz":
        raise UserError(f"{path}: is named .gz but is not gzip; rename it or compress it")
    return raw


def _typed(text: pa.Table) -> pa.Table:
    columns = {LABEL: text[LABEL].cast(pa.int8())}
    for name in DENSE:
        present = pc.if_else(pc.equal(text[name], ""), "0", text[name])
        value = np.maximum(present.cast(pa.int64()).to_numpy(), 0)
        columns[name] = pa.array(np.log1p(value).astype(np.float32))
    return pa.table(columns | {name: text[name] for name in SPARSE}).combine_chunks()


def _shown(value: str) -> str:
    return repr(value if len(value) <= 20 else value[:20] + "…")
