"""Stop signals: SIGTERM, sent by Kubernetes and torchrun, and SIGUSR1, sent by Slurm."""

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from mlet_dist.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def exit_on_stop_signal() -> Iterator[None]:
    """End this process at once with exit code 75 when a stop signal arrives, except within a ``StopSignal`` block.

    A thread ends the process. Python's signal handlers run only when the main thread returns from C++, and it can wait
    there for minutes for ranks that start later. After a ``StopSignal`` block the signals are ignored; if the run has
    finished, until the process ends.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    threading.Thread(target=_exit_on_signal, args=(read_end,), daemon=True).start()
    signal.set_wakeup_fd(write_end)  # before the handlers, so that no signal reaches neither
    before = {number: signal.signal(number, _ignore) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        restore_handlers(before)
        signal.set_wakeup_fd(-1)
        os.close(write_end)


def restore_handlers(before: Mapping[Any, Any]) -> None:
    """Restore handlers of signals, except where the signal is ignored because the run has finished."""
    for number, handler in before.items():
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: signals reach the wakeup file descriptor only if they have a Python handler."""


def _exit_on_signal(read_end: int) -> None:
    with os.fdopen(read_end, "rb", buffering=0) as file:
        while number := file.read(1):
            if number[0] in STOP_SIGNALS:
                if os.environ.get("RANK", "0") == "0":
                    with suppress(OSError):  # stderr may be closed
                        print(f"mlet: {interrupted_unsaved(number[0])}", file=sys.stderr, flush=True)
                os._exit(Interrupted.EXIT_CODE)


class StopSignal:
    """Notes stop signals within its block; ``CheckpointSchedule`` reads ``number``, saves the run and ends it.

    Attributes:
        number: the number of the first signal that arrived, or 0.
    """

    def __init__(self) -> None:
        self.number = 0
        self._saved_as: str | None = None
        self._before: dict[int, Any] = {}

    def exit_immediately(self, saved_as: str) -> None:
        """End the command on a signal from now on, because the run is saved.

        Raises:
            Interrupted: a signal has arrived; after this call, whenever one arrives.
        """
        self._saved_as = saved_as
        if self.number:
            raise interrupted(self.number, saved_as)

    def ignore(self) -> None:
        """Ignore signals until the process ends: the run is finished, and the command should end with its result.

        Raises:
            Interrupted: a signal has arrived before.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.number:
            assert self._saved_as is not None
            raise interrupted(self.number, self._saved_as)

    def __enter__(self) -> "StopSignal":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        signal.set_wakeup_fd(-1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        restore_handlers(self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self._saved_as is not None:
            raise interrupted(number, self._saved_as)


def interrupted(number: int, saved_as: str) -> Interrupted:
    """Return the exception of a run that was saved and ends because of a signal."""
    return Interrupted(f"{signal.Signals(number).name}: saved {saved_as}; run the same command again to resume from it")


def interrupted_unsaved(number: int) -> Interrupted:
    """Return the exception of a run that a signal ends before it can be saved, mainly before its first step."""
    return Interrupted(
        f"{signal.Signals(number).name}: stopped without saving; run the same command again to resume from the last "
        "checkpoint, or to start"
    )
