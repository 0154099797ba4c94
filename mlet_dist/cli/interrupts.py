"""Ends a command on a stop signal by KeyboardInterrupt, as Ctrl-C does, so that temporary directories are removed."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

from mlet_dist.training.signals import STOP_SIGNALS

_AGAIN_SECONDS = 0.25


class InterruptOnStopSignal:
    """Raises KeyboardInterrupt, with the signal's number, in the main thread when a stop signal arrives in its block.

    An exception that a signal handler raises can be lost: the code that it interrupts may catch it, a finalizer cannot
    pass it on, and an import in C++ may turn it into an ImportError. So it is not raised during an import, a thread
    sends the signal again until the block has ended, and any error that ends the block after a signal counts as its
    consequence.
    """

    def __init__(self) -> None:
        self._number = 0
        self._raised: KeyboardInterrupt | None = None
        self._ended = threading.Event()
        self._has_ended = False
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._send_again, daemon=True)
        self._before: dict[int, Any] = {}
        self._hook = sys.unraisablehook
        self._wakeup = -1

    def __enter__(self) -> Self:
        sys.unraisablehook = self._report_unraisable
        self._thread.start()
        self._before = {number: signal.signal(number, self._interrupt) for number in STOP_SIGNALS}
        self._wakeup = signal.set_wakeup_fd(-1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._has_ended = True
        self._ended.set()
        self._thread.join()
        if self._wakeup != -1:
            signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        sys.unraisablehook = self._hook
        if self._number and error is not None and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(self._number) from None

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._number = self._number or number
        if self._has_ended or _is_importing(frame) or self._is_unwinding():
            return
        self._raised = KeyboardInterrupt(self._number)
        raise self._raised

    def _is_unwinding(self) -> bool:
        """Return whether the main thread already handles the exception, for example removes a directory."""
        error, seen = sys.exception(), set[int]()
        while error is not None and id(error) not in seen:
            if error is self._raised:
                return True
            seen.add(id(error))
            error = error.__context__
        return False

    def _send_again(self) -> None:
        # Polls, because a signal handler that woke this thread would have to take a lock.
        while not self._ended.wait(_AGAIN_SECONDS):
            if self._number and self._main is not None:
                signal.pthread_kill(self._main, self._number)

    def _report_unraisable(self, report: Any) -> None:
        if not (self._number and isinstance(report.exc_value, KeyboardInterrupt)):
            self._hook(report)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
