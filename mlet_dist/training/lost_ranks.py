"""Finds out which ranks are lost when a collective fails: hosts by rank, timeouts and broken connections."""

import socket
import time
from datetime import timedelta

from torch import distributed as dist

_NOTICE_SECONDS = 10.0
_PEER_GONE = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited")


class RankRegistry:
    """The hosts of all ranks, and which of them have noticed that a collective timed out.

    Args:
        store: a store of all ranks, without entries of an earlier attempt.
        rank, world_size: this process, and the number of all.
        timeout: for all ranks to register.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout: timedelta = timedelta(0)) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        store.set(f"host/{rank}", socket.gethostname())
        store.wait([f"host/{each}" for each in range(world_size)], timeout)

    def missing(self) -> list[str]:
        """Return ranks with hosts that do not notice within 10 s that a collective timed out; [] if unknown."""
        others = set(range(self._world_size)) - {self._rank}
        deadline = time.monotonic() + _NOTICE_SECONDS
        try:
            self._store.set(f"noticed/{self._rank}", "")
            while others and time.monotonic() < deadline:
                time.sleep(0.1)
                others = {each for each in others if not self._store.check([f"noticed/{each}"])}
            return [f"rank {each} on {self._store.get(f'host/{each}').decode()}" for each in sorted(others)]
        except RuntimeError:  # the store ended with the process that served it
            return []


def timed_out(error: BaseException) -> bool:
    """Return whether this is gloo's error for a rank that took no part in a collective."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("timed out" in text or "timeout" in text)


def connection_lost(error: BaseException) -> bool:
    """Return whether this is gloo's or nccl's error for a rank that ended while others waited for it."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(each in text for each in _PEER_GONE)
