"""Being told to stop: SIGTERM, as from Kubernetes or torchrun, and SIGUSR1, as from Slurm."""

import signal
from types import FrameType, TracebackType
from typing import Any

from mlet_dist.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


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
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._note)
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
