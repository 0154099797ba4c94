"""What the summary of a finished run says went wrong in training; reads it without torch."""

from collections.abc import Mapping
from typing import Any


def dense_arch_fault(summary: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the dense arch of a finished run, by its summary; None if nothing is known to be."""
    return "the dense arch returns the same for all rows" if summary.get("dense_arch_varies") is False else None
