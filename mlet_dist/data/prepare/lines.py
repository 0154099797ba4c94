"""Finds the lines of a block that cannot be parsed, before the parser sees them: without a loop over rows.

pyarrow's own ``invalid_row_handler`` does not serve: it fails on rows that are not UTF-8, and its row numbers leave out
blank lines.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MAX_LINE_BYTES = 1 << 20

_NEWLINE = ord("\n")

Positions = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Lines:
    """The lines of a block.

    Attributes:
        text: those that can be parsed, blank ones left out.
        numbers: (lines of ``text``,) position of each in the block, from 0 on.
        count: all lines but blank ones.
        passed: all lines.
        malformed: why the others cannot be parsed, by position.
    """

    text: bytes
    numbers: Positions
    count: int
    passed: int
    malformed: dict[int, str]


def plain_lines(block: bytes, quote: str | None) -> Lines | None:
    """The lines of a block in which all that can be wrong is the number of fields, which the parser sees too.

    None where there is more to look at: quotes, carriage returns, blank or long lines, NULs, or what is not UTF-8.
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


def examine_lines(block: bytes, fields: int, delimiter: str, quote: str | None, skip_first: bool) -> Lines:
    """Sort a block of whole lines; ``skip_first`` leaves out the header.

    Malformed are lines that have another number of fields, are not UTF-8, hold a NUL or a stray carriage return, have a
    quote that does not enclose a whole field, or more than ``MAX_LINE_BYTES``.
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
        malformed[row] = f"a line of {lengths[row] - 1} bytes; at most {MAX_LINE_BYTES - 1} are taken"
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
    """The delimiters that are not within quotes; lines whose quotes are wrong are added to ``malformed``."""
    quotes = np.flatnonzero(data == ord(quote))
    line = np.searchsorted(ends, quotes)
    before_line = np.concatenate([[0], np.searchsorted(quotes, ends)])
    rank = np.arange(len(quotes)) - before_line[line]  # among the quotes of its line
    odd = np.diff(before_line) % 2 == 1
    breaks = data == _NEWLINE
    breaks[delimiters] = True
    padded = np.concatenate([[True], breaks, [True]])
    is_quote = np.concatenate([[False], data == ord(quote), [False]])
    opening = rank % 2 == 0
    # A quote opens where a field begins and closes where it ends; a doubled one closes and opens again.
    right = np.where(opening, padded[quotes] | is_quote[quotes], padded[quotes + 2] | is_quote[quotes + 2])
    for row in np.flatnonzero(odd).tolist():
        malformed[row] = "a quote that is not closed on its line"
    for row in line[~right].tolist():
        malformed.setdefault(row, "a quote that does not enclose a whole field")
    of_line = before_line[np.searchsorted(ends, delimiters)]
    return delimiters[(np.searchsorted(quotes, delimiters) - of_line) % 2 == 0]
