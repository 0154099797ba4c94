"""What a command prints: its result for people or as one JSON object, and errors."""

import os
import sys
from typing import Any

from mlet_dist.errors import one_line
from mlet_dist.formatting import to_json

Result = dict[str, Any]

_MOST_SHOWN = 8  # of a list, such as one by rank


def show(result: Result, as_json: bool) -> None:
    """Print a result: a line a value, or one JSON object."""
    if as_json:
        write(to_json(result))
        return
    flat: Result = {}
    for name, value in result.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    width = max(map(len, flat))
    write("\n".join(f"{name:{width}}  {readable(value)}" for name, value in flat.items()))


def write(text: str) -> None:
    """Print on stdout, at once."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # nobody reads on, as in `mlet … | head -1`; nor may the flush at exit fail
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_error(error: Exception | str) -> None:
    """Print the one line that a user's mistake is worth."""
    print("mlet: error:", one_line(str(error)), file=sys.stderr)


def readable(value: Any) -> str:
    """A value as people read it."""
    if isinstance(value, list):
        more = [f"… {len(value):,} in all"] if len(value) > _MOST_SHOWN else []
        return "  ".join([readable(each) for each in value[:_MOST_SHOWN]] + more)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
