"""Lines of a block of text: those that can be parsed, blank ones and malformed ones, without a loop over lines."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

MAX_LINE_BYTES = 1 << 20  # with the line end
MAX_EXAMPLES = 5  # malformed lines to keep per block

_NEWLINE = ord("\n")
_GLANCE_BYTES = 1 << 12

Positions = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Lines:
    """The lines of a block, before their fields are parsed.

    Attributes:
        text: the lines that can be parsed; no blank ones.
        numbers: (lines of ``text``,) the position of each in the block, from 0 on.
        count: number of lines without blank ones.
        passed: number of all lines.
        reasons: why lines are malformed, by position; the first ``MAX_EXAMPLES`` of them.
    """

    text: bytes
    numbers: Positions
    count: int
    passed: int
    reasons: dict[int, str]

    @property
    def malformed(self) -> int:
        """The number of lines that cannot be parsed."""
        return self.count - len(self.numbers)


def free_character(block: bytes, quote: str | None = None) -> str:
    """Return an ASCII character that does not occur in a block: a control character if there is one.

    Raises:
        ValueError: every character occurs.
    """
    for code in (*range(31, 0, -1), *range(127, 31, -1)):
        if code not in (10, 13) and chr(code) != quote and bytes([code]) not in block:
            return chr(code)
    raise ValueError("every ASCII character occurs")


def plain_lines(block: bytes, quote: str | None) -> Lines | None:
    """Return the lines of a block in which the only possible error is the number of fields, which the parser finds.

    Return None for a block with quotes, carriage returns, blank or long lines, NULs or bytes that are not UTF-8.
    """
    if b"\r" in block or b"\0" in block or (quote is not None and quote.encode() in block):
        return None
    if b"\n\n" in block[:_GLANCE_BYTES]:  # a file of millions of blank lines
        return None
    try:
        block.decode()
    except UnicodeDecodeError:
        return None
    lengths = np.diff(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == _NEWLINE), prepend=-1)
    if lengths.min() == 1 or lengths.max() > MAX_LINE_BYTES:
        return None
    return Lines(block, np.arange(len(lengths)), len(lengths), len(lengths), {})


def classify_lines(
    block: bytes, fields: int, delimiter: str, quote: str | None, skip_first: bool, encoding: str | None = None
) -> Lines:
    """Sort the lines of a block into those that can be parsed and malformed ones; ``skip_first`` skips a header.

    A line is malformed if it has another number of fields, is not UTF-8, contains a NUL or a stray carriage return, has
    a quote that does not enclose a whole field, or is longer than ``MAX_LINE_BYTES``. ``encoding`` is the name, for
    messages, of the encoding that the text was converted from.
    """
    block, numbers, passed = without_blank_lines(block, skip_first)
    data = np.frombuffer(block, dtype=np.uint8)
    ends = np.flatnonzero(data == _NEWLINE)
    lengths = np.diff(ends, prepend=-1)
    delimiters = np.flatnonzero(data == ord(delimiter))
    malformed = _Malformed(len(ends))
    if quote is not None and quote.encode() in block:
        delimiters = _outside_quotes(data, ends, delimiters, quote, malformed)
    found = 1 + np.diff(np.searchsorted(delimiters, ends), prepend=0)
    malformed.add(found != fields, lambda row: f"{found[row]} fields instead of {fields}")
    malformed.add(
        lengths > MAX_LINE_BYTES,
        lambda row: f"a line of {lengths[row] - 1} bytes; at most {MAX_LINE_BYTES - 1} are allowed",
        first=True,
    )
    for byte, name in ((b"\r", "a carriage return"), (b"\0", "a NUL byte")):
        if byte in block:
            malformed.add(_lines_of(np.flatnonzero(data == byte[0]), ends), partial(_within, name))
    if (wrong := _not_utf8(block)) is not None:
        malformed.add(wrong, lambda row: not_text(block[ends[row] + 1 - lengths[row] : ends[row]], encoding))
    kept = ~malformed.lines
    text = block if kept.all() else data[np.repeat(kept, lengths)].tobytes()
    reasons = {int(numbers[row]): reason for row, reason in malformed.first_reasons()}
    return Lines(text, numbers[kept], len(ends), passed, reasons)


def without_blank_lines(block: bytes, skip_first: bool) -> tuple[bytes, Positions, int]:
    """Return the lines of a block that are not blank, with the position of each, and the number of all lines.

    Line ends become ``\\n``; ``skip_first`` leaves out the first line, too.
    """
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    skipped = 0
    if skip_first:
        block, skipped = block[block.index(b"\n") + 1 :], 1
    data = np.frombuffer(block, dtype=np.uint8)
    newline = data == _NEWLINE
    blank = newline.copy()
    blank[1:] &= newline[:-1]
    passed = skipped + int(np.count_nonzero(newline))
    if not blank.any():
        return block, np.arange(skipped, passed), passed
    ends = np.flatnonzero(newline & ~blank)
    numbers = skipped + np.arange(len(ends))
    if len(ends):
        numbers += np.searchsorted(np.flatnonzero(blank), ends)
    return data[~blank].tobytes(), numbers, passed


class _Malformed:
    """The malformed lines of a block; the reason is written for the first ones only, since there may be millions."""

    def __init__(self, lines: int) -> None:
        self.lines: Flags = np.zeros(lines, dtype=bool)
        self._checks: list[tuple[Flags, Callable[[int], str]]] = []

    def add(self, lines: Flags, reason: Callable[[int], str], *, first: bool = False) -> None:
        """Add lines and the function that returns the reason of each; ``first`` takes precedence over those added."""
        self.lines |= lines
        self._checks.insert(0 if first else len(self._checks), (lines, reason))

    def first_reasons(self) -> Iterator[tuple[int, str]]:
        """Yield the first lines and their reasons."""
        for row in np.flatnonzero(self.lines)[:MAX_EXAMPLES].tolist():
            yield row, next(reason(row) for lines, reason in self._checks if lines[row])


def _lines_of(positions: Positions, ends: Positions) -> Flags:
    """Return which lines contain the positions."""
    lines = np.zeros(len(ends), dtype=bool)
    lines[np.searchsorted(ends, positions)] = True
    return lines


def _within(name: str, _: int) -> str:
    return f"{name} within the line"


def _not_utf8(block: bytes) -> Flags | None:
    """Return which lines are not UTF-8; None if all are."""
    try:
        block.decode()
        return None
    except UnicodeDecodeError:
        text = block.decode(errors="surrogateescape")  # surrogates stand for bytes that are no UTF-8
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    surrogates = (points >= 0xDC80) & (points <= 0xDCFF)
    return _lines_of(np.flatnonzero(surrogates), np.flatnonzero(points == _NEWLINE))


def not_text(line: bytes, encoding: str | None) -> str:
    """Return the reason why a line that is not UTF-8 is malformed; ``encoding`` as in ``classify_lines``."""
    if encoding is not None:
        return f"the line is not {encoding} text"
    byte = next(char for char in line.decode(errors="surrogateescape") if "\udc80" <= char <= "\udcff")
    return f"byte {ord(byte) - 0xDC00:#04x} is not UTF-8"


def _outside_quotes(
    data: npt.NDArray[np.uint8], ends: Positions, delimiters: Positions, quote: str, malformed: _Malformed
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
    malformed.add(odd, lambda _: "a quote that is not closed on its line; a line end within quotes is not supported")
    malformed.add(_lines_of(quotes[~placed], ends), lambda _: "a quote that does not enclose a whole field")
    of_line = before_line[np.searchsorted(ends, delimiters)]
    return delimiters[(np.searchsorted(quotes, delimiters) - of_line) % 2 == 0]
