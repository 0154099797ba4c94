"""Which ranks are still there when a collective has timed out."""

import socket
import time
from datetime import timedelta

from torch import distributed as dist

_START = timedelta(minutes=30)
_PATIENCE_SECONDS = 10.0


class RollCall:
    """The ranks' hosts, in a store; waits until every rank has said its own.

    Args:
        store: of all ranks.
        rank, world_size: of this process, and of all.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        store.set(f"host/{rank}", socket.gethostname())
        store.wait([f"host/{each}" for each in range(world_size)], _START)

    def missing(self) -> list[str]:
        """The ranks, with hosts, that do not notice soon that a collective has timed out; none if nobody can tell."""
        others = set(range(self._world_size)) - {self._rank}
        deadline = time.monotonic() + _PATIENCE_SECONDS
        try:
            self._store.set(f"noticed/{self._rank}", "")
            while others and time.monotonic() < deadline:
                time.sleep(0.1)
                others = {each for each in others if not self._store.check([f"noticed/{each}"])}
            return [f"rank {each} on {self._store.get(f'host/{each}').decode()}" for each in sorted(others)]
        except RuntimeError:  # the store has gone with the rank that held it
            return []


def timed_out(error: BaseException) -> bool:
    """Whether this is how gloo says that a rank took no part in a collective."""
    return isinstance(error, RuntimeError) and "timed out" in str(error).lower()
