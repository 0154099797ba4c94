"""Results as text tables for people, as JSON without NaN, and as objects that hold their own checksum."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any


def text_table(names: Sequence[str], rows: Sequence[Sequence[Any]], left: int) -> list[str]:
    """Lines of aligned columns; the first ``left`` begin at the left, the others end at the right."""
    table = [list(map(str, row)) for row in [names, *rows]]
    widths = [max(len(row[index]) for row in table) for index in range(len(names))]
    return [
        "  ".join(
            text.ljust(width) if index < left else text.rjust(width)
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


SEAL = "sha256"
"""The key of a sealed object's own checksum."""


def to_json(value: Any, indent: int | None = None) -> str:
    """``json.dumps`` of plain data, with null for NaN and infinities, which JSON does not have."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """An object with its own checksum: SHA-256 of all other keys as JSON, sorted and without spaces."""
    rest = {key: _finite(value) for key, value in content.items() if key != SEAL}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return rest | {SEAL: hashlib.sha256(text.encode()).hexdigest()}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
