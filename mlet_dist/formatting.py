"""JSON that every reader takes: a number that is not finite becomes null. And objects that hold their own checksum."""

import hashlib
import json
import math
from typing import Any

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
