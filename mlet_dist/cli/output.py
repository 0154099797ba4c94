"""Prints the result of a command, as text or as one JSON object."""

import math
import os
import sys
from typing import Any

from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json

Result = dict[str, Any]

_MAX_SHOWN = 8  # values of a list, such as one value for each rank


def print_result(result: Result, as_json: bool) -> None:
    """Print a result: one line for each value, or one JSON object."""
    if as_json:
        print_text(to_json(result))
        return
    flat: Result = {}
    for name, value in result.items():
        flat |= {f"{name}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {name: value}
    width = max(map(len, flat))
    print_text("\n".join(f"{name:{width}}  {_readable(value)}" for name, value in flat.items()))


def print_text(text: str) -> None:
    """Print on stdout without buffering."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # the reader has gone, as in `mlet … | head -1`
        _discard_stdout()
    except OSError as error:
        _discard_stdout()
        raise UserError(f"the result cannot be written to stdout: {error.strerror}") from None
    except UnicodeEncodeError:  # a terminal of another encoding
        sys.stdout.buffer.write(f"{text}\n".encode(sys.stdout.encoding, "backslashreplace"))
        sys.stdout.flush()


def _discard_stdout() -> None:
    """Let the flush at exit succeed."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _readable(value: Any) -> str:
    """Return a value as text for people."""
    if isinstance(value, list):
        more = [f"… {len(value):,} in all"] if len(value) > _MAX_SHOWN else []
        return "  ".join([_readable(each) for each in value[:_MAX_SHOWN]] + more)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "undefined"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
