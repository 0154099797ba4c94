"""Shows the progress of long work on stderr: a live bar on a terminal, plain lines in a log."""

import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Counts finished work and shows it, with its rate, the ETA and fields of the caller.

    Args:
        description: what the work is, e.g. ``train``.
        total: the amount of work in ``unit``s; None if it is not known.
        unit: what is counted, e.g. ``rows`` or ``steps``.
        log_interval: seconds between two lines when stderr is not a terminal.
        disable: show nothing, as on every rank but the first.
        stream: where to show it; by default stderr, and nowhere if that is closed.
        done: the part of ``total`` that was finished before.
    """

    def __init__(
        self,
        description: str,
        total: int | None,
        unit: str,
        *,
        log_interval: float = 10.0,
        disable: bool = False,
        stream: TextIO | None = None,
        done: int = 0,
    ) -> None:
        self._stream: TextIO | None = stream if stream is not None else sys.stderr
        self._description, self._total, self._unit = description, total, unit
        self._log_interval, self._disable = log_interval, disable or self._stream is None
        self._done = self._done_before = done
        self._fields: dict[str, str] = {}
        self._started = self._last_line = time.monotonic()
        self._bar: tqdm | None = None
        if not disable and self._stream is not None and self._stream.isatty():
            self._bar = tqdm(total=total, initial=done, desc=description, unit=unit, unit_scale=True, file=self._stream)

    def update(self, amount: int, *, found: bool = False, **fields: str) -> None:
        """Add ``amount`` units of finished work; show ``fields`` beside the count until they are replaced.

        Work that was ``found``, because it had been finished before, has no part in the rate and the ETA.
        """
        self._done += amount
        self._done_before += amount if found else 0
        self._fields.update(fields)
        if self._bar is not None:
            if found:
                self._bar.initial += amount
            if fields:
                self._bar.set_postfix(self._fields, refresh=False)
            self._bar.update(amount)
        elif not self._disable and time.monotonic() - self._last_line >= self._log_interval:
            self._write_line()

    def log(self, line: str) -> None:
        """Show a line above the bar, or in the log."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif not self._disable:
            with suppress(OSError):
                print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Show the final count and stop."""
        if self._bar is not None:
            self._bar.close()
        elif not self._disable:
            self._write_line()
        self._disable, self._bar = True, None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _write_line(self) -> None:
        self._last_line = now = time.monotonic()
        rate = (self._done - self._done_before) / max(now - self._started, 1e-9)
        of = f"/{self._total:,}" if self._total is not None else ""
        if 0 < rate < 1:
            pace = f"{1 / rate:.2g} s each" if rate > 1 / 60 else f"{_duration(1 / rate)} each"
        else:
            pace = f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"
        parts = [f"{self._description} {self._done:,}{of} {self._unit}", pace]
        if self._total is not None and self._done < self._total and rate:
            parts.append(f"ETA {_duration((self._total - self._done) / rate)}")
        parts += [f"{name} {value}" for name, value in self._fields.items()]
        with suppress(OSError):  # a log without a reader, or on a full disk, must not end the work
            print("  ".join(parts), file=self._stream, flush=True)


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
