"""The log as JSON, for collectors of logs: each line of stderr becomes an object with the time."""

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TextIO

from mlet_dist.errors import UserError

_VARIABLE = "MLET_LOG_FORMAT"
_PREFIXES = {"mlet: error: ": "error", "mlet: warning: ": "warning", "warning: ": "warning", "mlet: ": "info"}


def timestamp() -> str:
    """Return the time (UTC) in ISO 8601, to the second."""
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


class JsonLog:
    """A text stream that writes each complete line to another stream as a JSON object.

    The objects have `time`, `level` (info, warning or error) and `message`, and in a rank its `rank`.

    Args:
        stream: where the objects are written.
    """

    encoding = "utf-8"

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._lock, self._begun = stream, threading.RLock(), ""

    def write(self, text: str) -> int:
        """Write what is complete with ``text``, and keep the begin of a line until its end comes."""
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            for line in filter(str.strip, lines):
                self.log(line)
        return len(text)

    def log(self, line: str, **fields: object) -> None:
        """Write one object with more ``fields``."""
        prefix = next((each for each in _PREFIXES if line.startswith(each)), "")
        about: dict[str, object] = {"time": timestamp(), "level": _PREFIXES.get(prefix, "info")}
        if os.environ.get("RANK", "").isdecimal():
            about["rank"] = int(os.environ["RANK"])
        with self._lock:
            self._stream.write(json.dumps(about | fields | {"message": line[len(prefix) :]}) + "\n")
            self._stream.flush()

    def flush(self) -> None:
        """Flush the stream; a line that has begun waits for its end."""
        self._stream.flush()

    def close(self) -> None:
        """Write a line that has no end."""
        with self._lock, suppress(OSError):
            if self._begun.strip():
                self.log(self._begun)
            self._begun = ""

    def fileno(self) -> int:
        """Return the file descriptor of the stream."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Return False: progress is shown in lines, not as a bar."""
        return False


@contextmanager
def log_as_asked() -> Iterator[None]:
    """Make stderr a JsonLog in this block if the environment variable MLET_LOG_FORMAT is `json`.

    Raises:
        UserError: the variable has another value than `json` and `text`.
    """
    asked = os.environ.get(_VARIABLE, "text")
    if asked not in ("text", "json"):
        raise UserError(f"{_VARIABLE} is {asked!r}; it must be text or json")
    if asked == "text":
        yield
        return
    before, log = sys.stderr, JsonLog(sys.stderr)
    sys.stderr = log
    try:
        yield
    finally:
        log.close()
        sys.stderr = before
