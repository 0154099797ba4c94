"""Ends the ranks of an elastic job's node that wait for a node in vain, so that torch elastic restarts them.

A machine that vanishes closes no connection, and the ranks of the others would wait for it until their collective
times out. torch elastic looks whether nodes are there only while they meet. The launchers therefore count up a number
each in the store of node 0, as in ``heartbeats.py``, and each of them looks at the numbers of all others, since nodes
come and go.

A machine that comes back is not told by torch elastic that the others have met again without it, and its ranks may wait
for theirs as well: gloo forgets a message that it was about to send when it finds a connection closed. So whoever gives
a round of the rendezvous up writes that into the store, under the name of the round, and each launcher looks there for
its own.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import distributed as dist

from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.rendezvous_rounds import RendezvousRounds
from mlet_dist.cluster.silence import Silence
from mlet_dist.node_log import log_of_node

_POLL_SECONDS = 0.5
_LOST_SECONDS, _LOST_LOOKS = 15.0, 10  # as in heartbeats.py
_GONE_SECONDS = 60.0
"""How long node 0 may not answer until this node ends: a call of its store waits without a limit."""

_LEFT_SECONDS = 30.0
"""How long ranks may go on after another node has left their round; torch elastic allows as much after a signal."""

_CONNECT = timedelta(seconds=10)
_LEFT, _LEAVE_SECONDS = b"left", 2.0  # what a launcher writes when it ends, and how long it tries


@dataclass(frozen=True)
class _Rank:
    """A rank process: when it was first seen, and the round after which it was started."""

    since: float
    round_name: str


@dataclass(frozen=True)
class _Over:
    """A round that is over: its name, the node that was lost (None if one left), and when this node learned of it."""

    round_name: str = ""
    lost: int | None = None
    since: float = 0.0


class ElasticBeats:
    """Shows the other nodes that this one is alive, and kills its ranks if they wait in vain, within the block.

    - Another node is silent: ranks are killed that may have been started together with it, and no others. Node 0 is
      silent if its store does not answer.
    - Another node has killed its ranks because a node was lost, maybe this one: those of the same round are killed.
    - Another node has left the round in which ranks of this one go on: they are killed after some time.

    Args:
        nodes: the nodes of the job.
        job: the id of the job.
        rounds: of this node.
        last_call: for how many seconds torch elastic waits for further nodes before it starts ranks: so long after it
            was heard of for the last time, a node may take part.
        give_up: called once, in another thread, when node 0 has not answered for a minute. Then this process can only
            end.
    """

    def __init__(
        self, nodes: Nodes, job: str, rounds: RendezvousRounds, last_call: float, give_up: Callable[[], None]
    ) -> None:
        self._nodes, self._prefix, self._last_call = nodes, f"mlet/{job}", last_call
        self._rounds, self._give_up = rounds, give_up
        self._store: dist.Store | None = None
        self._answers = 0
        self._silences: dict[int, Silence] = {}
        self._children = Path(f"/proc/self/task/{os.getpid()}/children")
        self._ranks: dict[int, _Rank] = {}
        self._given_up: dict[str, int] = {}  # names of rounds, with the node for which they were given up
        self._over = _Over()
        self._lock, self._logged = threading.Lock(), ""  # the round that was said to be over
        self._end = threading.Event()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._beat, self._watch)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._threads[0].join(_LEAVE_SECONDS)  # it may wait for node 0 for ever
        self._threads[1].join()

    def _beat(self) -> None:
        others = [node for node in range(self._nodes.count) if node != self._nodes.rank]
        while not self._end.wait(_POLL_SECONDS):
            try:
                self._store = self._store or self._connect()
                self._store.set(f"{self._nodes.rank}", f"{os.getpid()} {self._answers}")
                self._tell(self._store)
                self._listen(self._store)
                beats = {node: self._store.get(f"{node}") for node in others if self._store.check([f"{node}"])}
            except (OSError, RuntimeError):  # node 0 has not made its store yet, or is lost
                self._store = None
                continue
            self._answers += 1
            for node, beat in beats.items():
                silence = self._silences.setdefault(node, Silence(_LOST_SECONDS, _LOST_LOOKS))
                if silence.is_too_long(beat) and beat != _LEFT:
                    self._lose(node, silence.seconds)
        with suppress(OSError, RuntimeError):
            if self._store is not None and self._nodes.rank:  # node 0 takes its store with it
                self._store.set(f"{self._nodes.rank}", _LEFT.decode())

    def _connect(self) -> dist.Store:
        host = "localhost" if self._nodes.rank == 0 else self._nodes.master
        return dist.PrefixStore(self._prefix, dist.TCPStore(host, self._nodes.port, None, False, _CONNECT))

    def _tell(self, store: dist.Store) -> None:
        """Write which rounds are over; that a node was lost counts more than that one has left."""
        for round_name, node in [*self._given_up.items()]:
            store.set(_over(round_name), f"{node}")
            del self._given_up[round_name]
        while self._rounds.left:
            store.compare_set(_over(self._rounds.left[0]), "", "left")
            del self._rounds.left[0]

    def _listen(self, store: dist.Store) -> None:
        round_name = self._rounds.current
        if not round_name or not store.check([_over(round_name)]):
            return
        why = store.get(_over(round_name)).decode()
        lost = None if why == "left" else int(why)
        if (round_name, lost) != (self._over.round_name, self._over.lost):
            self._over = _Over(round_name, lost, time.monotonic())

    def _watch(self) -> None:
        """Look at the ranks, and whether node 0 answers, which the other thread waits for."""
        lost, gone = Silence(_LOST_SECONDS, _LOST_LOOKS), Silence(_GONE_SECONDS, _LOST_LOOKS)
        while not self._end.wait(_POLL_SECONDS):
            with suppress(OSError, ValueError):  # this is not Linux
                self._note_ranks()
            over = self._over
            if over.lost is not None or time.monotonic() > over.since + _LEFT_SECONDS:
                # Also those that are started only now, by a launcher that was suspended in between.
                ended = {pid for pid, rank in self._ranks.items() if rank.round_name == over.round_name}
                self._kill(ended, over.round_name, self._reason(over.lost))
            if self._nodes.rank and lost.is_too_long(self._answers) and self._answers:
                self._lose(0, lost.seconds)
            if self._nodes.rank and gone.is_too_long(self._answers):
                self._give_up()
                return

    def _note_ranks(self) -> None:
        now, round_name = time.monotonic(), self._rounds.current
        pids = [*map(int, self._children.read_text().split())]
        if round_name != self._rounds.current:  # it is not known to which round a new rank belongs: look again
            round_name = ""
        new = {pid: _Rank(now, round_name) for pid in pids} if round_name else {}
        self._ranks = {pid: self._ranks.get(pid) or new[pid] for pid in pids if pid in self._ranks or pid in new}

    def _lose(self, node: int, seconds: float) -> None:
        """Kill the ranks that may have been started with a node that has been silent for so many seconds."""
        latest = time.monotonic() - seconds + self._last_call
        lost = {pid: rank.round_name for pid, rank in self._ranks.items() if rank.since < latest}
        for round_name in {*lost.values()}:
            if round_name != self._logged:
                self._given_up[round_name] = node
            self._kill([pid for pid, of_rank in lost.items() if of_rank == round_name], round_name, self._reason(node))

    def _reason(self, lost: int | None) -> str:
        if lost is None:
            return f"ranks that go on {_LEFT_SECONDS:g} s after another node has left them start again"
        if lost == self._nodes.rank:
            return "the other nodes have taken this one for lost, and started again without it; it joins them"
        return f"node {lost} is lost: it has given no sign of life for {_LOST_SECONDS:g} s; the ranks start again"

    def _kill(self, pids: Iterable[int], round_name: str, reason: str) -> None:
        with self._lock:
            for pid in pids:
                if round_name != self._logged:
                    self._logged = round_name
                    log_of_node(self._nodes.rank, self._nodes.count, reason)
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def _over(round_name: str) -> str:
    return f"over/{round_name}"
