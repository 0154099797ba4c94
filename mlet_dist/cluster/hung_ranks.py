"""Kills ranks that hang when a job ends: torch elastic would wait for each of them as long as for one that saves."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mlet_dist.training.lost_ranks import HUNG

_POLL_SECONDS = 0.5
_GRACE_SECONDS = 10.0
"""How long a rank may still answer after the others, who waited 10 s for it, have reported that it hangs."""

_STOPPED_SECONDS = 20.0
"""How long a rank may be stopped, as by SIGSTOP, after another rank of this node has ended."""


class HungRanks:
    """Watches the ranks that this process starts within the block.

    Two kinds are killed: a rank that the others reported because it took no part in a collective (``lost_ranks.py``),
    and one that is stopped while another rank of this node has ended already.

    Args:
        logs: the directory of torch elastic, with a folder for each rank.
    """

    def __init__(self, logs: Path) -> None:
        self._logs, self._children = logs, Path(f"/proc/self/task/{os.getpid()}/children")
        self._since: dict[int, float] = {}
        self._seen: set[int] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._end.wait(_POLL_SECONDS):
            with suppress(OSError, ValueError):  # a rank ended in between; or this is not Linux
                self._look()

    def _look(self) -> None:
        ranks = {int(pid) for pid in self._children.read_text().split()}
        self._seen |= ranks
        reported = {int(marker.read_text()) for marker in self._logs.rglob(HUNG)} & ranks
        has_ended = bool(self._seen - ranks)
        stopped = {pid for pid in ranks if has_ended and _state(pid) in "tT"}
        now = time.monotonic()
        self._since = {pid: self._since.get(pid, now) for pid in reported | stopped}
        for pid, since in self._since.items():
            if now - since > (_GRACE_SECONDS if pid in reported else _STOPPED_SECONDS):
                os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    """Return the state of a process, one letter."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
