"""Notes the signals that ask a launcher to stop: a handler that raised could be swallowed, or interrupt a clean-up."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1)
"""The signals that are passed on to the ranks."""


class StopRequest:
    """The signals that arrive within its block.

    Attributes:
        received: the numbers of different signals, in order.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self._before: dict[int, Any] = {}
        self._wakeup = -1

    def check(self) -> None:
        """Raise KeyboardInterrupt, with the number of the first signal, if one has arrived."""
        if self.received:
            raise KeyboardInterrupt(self.received[0])

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in FORWARDED}
        self._wakeup = signal.set_wakeup_fd(-1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._wakeup != -1:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number not in self.received:
            self.received.append(number)
