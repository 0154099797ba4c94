"""JSON that every reader takes: a number that is not finite becomes null."""

import json
import math
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """``json.dumps`` of plain data, with null for NaN and infinities, which JSON does not have."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
