"""Rendezvous: the nodes of a job join at node 0 and start together, or all end with the same reason.

Node 0 keeps a TCPStore, in which it announces each round by a random name, which is the prefix of all keys of the
round. Every node writes a report with a random token there and waits for the roster, in which node 0 lists the tokens
of all nodes. A node whose token is not in the roster has reached another attempt of the job.
"""

import json
import queue
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.registration import (
    ANSWER_SECONDS,
    OTHER_JOB,
    POLL_SECONDS,
    NotAdmitted,
    Registration,
    RendezvousRound,
    Report,
    gave_up,
    why_unreachable,
)
from mlet_dist.errors import NodesMissing, UserError

_PORT_SECONDS = 10.0  # for an earlier job to release the port
_STORE_TIMEOUT = timedelta(minutes=5)
_SILENT_SECONDS = 15.0  # without an answer of node 0 until a node tries to reach it anew


class Rendezvous:
    """Lets the nodes of a job meet at node 0, again each time that their ranks have failed.

    Args:
        nodes: the nodes of the job.
        job: the id of the job.
        check_stop: called while this node waits; may raise an exception to end the wait.
    """

    def __init__(self, nodes: Nodes, job: str, check_stop: Callable[[], None] = lambda: None) -> None:
        self._nodes, self._job, self._check_stop = nodes, job, check_stop
        self._server: dist.TCPStore | None = None
        self._last = ""

    def meet(self, report: Report, find_problems: Callable[[Sequence[Report]], str]) -> RendezvousRound:
        """Wait for all nodes.

        Args:
            report: the report of this node, which must be serializable as JSON. ``name`` is its name, ``rounds`` the
                number of its rounds before this one, and ``cause`` why its last attempt failed, or ``unknown``;
                ``run_before`` and ``run_now`` are ``run_to_replace`` before the job and now.
            find_problems: called on node 0 with the reports of all nodes, by rank; returns what is wrong, or "".

        Raises:
            UserError: the port is in use, or ``find_problems`` found something; every node raises the latter.
            NodesMissing: node 0 cannot be reached, or a node did not join in time.
        """
        report = {"rounds": 0, "cause": "", "name": f"node {self._nodes.rank}"} | report
        report = {"run_before": None, "run_now": None} | report
        report |= {"token": uuid.uuid4().hex}
        return self._host(report, find_problems) if self._nodes.rank == 0 else self._join(report)

    def _host(self, report: Report, find_problems: Callable[[Sequence[Report]], str]) -> RendezvousRound:
        """Collect the reports of all nodes and send each of them the result."""
        nodes, everyone = self._nodes, range(self._nodes.count)
        deadline = time.monotonic() + nodes.wait
        if self._server is None:
            self._server = _start_store(nodes, self._check_stop)
        name = uuid.uuid4().hex
        prefix = f"{self._job}/{name}"
        store = dist.PrefixStore(prefix, self._server)
        store.set("report/0", json.dumps(report))
        dist.PrefixStore(self._job, self._server).set("round", name)
        missing = self._wait_for_keys(store, [f"report/{each}" for each in everyone], deadline)
        if missing:
            lost = (
                f"{_listed(missing)} of {nodes.count} did not join at {nodes.endpoint} within {nodes.wait:g} s (--wait)"
            )
            lost += "; check that all nodes run the same command and can reach this host"
            present = _read_reports(store, [each for each in everyone if each not in missing])
            self._publish_roster(store, present, {"ranks_lost": lost})
            raise NodesMissing(lost)
        reports = _read_reports(store, everyone)
        problem = find_problems(list(reports.values()))
        first = max(reports.values(), key=lambda each: each["rounds"])  # it knows how the job began
        roster = {
            "number": first["rounds"],
            "names": [each["name"] for each in reports.values()],
            "is_unexplained": all(each["cause"] == "unknown" for each in reports.values()),
            "run_before": first["run_before"],
            # Node 0 decides, because other nodes may see an older state of shared storage.
            "has_replaced": first["run_before"] is None or first["run_before"] != report["run_now"],
        }
        silent = self._publish_roster(store, reports, roster | ({"user_error": problem} if problem else {}))
        if problem:
            raise UserError(problem)
        return RendezvousRound(store, prefix, **roster, silent=tuple(silent))

    def _publish_roster(self, store: dist.Store, reports: dict[int, Report], outcome: dict[str, Any]) -> list[int]:
        """Publish the roster with the outcome; return the nodes that have not acknowledged it in time."""
        tokens = {rank: report["token"] for rank, report in reports.items()}
        store.set("roster", json.dumps({"tokens": tokens} | outcome))
        store.set("acknowledged/0", "")
        ranks = list(reports)
        keys = [f"acknowledged/{each}" for each in ranks]
        missing = self._wait_for_keys(store, keys, time.monotonic() + ANSWER_SECONDS)
        return [ranks[each] for each in missing]

    def _join(self, report: Report) -> RendezvousRound:
        """Try to register at node 0 until this attempt's node 0 has admitted this node."""
        nodes = self._nodes
        deadline = time.monotonic() + nodes.wait
        reason = ""
        while time.monotonic() < deadline:
            reason = why_unreachable(nodes)
            if not reason:
                try:
                    return self._register_in_thread(report, deadline)
                except NotAdmitted as refused:
                    reason = str(refused)
                except (OSError, RuntimeError):  # node 0 has ended, and may be started again
                    reason = OTHER_JOB
                reason = reason.format(endpoint=nodes.endpoint, rank=nodes.rank)
            self._check_stop()
            time.sleep(0.5)
        raise gave_up(nodes, reason)

    def _register_in_thread(self, report: Report, deadline: float) -> RendezvousRound:
        """Register in a thread, because calls of the store wait without a limit for a host that does not answer."""
        result: queue.SimpleQueue[RendezvousRound | BaseException] = queue.SimpleQueue()
        attempt = Registration(self._nodes, self._job, self._last, report, deadline)

        def run() -> None:
            try:
                result.put(attempt.register())
            except BaseException as error:
                result.put(error)

        threading.Thread(target=run, daemon=True).start()
        try:
            while True:
                try:
                    found = result.get(timeout=0.05)
                    break
                except queue.Empty:
                    self._check_stop()
                    if time.monotonic() - attempt.answered > _SILENT_SECONDS:
                        raise NotAdmitted("node 0 at {endpoint} does not answer") from None
        finally:
            attempt.is_cancelled = True
        if isinstance(found, BaseException):
            raise found
        self._last = found.prefix
        return found

    def _wait_for_keys(self, store: dist.Store, keys: Sequence[str], deadline: float) -> list[int]:
        """Wait until the store has all keys; return the positions of those that it does not have by the deadline."""
        missing = list(range(len(keys)))
        while True:
            missing = [each for each in missing if not store.check([keys[each]])]
            if not missing or time.monotonic() > deadline:
                return missing
            self._check_stop()
            time.sleep(POLL_SECONDS)


def _start_store(nodes: Nodes, check_stop: Callable[[], None]) -> dist.TCPStore:
    deadline = time.monotonic() + min(_PORT_SECONDS, nodes.wait)
    while True:
        try:
            return dist.TCPStore("localhost", nodes.port, None, True, _STORE_TIMEOUT, wait_for_workers=False)
        except (OSError, RuntimeError) as error:
            in_use = "in use" in str(error)
            if not in_use or time.monotonic() > deadline:
                reason = (
                    "is in use by another job, or by processes that an earlier job left"
                    if in_use
                    else f"cannot be opened ({_first_line(error)})"
                )
                raise UserError(
                    f"port {nodes.port} of {socket.gethostname()} {reason}; choose another --master-port, the same on "
                    "all nodes"
                ) from None
        check_stop()
        time.sleep(0.5)


def _read_reports(store: dist.Store, ranks: Iterable[int]) -> dict[int, Report]:
    return {each: json.loads(store.get(f"report/{each}")) for each in ranks}


def _listed(ranks: Sequence[int]) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"node {numbers}" if len(ranks) == 1 else f"nodes {numbers}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
