"""Heartbeats between the launchers of a job: who is lost, and why an attempt failed, within seconds on every node.

The nodes use the store that node 0 keeps. Each launcher counts up a number of its own there, and node 0 looks whether
all of them still change. The others notice by the answers of the store whether node 0 is there. Whoever finds that the
attempt has failed writes the reason under one key, which all of them watch.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Self

from torch import distributed as dist

from mlet_dist.cluster.failure import CONSEQUENCES, Failure
from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.silence import Silence

_POLL_SECONDS = 0.5
_LOST_SECONDS, _LOST_LOOKS = 15.0, 10
"""How long a node may give no sign of life, and how many looks in a row must find none.

A launcher has nothing else to do, so that only a machine that does not answer is silent for so long: live migrations,
failovers of a network and retransmissions take a few seconds.
"""

_SILENT_SECONDS = 2.0  # without a sign of life, after which node 0 says that a node may be lost
_HOLD_SECONDS = 3.0  # for node 0 to notice that, before a node tells that a rank was aborted
_HOLD_CONNECTION_SECONDS = 2.0  # likewise if a rank has lost a connection, which its own node reports late

_TOLD_SECONDS = 10.0  # for the other nodes to learn why this one ends
_DONE_SECONDS = 60.0  # for the other nodes to end after the run has finished
_CONNECT = timedelta(seconds=10)

FAILED = "failed"
"""The key of the reason why an attempt failed."""

_SILENT = "silent"
"""The key of the nodes that node 0 has heard nothing of for some seconds."""


class Heartbeats:
    """Shows the other nodes that this one is alive, and watches them, within the block.

    All calls of the store are made by a thread, since the library waits without a limit for a machine that does not
    answer; a second thread notices that.

    Args:
        nodes: the nodes of the job.
        prefix: the prefix of the keys of this attempt.
        names: the names of all nodes.
        on_failure: called once, in another thread, when the attempt has failed.
    """

    def __init__(self, nodes: Nodes, prefix: str, names: list[str], on_failure: Callable[[Failure], None]) -> None:
        self.failure: Failure | None = None
        self._nodes, self._prefix, self._names, self._on_failure = nodes, prefix, names, on_failure
        self._store: dist.Store | None = None
        self._lock = threading.Lock()
        self._wake, self._has_failed, self._end = threading.Event(), threading.Event(), threading.Event()
        self._is_connected = threading.Event()
        self._own: Failure | None = None
        self._told = 0.0
        self._marks: list[str] = []
        self._delivered: set[str] = set()
        self._answers = 0
        self._silences: dict[int, Silence] = {}
        self._silent: list[int] | None = None
        self._others = [each for each in range(nodes.count) if each != nodes.rank] if nodes.rank == 0 else []
        self._gone: set[int] = set()
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._beat, self._await_answers)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self._is_connected.wait(_CONNECT.total_seconds())  # so that ranks start where node 0 is reached
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._wake.set()
        self._threads[1].join()  # the first may wait for node 0 for ever

    def tell(self, failure: Failure) -> None:
        """Tell all nodes that the attempt has failed, unless one has told another reason before; does not wait.

        A rank that was aborted is not told while a node is silent, because that node may be found lost.
        """
        if self._own is None:
            self._told = time.monotonic()
        if self._own is None or (self._own.kind in CONSEQUENCES and failure.kind not in CONSEQUENCES):
            self._own = failure
        self._wake.set()

    def wait_for_failure(self, seconds: float) -> Failure | None:
        """Return why the attempt failed, as soon as that is known; None if it is not known in time."""
        deadline = time.monotonic() + seconds
        while not self._has_failed.wait(0.1) and time.monotonic() < deadline:
            pass
        return self.failure

    def finish(self) -> None:
        """Say that the ranks of this node have succeeded; node 0, which keeps the store, waits for the others."""
        self._leave("done", _DONE_SECONDS, for_good=True)

    def leave_with(self, failure: Failure, *, for_good: bool) -> None:
        """Tell why the ranks have failed; if node 0, which keeps the store, ends for good, it waits for the others."""
        self.tell(failure)
        self._leave("told", _TOLD_SECONDS, for_good)

    def _leave(self, mark: str, seconds: float, for_good: bool) -> None:
        self._marks.append(mark)
        self._wake.set()
        deadline = time.monotonic() + seconds
        others = len(self._others) if for_good else 0
        while mark not in self._delivered or len(self._gone) < others:
            lost_node_0 = self.failure is not None and self.failure.kind == "lost" and self.failure.node == 0
            if lost_node_0 or time.monotonic() > deadline:
                break
            time.sleep(0.05)

    def _beat(self) -> None:
        count = 0
        while not self._end.is_set():
            try:
                if self._store is None:
                    self._store = self._connect()
                self._exchange(self._store, count)
            except (OSError, RuntimeError):
                self._store = None
                if not _listens(self._nodes):
                    # The library prints a stack trace if it cannot connect: do not try again.
                    self._note(Failure("lost", 0, f"{self._names[0]} has ended"))
                    return
            else:
                count += 1
                self._answers = count
                self._is_connected.set()
            self._wake.wait(_POLL_SECONDS)
            self._wake.clear()

    def _connect(self) -> dist.Store:
        host = "localhost" if self._nodes.rank == 0 else self._nodes.master
        server = dist.TCPStore(host, self._nodes.port, None, False, _CONNECT)
        store = dist.PrefixStore(self._prefix, server)
        if not store.check(["roster"]):  # another process of node 0, which knows nothing of this attempt
            self._note(Failure("lost", 0, f"{self._names[0]} has been started again"))
        return store

    def _exchange(self, store: dist.Store, count: int) -> None:
        store.set(_beat_of(self._nodes.rank), f"{count}")
        if self._others:
            self._look_at_others(store)
        if self._own is not None and self.failure is None:
            told = self._with_silent_nodes(store, self._own)
            if told is not None:
                store.compare_set(FAILED, "", told.to_json())
        if self.failure is None and store.check([FAILED]):
            self._note(Failure.from_json(store.get(FAILED)))
        marks = [*self._marks, *(["told"] if self.failure is not None else [])]
        for mark in marks:
            if mark not in self._delivered:
                store.set(f"{mark}/{self._nodes.rank}", "")
                self._delivered.add(mark)

    def _with_silent_nodes(self, store: dist.Store, own: Failure) -> Failure | None:
        """Return what to tell of this node's failure, or None if it is too early, because another may be the reason."""
        if own.kind not in CONSEQUENCES:
            return own
        hold = _HOLD_SECONDS if own.kind == "aborted" else _HOLD_CONNECTION_SECONDS
        silent = json.loads(store.get(_SILENT)) if store.check([_SILENT]) else []
        if time.monotonic() - self._told < hold or (silent and own.kind == "aborted"):
            return None
        names = ", ".join(self._names[node] for node in silent)
        return replace(own, text=f"{own.text}; no sign of life from {names}") if silent else own

    def _look_at_others(self, store: dist.Store) -> None:
        """On node 0: find nodes that have left or are lost."""
        for node in self._others:
            if node in self._gone:
                continue
            if store.check([f"done/{node}"]) or store.check([f"told/{node}"]):
                self._gone.add(node)
                continue
            beat = store.get(_beat_of(node)) if store.check([_beat_of(node)]) else b""
            if self._silences.setdefault(node, _new_silence()).is_too_long(beat):
                self._gone.add(node)
                lost = Failure("lost", node, _without_sign_of_life(self._names[node]))
                store.compare_set(FAILED, "", lost.to_json())
        watched = {node: silence for node, silence in self._silences.items() if node not in self._gone}
        silent = [node for node, silence in watched.items() if silence.seconds > _SILENT_SECONDS]
        if silent != self._silent:
            store.set(_SILENT, json.dumps(silent))
            self._silent = silent

    def _await_answers(self) -> None:
        silence = _new_silence()
        while not self._end.wait(_POLL_SECONDS):
            if silence.is_too_long(self._answers):
                self._note(Failure("lost", 0, _without_sign_of_life(self._names[0])))
                return

    def _note(self, failure: Failure) -> None:
        with self._lock:
            if self.failure is not None or self._end.is_set():
                return
            self.failure = failure
        self._has_failed.set()
        self._on_failure(failure)


def _new_silence() -> Silence:
    return Silence(_LOST_SECONDS, _LOST_LOOKS)


def _beat_of(node: int) -> str:
    return f"beat/{node}"


def _without_sign_of_life(name: str) -> str:
    return f"{name} is lost: it has given no sign of life for {_LOST_SECONDS:g} s"


def _listens(nodes: Nodes) -> bool:
    """Return whether node 0 may still be there: False if its host refuses the connection."""
    try:
        socket.create_connection((nodes.master, nodes.port), timeout=3).close()
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
    return True
