"""Gives torch elastic its nodes: a fixed set that has met already (``rendezvous.py``), or those that c10d finds."""

import sys
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

from torch import distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from mlet_dist.cluster.nodes import Nodes
from mlet_dist.cluster.rendezvous_rounds import RendezvousRounds

_DEAD = timedelta(seconds=15)
"""How long a node may show c10d no sign of life, by the clocks of the nodes."""


class _LocalStore(dist.HashStore):
    """The store of torch elastic's agent, which uses it for a barrier at the end: the launchers have their own there.

    A call that waits for another node would wait in C++, where a signal is not answered.
    """

    def wait(self, *arguments: Any) -> None:
        """Return at once."""


class FixedRendezvous(RendezvousHandler):
    """A handler that gives torch elastic a fixed set of nodes, which nobody joins later.

    Args:
        nodes: the nodes of the job; node 0 keeps a store at their port, which the ranks use.
        job: the id of the job.

    Attributes:
        backend: the name under which it is registered.
    """

    def __init__(self, nodes: Nodes, job: str) -> None:
        self._nodes, self._job = nodes, job
        self.backend = f"mlet-{uuid.uuid4().hex}"  # torch elastic registers a name once
        rendezvous_handler_registry.register(self.backend, lambda parameters: self)

    def get_backend(self) -> str:
        """Return the name of the backend."""
        return self.backend

    @property
    def use_agent_store(self) -> bool:
        """True: the ranks use the store that node 0 keeps."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the rank of this node and the address of the store."""
        master = "localhost" if self._nodes.rank == 0 else self._nodes.master
        address = RendezvousStoreInfo(master, self._nodes.port)
        return RendezvousInfo(_LocalStore(), self._nodes.rank, self._nodes.count, address)

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


class OpenRendezvous(RendezvousHandler):
    """c10d's rendezvous, which stays open when a node leaves it because others were lost.

    torch elastic closes it for all nodes when one of them ends with an error. A node that was cut off for a while would
    keep all others from joining.

    A node that has shown no sign of life for 15 s is dead for c10d as long as its ranks run. If that is true of all of
    them, because they were suspended together, a node that joins begins a round without them, of which c10d does not
    tell them.

    Args:
        rounds: of this node; the rendezvous enters and leaves them.

    Attributes:
        backend: the name under which it is registered.
    """

    def __init__(self, rounds: RendezvousRounds) -> None:
        self._rounds = rounds
        self.backend = f"mlet-{uuid.uuid4().hex}"  # torch elastic registers a name once
        self._handler: DynamicRendezvousHandler
        rendezvous_handler_registry.register(self.backend, self._create)

    def _create(self, given: RendezvousParameters) -> RendezvousHandler:
        places = (given.endpoint, given.run_id, given.min_nodes, given.max_nodes, given.local_addr)
        found = get_rendezvous_handler(RendezvousParameters("c10d", *places, **given.config))
        assert isinstance(found, DynamicRendezvousHandler)
        self._handler = found
        return self

    def get_backend(self) -> str:
        """Return the name of the backend."""
        return self.backend

    @property
    def use_agent_store(self) -> bool:
        """As c10d's."""
        return self._handler.use_agent_store

    def next_rendezvous(self) -> RendezvousInfo:
        """As c10d's: wait until enough nodes have met; torch elastic has ended this node's ranks before."""
        self._rounds.leave()
        found = self._handler.next_rendezvous()
        self._rounds.enter(found.store)
        return found

    def is_closed(self) -> bool:
        """As c10d's."""
        return self._handler.is_closed()

    def set_closed(self) -> None:
        """As c10d's."""
        self._handler.set_closed()

    def num_nodes_waiting(self) -> int:
        """Return how many nodes wait for this one to meet them; called while its ranks run."""
        waiting = self._handler.num_nodes_waiting()
        with self._handler._heartbeat_lock:  # another thread exchanges the state
            state = self._handler._state_holder.state
            if waiting or state.complete:
                return waiting
            # They meet without this node. Where its clock is so far ahead, one takes all others for dead, always.
            latest = datetime.now(UTC) + _DEAD
            return sum(state.last_heartbeats[node] < latest for node in state.participants)

    def get_run_id(self) -> str:
        """Return the id of the job."""
        return self._handler.get_run_id()

    def shutdown(self) -> bool:
        """Close the rendezvous, unless the error that is being raised says that other nodes are lost."""
        if isinstance(sys.exc_info()[1], RendezvousError | dist.DistError):
            return True
        return self._handler.shutdown()
