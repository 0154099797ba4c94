"""The ranks find one another, and later which of them are still there."""

import json
import socket
import time
import uuid
from datetime import timedelta

from torch import distributed as dist

_PATIENCE_SECONDS = 10.0
_ENDED = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited")


def fresh_store(store: dist.Store, rank: int, world_size: int, patience: timedelta) -> dist.Store:
    """A part of ``store`` that no earlier attempt of the same job has written to; ``patience`` is for all to come.

    torch elastic keeps its store when it restarts the ranks, and with it the addresses of ranks that have gone. The
    restart's number does not help: an agent that joins later counts from 0. So every rank says a word of its own, and
    the first rank lists the words it finds, anew until each rank has found its own in the list.

    Raises:
        RuntimeError: a rank did not come.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + patience.total_seconds()
    store.set(f"word/{rank}", word)
    if rank != 0:
        while True:
            roster = json.loads(store.get("roster"))
            if roster["words"].get(str(rank)) == word:
                break
            _wait(deadline)
        found = dist.PrefixStore(roster["attempt"], store)
        found.set(f"here/{rank}", "")
        return found
    found = dist.PrefixStore(word, store)
    others = range(1, world_size)
    while True:
        words = {str(each): store.get(f"word/{each}").decode() for each in others if store.check([f"word/{each}"])}
        store.set("roster", json.dumps({"attempt": word, "words": words}))
        if all(found.check([f"here/{each}"]) for each in others):
            return found
        _wait(deadline)


class RollCall:
    """The ranks' hosts.

    Args:
        store: of all ranks, in which nothing of an earlier attempt is.
        rank, world_size: of this process, and of all.
        patience: for all ranks to come.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, patience: timedelta = timedelta(0)) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        store.set(f"host/{rank}", socket.gethostname())
        store.wait([f"host/{each}" for each in range(world_size)], patience)

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
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("timed out" in said or "timeout" in said)


def connection_lost(error: BaseException) -> bool:
    """Whether this is how gloo or nccl says that a rank has ended while others waited for it."""
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(each in said for each in _ENDED)


def _wait(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise RuntimeError("not all ranks have started")
    time.sleep(0.05)
