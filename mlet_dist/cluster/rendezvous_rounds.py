"""The rendezvous rounds in which the nodes of an elastic job agree on who runs its ranks, as one node knows them."""

import uuid

from torch import distributed as dist


class RendezvousRounds:
    """The rendezvous rounds of this node, one after the other, each with a name that all nodes in it know.

    Attributes:
        current: the name of the round whose ranks run on this node or are about to; "" while the nodes meet.
        left: the names of rounds that this node has left, of which the others have not been told.
    """

    def __init__(self) -> None:
        self.current = ""
        self.left: list[str] = []

    def leave(self) -> None:
        """Leave the round, if there is one: its ranks have ended on this node."""
        left, self.current = self.current, ""
        if left:
            self.left.append(left)

    def enter(self, store: dist.Store) -> None:
        """Enter the round of the nodes that share a store of their own; the first of them names it."""
        self.current = store.compare_set("mlet/round", "", uuid.uuid4().hex).decode()
