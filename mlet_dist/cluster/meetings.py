"""The meetings in which the nodes of an elastic job agree on who runs its ranks, as one node knows them."""

import uuid

from torch import distributed as dist


class Meetings:
    """The meetings of this node, one after the other, each with a name that all nodes know that take part in it.

    Attributes:
        current: the name of the meeting whose ranks run on this node or are about to; "" while the nodes meet.
        left: the names of meetings that this node has left, of which the others have not been told.
    """

    def __init__(self) -> None:
        self.current = ""
        self.left: list[str] = []

    def leave(self) -> None:
        """Leave the meeting, if there is one: its ranks have ended on this node."""
        left, self.current = self.current, ""
        if left:
            self.left.append(left)

    def enter(self, store: dist.Store) -> None:
        """Enter the meeting of the nodes that share a store of their own; the first of them names it."""
        self.current = store.compare_set("mlet/meeting", "", uuid.uuid4().hex).decode()
