"""Formats results: sizes, text tables, JSON without NaN, and objects that contain their own checksum; reads JSON."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mlet_dist.regular_file import read_regular_file

CHECKSUM = "sha256"
"""The key under which an object contains its own checksum."""


_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size_text(size: float) -> str:
    """Return a number of bytes with three digits."""
    for unit, name in _UNITS:
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} B"


def megabytes_text(size: float) -> str:
    """Return a number of bytes with one decimal of MB or GB; below 0.1 MB as ``size_text``."""
    if size < 1e5:
        return size_text(size)
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.1f} GB"


def signed(value: float) -> str:
    """Return a difference with its sign and four decimals; one that rounds to zero has no sign."""
    text = f"{value:+.4f}"
    return text if float(text) else text[1:]


def text_table(names: Sequence[str], rows: Sequence[Sequence[Any]], left: int) -> list[str]:
    """Return the lines of a table; its first ``left`` columns are left-aligned, the others right-aligned."""
    table = [list(map(str, row)) for row in [names, *rows]]
    widths = [max(len(row[index]) for row in table) for index in range(len(names))]
    return [
        "  ".join(
            text.ljust(width) if index < left else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def to_json(value: Any, indent: int | None = None) -> str:
    """Return plain data as JSON, with null for NaN and infinities, which JSON does not have."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def load_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: the file cannot be read, or is no regular file.
        ValueError: it is not JSON; NaN and infinities are not.
    """
    try:
        return json.loads(read_regular_file(path).decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def with_checksum(content: dict[str, Any]) -> dict[str, Any]:
    """Return an object with its own checksum: the SHA-256 of all other keys as JSON, sorted and without spaces."""
    rest = {key: _finite(value) for key, value in content.items() if key != CHECKSUM}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return rest | {CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
