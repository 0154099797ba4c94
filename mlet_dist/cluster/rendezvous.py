"""Rendezvous: the nodes of a job join at node 0 and start together, or all end with the same reason.

Node 0 keeps a TCPStore. Every node writes a report with a random token into it and waits for the roster, in which node
0 lists the tokens of all nodes. A node whose token is not in the roster has reached another attempt of the job.
"""

import json
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, ClassVar

from torch import distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from mlet_dist.cluster.nodes import Nodes
from mlet_dist.errors import RanksLost, UserError

_POLL_SECONDS = 0.05
_PORT_SECONDS = 10.0  # for an earlier job to release the port
_ANSWER_SECONDS = 10.0
_STORE_TIMEOUT = timedelta(minutes=5)
_OTHER_JOB = (
    "{endpoint} is not node 0 of this job: another job uses the port, or node 0 was given a different command; only "
    "--node-rank may differ between nodes"
)
_STARTED_WITHOUT_THIS_NODE = (
    "node 0 started without this node: another node also has --node-rank {rank}, or node 0 has not noticed yet that "
    "its previous attempt has ended"
)

Report = dict[str, Any]


def rendezvous(
    nodes: Nodes, job: str, report: Report, find_problems: Callable[[Sequence[Report]], str]
) -> dist.TCPStore:
    """Wait for all nodes; return the store that node 0 keeps for them, which no earlier attempt has written to.

    Args:
        nodes: the nodes of the job.
        job: the id of the job.
        report: the report of this node, which must be serializable as JSON.
        find_problems: called on node 0 with the reports of all nodes, by rank; returns what is wrong, or "".

    Raises:
        UserError: the port is in use, or ``find_problems`` found something; every node raises the latter.
        RanksLost: node 0 cannot be reached, or a node did not join in time.
    """
    report = report | {"token": uuid.uuid4().hex}
    return _host(nodes, job, report, find_problems) if nodes.rank == 0 else _join(nodes, job, report)


def wait_for_node_0(nodes: Nodes) -> None:
    """Wait until node 0 listens.

    Raises:
        RanksLost: node 0 cannot be reached in time.
    """
    deadline = time.monotonic() + nodes.wait
    while reason := _why_unreachable(nodes):
        if time.monotonic() > deadline:
            raise _gave_up(nodes, reason)
        time.sleep(0.5)


def _host(nodes: Nodes, job: str, report: Report, find_problems: Callable[[Sequence[Report]], str]) -> dist.TCPStore:
    """Collect the reports of all nodes and send each of them the result."""
    deadline = time.monotonic() + nodes.wait
    server = _start_store(nodes)
    store, everyone = dist.PrefixStore(job, server), range(nodes.count)
    store.set("report/0", json.dumps(report))
    missing = _wait_for_keys(store, [f"report/{each}" for each in everyone], deadline)
    if missing:
        lost = f"{_listed(missing)} of {nodes.count} did not join at {nodes.endpoint} within {nodes.wait:g} s (--wait)"
        lost += "; check that all nodes run the same command and can reach this host"
        present = _read_reports(store, [each for each in everyone if each not in missing])
        _publish_roster(store, present, {"ranks_lost": lost})
        raise RanksLost(lost)
    reports = _read_reports(store, everyone)
    problem = find_problems(list(reports.values()))
    silent = _publish_roster(store, reports, {"user_error": problem} if problem else {})
    if problem:
        raise UserError(problem)
    if silent:
        raise RanksLost(
            f"{_listed(silent)} joined at {nodes.endpoint} but ended before the job started; see the log there"
        )
    return server


def _start_store(nodes: Nodes) -> dist.TCPStore:
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
        time.sleep(0.5)


def _read_reports(store: dist.Store, ranks: Iterable[int]) -> dict[int, Report]:
    return {each: json.loads(store.get(f"report/{each}")) for each in ranks}


def _publish_roster(store: dist.Store, reports: dict[int, Report], outcome: dict[str, str]) -> list[int]:
    """Publish the roster with the outcome; return the nodes that have not acknowledged it in time."""
    store.set("roster", json.dumps({"tokens": {rank: report["token"] for rank, report in reports.items()}} | outcome))
    store.set("acknowledged/0", "")
    ranks = list(reports)
    keys = [f"acknowledged/{each}" for each in ranks]
    missing = _wait_for_keys(store, keys, time.monotonic() + _ANSWER_SECONDS)
    return [ranks[each] for each in missing]


def _join(nodes: Nodes, job: str, report: Report) -> dist.TCPStore:
    """Try to register at node 0 until this attempt's node 0 has admitted this node."""
    deadline = time.monotonic() + nodes.wait
    reason = ""
    while time.monotonic() < deadline:
        reason = _why_unreachable(nodes)
        if not reason:
            try:
                found = _register(nodes, job, report, deadline)
            except (OSError, RuntimeError):  # node 0 has ended, and may be started again
                found = _OTHER_JOB
            if not isinstance(found, str):
                return found
            reason = found.format(endpoint=nodes.endpoint, rank=nodes.rank)
        time.sleep(0.5)
    raise _gave_up(nodes, reason)


def _gave_up(nodes: Nodes, reason: str) -> RanksLost:
    return RanksLost(f"node {nodes.rank} on {socket.gethostname()} gave up after {nodes.wait:g} s (--wait): {reason}")


def _why_unreachable(nodes: Nodes) -> str:
    """Return in one line why no connection to node 0 can be made; "" if one can."""
    try:
        socket.create_connection((nodes.master, nodes.port), timeout=3).close()
    except socket.gaierror:
        return f"the host name {nodes.master} cannot be resolved; --master-addr must be that of node 0"
    except ConnectionRefusedError:
        return (
            f"nothing listens on {nodes.endpoint}; check that --master-addr is that of node 0 and that node 0 has "
            "been started"
        )
    except OSError as error:
        return (
            f"{nodes.endpoint} cannot be reached ({error.strerror or 'no response'}); check that it is node 0 and that "
            "the port is open between the nodes"
        )
    return ""


def _register(nodes: Nodes, job: str, report: Report, deadline: float) -> dist.TCPStore | str:
    """Send the report to node 0; return the store if node 0 admits this node, otherwise the reason why not."""
    timeout = timedelta(seconds=max(1.0, min(_ANSWER_SECONDS, deadline - time.monotonic())))
    server = dist.TCPStore(nodes.master, nodes.port, None, False, timeout)
    store = dist.PrefixStore(job, server)
    store.set(f"report/{nodes.rank}", json.dumps(report))
    if _wait_for_keys(store, ["report/0"], deadline):
        return _OTHER_JOB
    # Node 0 has started. It may wait for other nodes a little longer than this node, and then looks for marker files.
    if _wait_for_keys(store, ["roster"], deadline + 2 * _ANSWER_SECONDS):
        return "node 0 at {endpoint} waits longer for other nodes than this node does; use the same --wait on all nodes"
    roster = json.loads(store.get("roster"))
    if roster["tokens"].get(str(nodes.rank)) != report["token"]:
        return _STARTED_WITHOUT_THIS_NODE
    store.set(f"acknowledged/{nodes.rank}", "")
    if "ranks_lost" in roster:
        raise RanksLost(roster["ranks_lost"])
    if "user_error" in roster:
        raise UserError(roster["user_error"])
    server.set_timeout(_STORE_TIMEOUT)
    return server


def _wait_for_keys(store: dist.Store, keys: Sequence[str], deadline: float) -> list[int]:
    """Wait until the store has all keys; return the positions of those that it does not have by the deadline."""
    missing = list(range(len(keys)))
    while True:
        missing = [each for each in missing if not store.check([keys[each]])]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(_POLL_SECONDS)


def _listed(ranks: Sequence[int]) -> str:
    numbers = ", ".join(map(str, ranks))
    return f"node {numbers}" if len(ranks) == 1 else f"nodes {numbers}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class FixedRendezvous(RendezvousHandler):
    """A handler that gives torch elastic the result of ``rendezvous``: a fixed set of nodes, which nobody joins later.

    Args:
        nodes: the nodes of the job.
        job: the id of the job.
        store: the store that node 0 keeps; the ranks use it, too.
    """

    BACKEND: ClassVar = "mlet"

    def __init__(self, nodes: Nodes, job: str, store: dist.TCPStore) -> None:
        self._nodes, self._job, self._store = nodes, job, store

    def register(self) -> None:
        """Make torch elastic use this handler for ``BACKEND``."""
        rendezvous_handler_registry.register(self.BACKEND, lambda parameters: self)

    def get_backend(self) -> str:
        """Return the name of the backend."""
        return self.BACKEND

    @property
    def use_agent_store(self) -> bool:
        """True: the ranks use the store of the nodes."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store, and the rank of this node."""
        master = "localhost" if self._nodes.rank == 0 else self._nodes.master
        address = RendezvousStoreInfo(master, self._nodes.port)
        store = dist.PrefixStore(f"{self._job}/elastic", self._store)
        return RendezvousInfo(store, self._nodes.rank, self._nodes.count, address)

    def is_closed(self) -> bool:
        """Return False: torch elastic calls this before it restarts ranks, which it does not do here."""
        return False

    def set_closed(self) -> None:
        """Do nothing."""

    def num_nodes_waiting(self) -> int:
        """Return 0: a node that is late is not admitted."""
        return 0

    def get_run_id(self) -> str:
        """Return the id of the job."""
        return self._job

    def shutdown(self) -> bool:
        """Do nothing: the store ends with the process that keeps it."""
        return True
