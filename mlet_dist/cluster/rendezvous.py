"""For torch elastic: the rendezvous of nodes that have met already."""

from torch import distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, rendezvous_handler_registry
from torch.distributed.elastic.rendezvous.api import RendezvousStoreInfo

from mlet_dist.cluster.nodes import Nodes

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
