"""Being told to stop: SIGTERM, as from Kubernetes or torchrun, and SIGUSR1, as from Slurm."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any

from mlet_dist.errors import Interrupted

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@contextmanager
def exiting_when_told() -> Iterator[None]:
    """Within the block, but in a StopSignal's, a signal that asks to stop ends this process at once, with code 75.

    A thread does so. Python's handlers run only when the main thread comes back from what it waits for, and it waits
    in C++, for minutes, for ranks that start later. After a StopSignal's block the signals are ignored: it is over.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    threading.Thread(target=_exit_when_told, args=(told,), daemon=True).start()
    before = {number: signal.signal(number, _hear) for number in STOP_SIGNALS}
    signal.set_wakeup_fd(tell)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(tell)


def _hear(number: int, frame: FrameType | None) -> None:
    """Without a handler in Python no signal comes to the wakeup file."""


def _exit_when_told(told: int) -> None:
    with os.fdopen(told, "rb", buffering=0) as file:
        while said := file.read(1):
            if said[0] in STOP_SIGNALS:
                if os.environ.get("RANK", "0") == "0":
                    with suppress(OSError):  # a log that nobody reads any more
                        print(f"mlet: {not_saved(said[0])}", file=sys.stderr, flush=True)
                os._exit(Interrupted.EXIT_CODE)


class StopSignal:
    """Within the block, a signal that asks to stop is noted; whoever looks at ``number`` answers it.

    Attributes:
        number: of the first signal that came; 0 while there was none.
    """

    def __init__(self) -> None:
        self.number = 0
        self._saved_as: str | None = None
        self._before: dict[int, Any] = {}

    def leave_at_once(self, saved_as: str) -> None:
        """From now on a signal ends the command: nothing is left to be saved.

        Raises:
            Interrupted: one has come already; later, whenever one comes.
        """
        self._saved_as = saved_as
        if self.number:
            raise interrupted(self.number, saved_as)

    def __enter__(self) -> "StopSignal":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        signal.set_wakeup_fd(-1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = self.number or number
        if self._saved_as is not None:
            raise interrupted(number, self._saved_as)


def interrupted(number: int, saved_as: str) -> Interrupted:
    """What a run says that leaves because of a signal."""
    return Interrupted(f"{signal.Signals(number).name}: saved {saved_as}; the same command goes on from there")


def not_saved(number: int) -> Interrupted:
    """What a run says that a signal ends while it cannot be saved, above all before its first step."""
    return Interrupted(
        f"{signal.Signals(number).name}: stopped without saving; the same command goes on from the last checkpoint, or "
        "begins"
    )
