"""Ends the ranks of an elastic job's node when another node has vanished, so that torch elastic restarts them.

A machine that vanishes closes no connection, and the ranks of the others would wait for it until their collective
times out. torch elastic looks whether nodes are there only while they meet. The launchers therefore count up a number
each in the store of node 0, as in ``heartbeats.py``, and each of them looks at the numbers of all others, since nodes
come and go.
"""

import os
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import distributed as dist

from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.silence import Silence
from mlet_dist.node_log import log_of_node

_POLL_SECONDS = 0.5
_LOST_SECONDS, _LOST_LOOKS = 15.0, 10  # as in heartbeats.py
_CONNECT = timedelta(seconds=10)
_LEFT, _LEAVE_SECONDS = b"left", 2.0  # what a launcher writes when it ends, and how long it tries


class ElasticBeats:
    """Shows the other nodes that this one is alive, and kills its ranks if another is silent, within the block.

    Ranks are killed that may have been started together with the silent node, and no others. Node 0 is silent if its
    store does not answer.

    Args:
        nodes: the nodes of the job.
        job: the id of the job.
        last_call: for how many seconds torch elastic waits for further nodes before it starts ranks: so long after it
            was heard of for the last time, a node may take part.
    """

    def __init__(self, nodes: Nodes, job: str, last_call: float) -> None:
        self._nodes, self._prefix, self._last_call = nodes, f"mlet/{job}", last_call
        self._store: dist.Store | None = None
        self._answers = 0
        self._silences: dict[int, Silence] = {}
        self._children = Path(f"/proc/self/task/{os.getpid()}/children")
        self._started: dict[int, float] = {}
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

    def _watch(self) -> None:
        """Note when ranks are started, and whether node 0 answers, which the other thread waits for."""
        silence = Silence(_LOST_SECONDS, _LOST_LOOKS)
        while not self._end.wait(_POLL_SECONDS):
            now = time.monotonic()
            with suppress(OSError, ValueError):  # this is not Linux
                self._started = {
                    pid: self._started.get(pid, now) for pid in map(int, self._children.read_text().split())
                }
            if silence.is_too_long(self._answers) and self._answers and self._nodes.rank:
                self._lose(0, silence.seconds)

    def _lose(self, node: int, seconds: float) -> None:
        """Kill the ranks that may have been started with a node that has been silent for so many seconds."""
        latest = time.monotonic() - seconds + self._last_call
        lost = [pid for pid, started in self._started.items() if started < latest]
        if lost:
            text = f"node {node} is lost: it has given no sign of life for {_LOST_SECONDS:g} s; the ranks start again"
            log_of_node(self._nodes.rank, self._nodes.count, text)
        for pid in lost:
            self._started.pop(pid, None)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
