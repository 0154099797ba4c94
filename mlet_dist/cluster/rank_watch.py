"""Watches the rank processes of this node beside torch elastic, which waits for the slowest of them."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from mlet_dist.cluster.failure import Kind
from mlet_dist.training.attempts import ENDED
from mlet_dist.training.lost_ranks import HUNG

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
"""How long a rank may still answer after the others, who waited 10 s for it, have reported that it hangs."""

_STOPPED_SECONDS = 20.0
"""How long a rank may be stopped, as by SIGSTOP, after another rank of this node has ended."""

_CONNECTION_SECONDS = 2.0
"""How long a lost connection is not reported, because the node whose rank crashed reports that."""

_KINDS: dict[str, Kind] = {"ConnectionLost": "connection", "RanksLost": "timeout", "UserError": "input"}


class RankWatch:
    """Watches the ranks that the main thread of this process starts within the block.

    It reports a rank that has failed at once, passes signals on to the ranks, and kills ranks: those that the others
    reported because they took no part in a collective (``lost_ranks.py``), those that are stopped while another rank of
    this node has ended already, and all of them when ``kill_all`` asks for it.

    Args:
        received: the numbers of signals to pass on, to which others may be added.
        shutdown_seconds: how long ranks may take to end after a signal.
        report: called once, in another thread, with the kind of a failure and its reason if that is known.

    Attributes:
        killed: the process ids of ranks that were killed because ``kill_all`` asked for it.
        hung: whether a rank was killed because it hung.
    """

    def __init__(self, received: Sequence[int], shutdown_seconds: float, report: Callable[[Kind, str], None]) -> None:
        self.killed, self.hung = set[int](), False
        self._received, self._shutdown_seconds, self._report = received, shutdown_seconds, report
        self._children = Path(f"/proc/self/task/{os.getpid()}/children")
        self._since: dict[int, float] = {}
        self._seen: set[int] = set()
        self._sent: set[tuple[int, int]] = set()
        self._asked_to_stop: float | None = None
        self._lost_connection: float | None = None
        self._has_reported = False
        self._kill_at: float | None = None
        self._logs = Path()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def watch(self, logs: Path) -> Self:
        """Set the directory of torch elastic, with a folder for each rank, and return this object."""
        self._logs = logs
        return self

    def kill_all(self, seconds: float) -> None:
        """Kill all ranks that have not ended after so many seconds."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + seconds

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
        now = time.monotonic()
        ranks = {int(pid) for pid in self._children.read_text().split()}
        self._seen |= ranks
        self._pass_on_signals(ranks, now)
        if self._kill_at is not None and now > self._kill_at and ranks:
            self.killed |= ranks
            _kill(ranks)
        self._kill_hung(ranks, now)
        self._report_failure(len(self._seen) - len(ranks), now)

    def _pass_on_signals(self, ranks: set[int], now: float) -> None:
        for number in self._received:
            self._asked_to_stop = self._asked_to_stop or now
            for pid in ranks:
                if (pid, number) not in self._sent:
                    self._sent.add((pid, number))
                    os.kill(pid, number)
        if self._asked_to_stop is not None and now > self._asked_to_stop + self._shutdown_seconds:
            _kill(ranks)

    def _kill_hung(self, ranks: set[int], now: float) -> None:
        reported = {int(marker.read_text()) for marker in self._logs.rglob(HUNG)} & ranks
        has_ended = bool(self._seen - ranks)
        stopped = {pid for pid in ranks if has_ended and _state(pid) in "tT"}
        self._since = {pid: self._since.get(pid, now) for pid in reported | stopped}
        for pid, since in self._since.items():
            if now - since > (_GRACE_SECONDS if pid in reported else _STOPPED_SECONDS):
                self.hung = True
                _kill({pid})

    def _report_failure(self, gone: int, now: float) -> None:
        """Report the first rank that has failed: it left an error, or nothing at all if it was killed."""
        if self._has_reported or self._asked_to_stop is not None or self._kill_at is not None or not gone:
            return
        errors = [*self._logs.rglob("error.json")]
        found = [_kind_of(file) for file in errors]
        causes = [each for each in found if each is not None and each[0] != "connection"]
        if not causes and gone > len(errors) + len([*self._logs.rglob(ENDED)]):
            causes = [("crash", "")]
        if not causes and any(found):
            self._lost_connection = self._lost_connection or now
            if now > self._lost_connection + _CONNECTION_SECONDS:
                causes = [each for each in found if each is not None]
        if causes:
            self._has_reported = True
            self._report(*causes[0])


def _kind_of(file: Path) -> tuple[Kind, str] | None:
    """Return the kind of failure that a rank recorded, with its message if all nodes show it; None if it was asked."""
    recorded = json.loads(file.read_text(encoding="utf-8"))["message"]
    name, _, message = (recorded["message"] if isinstance(recorded, dict) else str(recorded)).partition(": ")
    if name == "Interrupted":
        return None
    kind = _KINDS.get(name, "crash")
    return kind, message if kind in ("input", "timeout") else ""


def _kill(ranks: set[int]) -> None:
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    """Return the state of a process, one letter."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
