"""The form of delimited lines, guessed from the first ones: delimiter, quote, header, and their fields."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from mlet_dist.data.prepare.raw_formats import TextFormat
from mlet_dist.data.prepare.raw_values import MISSING_NUMBERS, NUMBER

# In the order of preference between those that give lines equally many fields. A space separates values within fields,
# too, so it is the last.
DELIMITERS = ("\t", "\x01", "||", "|~|", "::", ", ", ",", ";", "|", "^", "~", "\x02", "\x1e", "\x1f", " ")
QUOTES = ('"', "'")

_SAMPLE = 1_000  # lines to try delimiters on
_LEAST_SHARE = 0.9  # of lines with the usual number of fields
_NAME = re.compile(r"[^\W\d][\w .:/()\[\]#%+-]*")
_NUMBER = re.compile(NUMBER)


@dataclass(frozen=True)
class DelimitedHead:
    """The first lines of a text file, split into fields.

    Attributes:
        text: how lines are split.
        names: names of the columns, in order.
        columns: (rows,) the fields of each column, as texts.
        malformed: number of lines that have another number of fields or misplaced quotes.
    """

    text: TextFormat
    names: tuple[str, ...]
    columns: tuple[pa.StringArray, ...]
    malformed: int


def split_head(lines: Sequence[str], encoding: str | None) -> DelimitedHead | None:
    """Return the lines split into fields, or None if no delimiter gives most lines the same number of two or more."""
    found = guess_delimiter(lines)
    if found is None:
        return None
    delimiter, quote, width = found
    rows = [split_line(line, delimiter, quote) for line in lines]
    header = has_header(rows[0] or [], [row for row in rows[1:] if row is not None and len(row) == width])
    names = tuple(rows[0] or ()) if header else tuple(f"c{i}" for i in range(1, width + 1))
    body = rows[1:] if header else rows
    fields = [row for row in body if row is not None and len(row) == width]
    columns = tuple(pa.array([row[i] for row in fields], pa.string()) for i in range(width))
    text = TextFormat(delimiter, quote, header, None if header else names, encoding)
    return DelimitedHead(text, names, columns, len(body) - len(fields))


def guess_delimiter(lines: Sequence[str]) -> tuple[str, str | None, int] | None:
    """Return the delimiter, the quote and the number of fields; None if no delimiter fits."""
    sample = lines[:_SAMPLE]
    best: tuple[tuple[float, ...], tuple[str, str | None, int]] | None = None
    for place, delimiter in enumerate(DELIMITERS):
        if delimiter not in sample[0]:
            continue
        if delimiter == ", " and any(line.count(", ") != line.count(",") for line in sample):
            continue
        # Quotes that enclose whole fields in no line are ordinary characters.
        quotes = (*(quote for quote in QUOTES if _encloses_fields(sample, delimiter, quote)), None)
        found = [(*_width(sample, delimiter, quote), quote) for quote in quotes]
        share, width, quote = max(found, key=lambda each: each[0])  # the first of those with equal shares
        if width < 2 or share < _LEAST_SHARE:
            continue
        # Control characters are never part of values, and a space often is.
        kind = 2 if delimiter < " " else 0 if delimiter == " " else 1
        score = (kind, round(share, 2), quote is not None, len(delimiter), width, -place)
        if best is None or score > best[0]:
            best = score, (delimiter, quote, width)
    if best is None:
        return None
    delimiter, quote, width = best[1]
    if quote is None and not any('"' in line for line in lines):
        quote = '"'  # the default, which the rest of the file may need
    return delimiter, quote, width


def _width(lines: Sequence[str], delimiter: str, quote: str | None) -> tuple[float, int]:
    """Return the share of lines that have as many fields as the first line, and that number."""
    widths = [0 if row is None else len(row) for row in (split_line(line, delimiter, quote) for line in lines)]
    return widths.count(widths[0]) / len(widths), widths[0]


def split_line(line: str, delimiter: str, quote: str | None) -> list[str] | None:
    """Return the fields of a line; None if a quote does not enclose a whole field, or there is a NUL or a CR."""
    if "\0" in line or "\r" in line:
        return None
    if quote is None or quote not in line:
        return line.split(delimiter)
    fields, place = [], 0
    closing = quote + delimiter
    while True:
        if line.startswith(quote, place):
            stop = place + 1
            while True:
                stop = line.find(quote, stop)
                if stop < 0:
                    return None
                if not line.startswith(quote, stop + 1):
                    break
                stop += 2
            fields.append(line[place + 1 : stop].replace(2 * quote, quote))
            if stop + 1 == len(line):
                return fields
            if not line.startswith(closing, stop):
                return None
            place = stop + len(closing)
        else:
            stop = line.find(delimiter, place)
            field = line[place:] if stop < 0 else line[place:stop]
            if quote in field:
                return None
            fields.append(field)
            if stop < 0:
                return fields
            place = stop + len(delimiter)


def has_header(first: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Return whether the first line names the columns: it holds no values such as those of the lines after it."""
    if list(first) in ([str(i) for i in range(len(first))], ["", *(str(i) for i in range(len(first) - 1))]):
        return True  # pandas numbers columns without names
    if sum(not field.strip() for field in first) > 1:
        return False
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(first)
    names = numbers = repeated = 0
    for field, column in zip(first, columns, strict=True):
        present = [value for value in column if value.strip().lower() not in MISSING_NUMBERS]
        if present and sum(map(_is_number, present)) > 0.9 * len(present):
            numbers += _is_number(field)
            names += not _is_number(field) and field.strip().lower() not in MISSING_NUMBERS
        else:
            repeated += field in column
    if names or numbers:
        return names > numbers
    if repeated:
        return False
    named = [field.strip() for field in first if field.strip()]
    return len(set(named)) == len(named) and all(map(_NAME.fullmatch, named))


def _is_number(field: str) -> bool:
    return _NUMBER.match(field.strip()) is not None


def _encloses_fields(lines: Sequence[str], delimiter: str, quote: str) -> bool:
    """Return whether a quote begins and ends a field of some line."""
    start = re.escape(delimiter)
    around = re.compile(rf"(^|{start}){quote}[^{quote}]*{quote}({start}|$)")
    return any(quote in line and around.search(line) for line in lines)
