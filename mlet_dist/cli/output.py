"""What a command prints: its result for people or as one JSON object, and errors."""

import os
import sys
from typing import Any

from mlet_dist.json_text import to_json

Result = dict[str, Any]


def show(result: Result, as_json: bool) -> None:
    """Print a result: a line a value, or one JSON object."""
    width = max(map(len, result))
    lines = (f"{name:{width}}  {readable(name, value)}" for name, value in result.items())
    write(to_json(result) if as_json else "\n".join(lines))


def write(text: str) -> None:
    """Print on stdout, at once."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # nobody reads on, as in `mlet … | head -1`; nor may the flush at exit fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: Exception) -> None:
    """Print the one line that a user's mistake is worth."""
    print("mlet: error:", " ".join(str(error).splitlines()), file=sys.stderr)


def readable(name: str, value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, dict):
        return "  ".join(f"{key} {readable(key, each)}" for key, each in value.items())
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
