"""Rendezvous: the nodes of a job find one another at node 0 and start together, or all end with the reason."""

import json
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

from torch import distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from mlet_dist.cluster.nodes import Nodes
from mlet_dist.errors import RanksLost, UserError

_POLL_SECONDS = 0.05
_PORT_SECONDS = 10.0  # in which an earlier job may give up the port
_ANSWER_SECONDS = 10.0
_STORE_TIMEOUT = timedelta(minutes=5)
_STRANGER = (
    "what answers at {endpoint} is not node 0 of this job: another job has the port, or was node 0 given another "
    "command? It must be the same on all nodes, but for --node-rank"
)
_BEGUN = (
    "node 0 has begun without this node: has another one --node-rank {rank}, too, or has it not noticed yet that its "
    "last attempt is over?"
)

Facts = dict[str, Any]


def meet(nodes: Nodes, job: str, facts: Facts, judge: Callable[[Sequence[Facts]], str]) -> dist.TCPStore:
    """Wait for all nodes; return the store that node 0 keeps for them, in which no earlier attempt has written.

    Args:
        job: the name that all its nodes give it.
        facts: of this node, for JSON.
        judge: called on node 0 with the facts of all nodes, in order; says what is wrong, or nothing.

    Raises:
        UserError: the port is taken, or ``judge`` found something; on every node.
        RanksLost: node 0 cannot be reached, or a node did not come in time.
    """
    facts = facts | {"word": uuid.uuid4().hex}
    return _receive(nodes, job, facts, judge) if nodes.rank == 0 else _join(nodes, job, facts)


def wait_for_first(nodes: Nodes) -> None:
    """Wait until node 0 listens.

    Raises:
        RanksLost: it cannot be reached.
    """
    deadline = time.monotonic() + nodes.wait
    while reason := _unreachable(nodes):
        if time.monotonic() > deadline:
            raise _gave_up(nodes, reason)
        time.sleep(0.5)


def _receive(nodes: Nodes, job: str, facts: Facts, judge: Callable[[Sequence[Facts]], str]) -> dist.TCPStore:
    deadline = time.monotonic() + nodes.wait
    server = _listen(nodes)
    store, everyone = dist.PrefixStore(job, server), range(nodes.count)
    store.set("facts/0", json.dumps(facts))
    missing = _wait_for(store, [f"facts/{each}" for each in everyone], deadline)
    if missing:
        lost = f"{_list(missing)} of {nodes.count} did not come to {nodes.endpoint} within {nodes.wait:g} s (--wait)"
        lost += ": do all run the same command, and can they reach this host?"
        _answer(store, _told(store, [each for each in everyone if each not in missing]), {"lost": lost})
        raise RanksLost(lost)
    told = _told(store, everyone)
    wrong = judge(list(told.values()))
    silent = _answer(store, told, {"wrong": wrong} if wrong else {})
    if wrong:
        raise UserError(wrong)
    if silent:
        raise RanksLost(f"{_list(silent)} came to {nodes.endpoint} and left again; see what they say")
    return server


def _listen(nodes: Nodes) -> dist.TCPStore:
    deadline = time.monotonic() + min(_PORT_SECONDS, nodes.wait)
    while True:
        try:
            return dist.TCPStore("localhost", nodes.port, None, True, _STORE_TIMEOUT, wait_for_workers=False)
        except (OSError, RuntimeError) as error:
            if "in use" not in str(error) or time.monotonic() > deadline:
                taken = "is taken: by another job, or what is left of one?"
                said = taken if "in use" in str(error) else f"cannot be listened on ({_first_line(error)})."
                raise UserError(
                    f"port {nodes.port} of {socket.gethostname()} {said} "
                    "Give this one another --master-port, the same on all nodes"
                ) from None
        time.sleep(0.5)


def _told(store: dist.Store, by: Iterable[int]) -> dict[int, Facts]:
    return {each: json.loads(store.get(f"facts/{each}")) for each in by}


def _answer(store: dist.Store, told: dict[int, Facts], verdict: dict[str, str]) -> list[int]:
    """Publish the roster, and wait until those in it have read it; which have not."""
    store.set("roster", json.dumps({"words": {each: facts["word"] for each, facts in told.items()}} | verdict))
    store.set("read/0", "")
    nodes = list(told)
    missing = _wait_for(store, [f"read/{each}" for each in nodes], time.monotonic() + _ANSWER_SECONDS)
    return [nodes[each] for each in missing]


def _join(nodes: Nodes, job: str, facts: Facts) -> dist.TCPStore:
    deadline = time.monotonic() + nodes.wait
    reason = ""
    while time.monotonic() < deadline:
        reason = _unreachable(nodes)
        if not reason:
            try:
                found = _read_roster(nodes, job, facts, deadline)
            except (OSError, RuntimeError):  # node 0 has gone, and may come back
                found = _STRANGER
            if not isinstance(found, str):
                return found
            reason = found.format(endpoint=nodes.endpoint, rank=nodes.rank)
        time.sleep(0.5)
    raise _gave_up(nodes, reason)


def _gave_up(nodes: Nodes, reason: str) -> RanksLost:
    return RanksLost(f"node {nodes.rank} on {socket.gethostname()} has tried for {nodes.wait:g} s (--wait): {reason}")


def _unreachable(nodes: Nodes) -> str:
    """Why no connection can be made, in one line; nothing where one can."""
    try:
        socket.create_connection((nodes.master, nodes.port), timeout=3).close()
    except socket.gaierror:
        return f"{nodes.master} is no host name that is known here; --master-addr must be that of node 0"
    except ConnectionRefusedError:
        return f"nothing listens on {nodes.endpoint}: is --master-addr that of node 0, and has node 0 started?"
    except OSError as error:
        why = error.strerror or "no answer"
        return f"{nodes.endpoint} cannot be reached ({why}): is it node 0, and the port open between the nodes?"
    return ""


def _read_roster(nodes: Nodes, job: str, facts: Facts, deadline: float) -> dist.TCPStore | str:
    """The store, once node 0 has taken this node; why not, where the roster is not for it."""
    patience = timedelta(seconds=max(1.0, min(_ANSWER_SECONDS, deadline - time.monotonic())))
    server = dist.TCPStore(nodes.master, nodes.port, None, False, patience)
    store = dist.PrefixStore(job, server)
    store.set(f"facts/{nodes.rank}", json.dumps(facts))
    if _wait_for(store, ["facts/0"], deadline):
        return _STRANGER
    # Node 0 is there. It may give up waiting for others a little later than this node would, or look for storage.
    if _wait_for(store, ["roster"], deadline + 2 * _ANSWER_SECONDS):
        return "node 0 is at {endpoint}, and waits longer than this node for others; give all the same --wait"
    roster = json.loads(store.get("roster"))
    if roster["words"].get(str(nodes.rank)) != facts["word"]:
        return _BEGUN
    store.set(f"read/{nodes.rank}", "")
    if "lost" in roster:
        raise RanksLost(roster["lost"])
    if "wrong" in roster:
        raise UserError(roster["wrong"])
    server.set_timeout(_STORE_TIMEOUT)
    return server


def _wait_for(store: dist.Store, keys: Sequence[str], deadline: float) -> list[int]:
    """Wait until all keys are there; the positions of those that are not."""
    missing = list(range(len(keys)))
    while True:
        missing = [each for each in missing if not store.check([keys[each]])]
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(_POLL_SECONDS)


def _list(nodes: Sequence[int]) -> str:
    numbers = ", ".join(map(str, nodes))
    return f"node {numbers}" if len(nodes) == 1 else f"nodes {numbers}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


BACKEND = "mlet"


class MetNodes(RendezvousHandler):
    """Hands out the store in which the nodes have met; nothing is waited for, and nobody joins later.

    Args:
        store: kept by node 0; the ranks use it, too.
    """

    def __init__(self, nodes: Nodes, job: str, store: dist.TCPStore) -> None:
        self._nodes, self._job, self._store = nodes, job, store

    def register(self) -> None:
        """Have torch elastic take this for ``BACKEND``."""
        rendezvous_handler_registry.register(BACKEND, lambda parameters: self)

    def get_backend(self) -> str:
        """Its name."""
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        """That ranks find their store where the nodes have theirs."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """The store, and this node's number."""
        master = "localhost" if self._nodes.rank == 0 else self._nodes.master
        where = RendezvousStoreInfo(master, self._nodes.port)
        store = dist.PrefixStore(f"{self._job}/elastic", self._store)
        return RendezvousInfo(store, self._nodes.rank, self._nodes.count, where)

    def is_closed(self) -> bool:
        """Never: torch elastic asks before it restarts ranks, which it does not do here."""
        return False

    def set_closed(self) -> None:
        """Nothing to do."""

    def num_nodes_waiting(self) -> int:
        """None: whoever comes late is not taken."""
        return 0

    def get_run_id(self) -> str:
        """The job's name."""
        return self._job

    def shutdown(self) -> bool:
        """Nothing to do: the store ends with its node."""
        return True
