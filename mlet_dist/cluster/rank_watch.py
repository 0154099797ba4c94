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

from mlet_dist.cluster.failure import CONSEQUENCES, Kind
from mlet_dist.cluster.silence import Silence
from mlet_dist.training.attempts import ENDED
from mlet_dist.training.lost_ranks import HUNG
from mlet_dist.training.rank_files import RankFolder, folders_by_process, is_aborted

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 10.0
"""How long a rank may still answer after the others, who waited 10 s for it, have reported that it hangs."""

STOPPED_SECONDS, _STOPPED_LOOKS = 15.0, 50
"""How long a rank may be stopped, as by SIGSTOP, and how many looks in a row must find it so.

A machine or a job that was suspended as a whole continues one process after the other, the launcher maybe first.
"""

_CONSEQUENCE_SECONDS = 2.0
"""How long what follows from a failure elsewhere is not reported, because the node of that failure reports it."""

_ENDED = "ZX"  # states of processes: not collected yet, and gone

_KINDS: dict[str, Kind] = {"ConnectionLost": "connection", "RanksLost": "timeout", "UserError": "input"}


class RankWatch:
    """Watches the ranks that the main thread of this process starts within the block.

    It reports a rank that has failed at once, passes signals on to the ranks, and kills ranks: those that the others
    reported because they took no part in a collective (``lost_ranks.py``), those that are stopped, which no other
    process notices, and all of them when ``kill_all`` asks for it.

    A rank that a debugger has stopped is left alone. So is the only rank of a job, for which nobody waits.

    Args:
        received: the numbers of signals to pass on, to which others may be added.
        shutdown_seconds: how long ranks may take to end after a signal.
        report: called once, in another thread, with the kind of a failure and what is known of it: for ``input`` and
            ``timeout`` the message of a rank, otherwise a text that begins with the number of the rank.
        has_peers: whether the job has more than one rank.
        on_cuda: whether the ranks use NCCL, whose watchdog aborts a rank that has lost another.

    Attributes:
        killed: the process ids of ranks that were killed because ``kill_all`` asked for it.
        stopped: the process ids of ranks that were killed because they were stopped.
        hung: whether a rank was killed because it hung.
        on_cuda: as given.
    """

    def __init__(
        self,
        received: Sequence[int],
        shutdown_seconds: float,
        report: Callable[[Kind, str], None],
        *,
        has_peers: bool = True,
        on_cuda: bool = False,
    ) -> None:
        self.killed, self.stopped, self.hung, self.on_cuda = set[int](), set[int](), False, on_cuda
        self._received, self._shutdown_seconds, self._report = received, shutdown_seconds, report
        self._has_peers = has_peers
        self._children = Path(f"/proc/self/task/{os.getpid()}/children")
        self._folders: dict[int, RankFolder] = {}
        self._hung_since: dict[int, float] = {}
        self._stops: dict[int, Silence] = {}
        self._seen: set[int] = set()
        self._sent: set[tuple[int, int]] = set()
        self._asked_to_stop: float | None = None
        self._first_consequence: float | None = None
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
        states = {pid: _state(pid) for pid in map(int, self._children.read_text().split())}
        ranks = {pid for pid, state in states.items() if state not in _ENDED}
        self._seen |= set(states)
        if not self._seen <= set(self._folders):
            self._folders = folders_by_process(self._logs)
        self._pass_on_signals(ranks, now)
        if self._kill_at is not None and now > self._kill_at and ranks:
            self.killed |= ranks
            _kill(ranks)
        self._kill_hung(ranks, now)
        self._kill_stopped({pid for pid in ranks if states[pid] == "T"})
        self._report_failure(ranks, now)

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
        reported = {pid for pid in ranks if pid in self._folders and (self._folders[pid].path / HUNG).exists()}
        self._hung_since = {pid: self._hung_since.get(pid, now) for pid in reported}
        hung = {pid for pid, since in self._hung_since.items() if now - since > _GRACE_SECONDS}
        self.hung = self.hung or bool(hung)
        _kill(hung)

    def _kill_stopped(self, stopped: set[int]) -> None:
        """Kill ranks that are stopped: the other ranks wait for them, and can neither train nor save meanwhile."""
        known = self._stops
        self._stops = {pid: known.get(pid) or Silence(STOPPED_SECONDS, _STOPPED_LOOKS) for pid in stopped}
        if not self._has_peers:
            return
        found = [pid for pid, silence in self._stops.items() if silence.is_too_long("T")]
        if found:
            self.stopped |= set(found)
            self._report_once("crash", f"{self._named(found[0])} {was_stopped()}")
            _kill(set(found))

    def _report_failure(self, alive: set[int], now: float) -> None:
        """Report the first rank that has failed: it left an error, or nothing at all if it was killed."""
        if self._has_reported or self._asked_to_stop is not None or self._kill_at is not None:
            return
        # A rank may have ended, or started, since this node's processes were listed.
        started = {
            pid: pid in alive or (pid not in self._seen and _state(pid) not in _ENDED)
            for pid in self._seen | set(self._folders)
        }
        found = [each for each in (self._failure_of(self._folders.get(pid), started[pid]) for pid in started) if each]
        causes = [each for each in found if each[0] not in CONSEQUENCES]
        if not causes and found:
            self._first_consequence = self._first_consequence or now
            if now > self._first_consequence + _CONSEQUENCE_SECONDS:
                causes = found
        if causes:
            self._report_once(*causes[0])

    def _failure_of(self, folder: RankFolder | None, is_alive: bool) -> tuple[Kind, str] | None:
        """Return why a rank has failed, and a text as ``report`` takes it; None if it runs, succeeded or was asked."""
        if folder is None:
            return None if is_alive else ("crash", "a rank has ended at its start; see its log")
        with suppress(FileNotFoundError, ValueError):  # the rank has not written it yet, or not to the end
            recorded = json.loads((folder.path / "error.json").read_text(encoding="utf-8"))["message"]
            text = recorded["message"] if isinstance(recorded, dict) else str(recorded)
            name, _, message = text.partition(": ")
            if name == "Interrupted":
                return None
            kind = _KINDS.get(name, "crash")
            if kind in ("input", "timeout"):
                return kind, message
            how = "has lost its connection to another rank" if kind == "connection" else "has failed; see its log"
            return kind, f"rank {folder.rank} {how}"
        if is_alive or (folder.path / ENDED).exists():
            return None
        if is_aborted(folder.path):
            return "aborted" if self.on_cuda else "crash", f"rank {folder.rank} was aborted (SIGABRT); see its log"
        return "crash", f"rank {folder.rank} was killed; see its log"

    def _report_once(self, kind: Kind, text: str) -> None:
        if not self._has_reported:
            self._has_reported = True
            self._report(kind, text)

    def _named(self, pid: int) -> str:
        return f"rank {self._folders[pid].rank}" if pid in self._folders else "a rank"


def was_stopped() -> str:
    """Return what is said of a rank that was killed because it was stopped."""
    return f"was stopped (SIGSTOP) for {STOPPED_SECONDS:g} s, and killed because the other ranks wait for it"


def _kill(ranks: set[int]) -> None:
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _state(pid: int) -> str:
    """Return the state of a process, one letter: T if a signal has stopped it, t if a debugger has; Z if it ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"
