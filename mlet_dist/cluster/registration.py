"""How a node reaches node 0 and is admitted to a rendezvous round of the nodes (``rendezvous.py``)."""

import json
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from mlet_dist.cluster.nodes import Nodes
from mlet_dist.errors import NodesMissing, UserError

POLL_SECONDS = 0.05
ANSWER_SECONDS = 10.0
OTHER_JOB = (
    "{endpoint} is not node 0 of this job: another job uses the port, or node 0 was given a different command; only "
    "--node-rank may differ between nodes"
)
_STARTED_WITHOUT_THIS_NODE = (
    "node 0 started without this node: another node also has --node-rank {rank}, or node 0 has not noticed yet that "
    "its previous attempt has ended"
)


Report = dict[str, Any]


class NotAdmitted(Exception):
    """Node 0 did not admit this node; the message says why. The node tries again."""


@dataclass(frozen=True)
class RendezvousRound:
    """A round of the rendezvous: all nodes of a job, which start their ranks together.

    Attributes:
        store: the store that node 0 keeps, with a prefix that no other round uses.
        prefix: this prefix.
        number: how often the nodes have met before.
        names: the name of each node.
        is_unexplained: whether no node knows why the attempt before this round failed.
        run_before: ``run_to_replace`` before the first attempt of the job.
        has_replaced: whether the ranks have replaced that run since.
        silent: the nodes that joined, but have ended since.
    """

    store: dist.Store
    prefix: str
    number: int
    names: list[str]
    is_unexplained: bool
    run_before: str | None = None
    has_replaced: bool = True
    silent: tuple[int, ...] = ()


class Registration:
    """One try of a node to be admitted by node 0.

    Attributes:
        answered: when node 0 last answered, by ``time.monotonic``.
        is_cancelled: whether to stop.
    """

    def __init__(self, nodes: Nodes, job: str, last: str, report: Report, deadline: float) -> None:
        self._nodes, self._job, self._last, self._report, self._deadline = nodes, job, last, report, deadline
        self.answered, self.is_cancelled = time.monotonic(), False

    def register(self) -> RendezvousRound:
        """Send the report to node 0, and return the round if node 0 admits this node.

        Raises:
            NotAdmitted: node 0 did not admit it.
            UserError, NodesMissing: node 0 found a problem, or a node is missing.
        """
        nodes = self._nodes
        timeout = timedelta(seconds=max(1.0, min(ANSWER_SECONDS, self._deadline - time.monotonic())))
        server = dist.TCPStore(nodes.master, nodes.port, None, False, timeout)
        common = dist.PrefixStore(self._job, server)
        if not self._has(common, "round", self._deadline):
            raise NotAdmitted(OTHER_JOB)
        prefix = f"{self._job}/{common.get('round').decode()}"
        if prefix == self._last:
            raise NotAdmitted("node 0 has not noticed yet that the last attempt has failed")
        store = dist.PrefixStore(prefix, server)
        store.set(f"report/{nodes.rank}", json.dumps(self._report))
        # Node 0 may wait for other nodes a little longer than this node, and then looks for marker files.
        if not self._has(store, "roster", self._deadline + 2 * ANSWER_SECONDS):
            raise NotAdmitted(
                "node 0 at {endpoint} waits longer for other nodes than this node does; use the same --wait on all "
                "nodes"
            )
        roster = json.loads(store.get("roster"))
        if roster["tokens"].get(str(nodes.rank)) != self._report["token"]:
            raise NotAdmitted(_STARTED_WITHOUT_THIS_NODE)
        if self.is_cancelled:
            raise NotAdmitted("")
        store.set(f"acknowledged/{nodes.rank}", "")
        if "ranks_lost" in roster:
            raise NodesMissing(roster["ranks_lost"])
        if "user_error" in roster:
            raise UserError(roster["user_error"])
        return RendezvousRound(store, prefix, **{key: value for key, value in roster.items() if key != "tokens"})

    def _has(self, store: dist.Store, key: str, deadline: float) -> bool:
        while not self.is_cancelled and time.monotonic() <= deadline:
            found = store.check([key])
            self.answered = time.monotonic()
            if found:
                return True
            time.sleep(POLL_SECONDS)
        return False


def wait_for_node_0(nodes: Nodes) -> None:
    """Wait until node 0 listens.

    Raises:
        NodesMissing: node 0 cannot be reached in time.
    """
    deadline = time.monotonic() + nodes.wait
    while reason := why_unreachable(nodes):
        if time.monotonic() > deadline:
            raise gave_up(nodes, reason)
        time.sleep(0.5)


def gave_up(nodes: Nodes, reason: str) -> NodesMissing:
    """Return the error of a node that could not join in time, with the last reason."""
    return NodesMissing(
        f"node {nodes.rank} on {socket.gethostname()} gave up after {nodes.wait:g} s (--wait): {reason}"
    )


def why_unreachable(nodes: Nodes) -> str:
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
