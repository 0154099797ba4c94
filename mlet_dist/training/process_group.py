"""The process group: ranks join it, and later find out which of them no longer take part."""

import json
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist

from mlet_dist.errors import ConnectionLost, RanksLost, UserError

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


_TIMEOUT, _START = timedelta(minutes=10), timedelta(minutes=30)


@dataclass(frozen=True)
class Worker:
    """One rank of the job: its number, how many there are, its device, and how long it waits for the others."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    timeout: timedelta = _TIMEOUT

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks and writes for all."""
        return self.rank == 0


@contextmanager
def join_ranks(device: str = "auto", timeout: timedelta = _TIMEOUT, start: timedelta = _START) -> Iterator[Worker]:
    """Join the process group that torchrun's environment describes, or a group of one without it.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; cuda takes nccl, cpu takes gloo.
        timeout: in which every rank must take part in a collective.
        start: in which all ranks must come.

    Raises:
        UserError: cuda is asked for where there is none.
        RanksLost: not all ranks came.
        RanksLost: within the block, a gloo collective timed out; it names the ranks that did not take part.
        ConnectionLost: within the block, another rank ended.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "train.device is cuda, but torch finds no CUDA device here; use cpu or auto (try `mlet doctor`)"
        )
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    target = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(target)
    backend = "nccl" if on_cuda else "gloo"
    if "RANK" in os.environ:
        # Ranks may start minutes apart, and `timeout` is for what comes after.
        try:
            store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=start)))
            store = fresh_store(dist.PrefixStore("mlet", store), rank, world_size, start)
            roll = RollCall(store, rank, world_size, start)
        except (RuntimeError, ValueError) as error:
            raise RanksLost(
                f"rank {os.environ['RANK']} on {socket.gethostname()}: not all {os.environ['WORLD_SIZE']} ranks came "
                f"to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {start.total_seconds():g} s"
            ) from error
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        rank, roll = 0, RollCall(dist.HashStore(), 0, 1)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        yield Worker(dist.get_rank(), dist.get_world_size(), local_world_size, target, timeout)
    except BaseException as error:
        missing = roll.missing() if timed_out(error) else []
        if backend == "gloo":  # nccl would wait here for ranks that are stuck in a collective
            dist.destroy_process_group()
        if missing:
            raise RanksLost(
                f"{' and '.join(missing)} took no part in a collective for {timeout.total_seconds():g} s "
                "(train.collective_timeout_s): stuck or dead; the others stop"
            ) from error
        if connection_lost(error):
            raise ConnectionLost(f"{socket.gethostname()}: another rank has ended; its own error says why") from error
        raise
    dist.destroy_process_group()
