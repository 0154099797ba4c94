"""Joins the ranks of a job in a process group, and turns lost ranks into errors (``lost_ranks.py``)."""

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
from mlet_dist.training.attempts import name_of_attempt
from mlet_dist.training.lost_ranks import RankRegistry, connection_lost, timed_out

COLLECTIVE_TIMEOUT, _START_TIMEOUT = timedelta(minutes=10), timedelta(minutes=30)
_POLL_SECONDS = 0.05


def attempt_store(store: dist.Store, rank: int, world_size: int, timeout: timedelta) -> dist.Store:
    """Return a part of ``store`` that no earlier attempt of the same job has written to.

    torch elastic keeps its store when it restarts the ranks, and with it the addresses of ranks that have ended. The
    restart count does not tell attempts apart, since an agent that joins later counts from 0. So every rank posts a
    random token, and rank 0 answers each token with the name of the attempt. Tokens of an earlier attempt may be among
    them, so rank 0 goes on until every rank has joined. A rank reads and writes a few short values, and waits without
    polling; rank 0 reads each post once.

    Args:
        store: the store of all attempts.
        rank, world_size: this process, and the number of all.
        timeout: for all ranks to join.

    Raises:
        RuntimeError: a rank did not join in time.
    """
    token, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank != 0:
        store.set(f"post/{store.add('posts', 1)}", token)
        store.wait([f"attempt/{token}"], timeout)
        attempt = dist.PrefixStore(store.get(f"attempt/{token}").decode(), store)
        if attempt.add(f"joined/{rank}", 1) == 1:
            attempt.add("joined", 1)
        return attempt
    attempt = dist.PrefixStore(token, store)
    posts, unread = 0, []
    while attempt.add("joined", 0) < world_size - 1:
        if time.monotonic() > deadline:
            raise RuntimeError("not all ranks have started")
        known, posts = posts, store.add("posts", 0)
        unread += [f"post/{each}" for each in range(known + 1, posts + 1)]
        for post in [each for each in unread if store.check([each])]:  # a rank may have ended before it wrote its post
            unread.remove(post)
            store.set(f"attempt/{store.get(post).decode()}", token)
        time.sleep(_POLL_SECONDS)
    return attempt


@dataclass(frozen=True)
class Worker:
    """One rank of a job: its number, the world size, its device, and the timeout of its collectives."""

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    timeout: timedelta = COLLECTIVE_TIMEOUT

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which logs and writes for all ranks."""
        return self.rank == 0


@contextmanager
def join_ranks(
    device: str = "auto", timeout: timedelta = COLLECTIVE_TIMEOUT, start: timedelta = _START_TIMEOUT
) -> Iterator[Worker]:
    """Join the process group that torchrun's environment describes, or a group of one without it.

    Args:
        device: ``auto``, ``cpu`` or ``cuda``; the backend is nccl on cuda and gloo on cpu.
        timeout: the time in which every rank must take part in a collective.
        start: the time in which all ranks must join.

    Raises:
        UserError: ``device`` is cuda and there is no CUDA device.
        RanksLost: not all ranks joined; or, within the block, a gloo collective timed out; the message names the ranks
            that did not take part.
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
        # Ranks may start minutes apart; `timeout` applies to collectives only.
        try:
            store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=start)))
            store = attempt_store(dist.PrefixStore(f"mlet/{name_of_attempt()}", store), rank, world_size, start)
            registry = RankRegistry(store, rank, world_size, start)
        except (RuntimeError, ValueError) as error:
            raise RanksLost(
                f"rank {os.environ['RANK']} on {socket.gethostname()}: not all {os.environ['WORLD_SIZE']} ranks "
                f"connected to {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within "
                f"{start.total_seconds():g} s"
            ) from error
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    else:
        rank, registry = 0, RankRegistry(dist.HashStore(), 0, 1)
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        if backend == "gloo":
            dist.barrier()  # if a rank ends while others still connect to it, gloo prints lines of its own
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        yield Worker(dist.get_rank(), dist.get_world_size(), local_world_size, target, timeout)
    except BaseException as error:
        missing = registry.missing() if timed_out(error) else []
        if backend == "gloo":  # nccl would wait here for ranks that hang in a collective
            dist.destroy_process_group()
        if missing:
            raise RanksLost(
                f"{' and '.join(missing)} took no part in a collective for {timeout.total_seconds():g} s "
                "(train.collective_timeout_s): it hangs or has ended; the other ranks stop"
            ) from error
        if connection_lost(error):
            raise ConnectionLost(
                f"{socket.gethostname()}: another rank has ended; see that rank's error for the reason"
            ) from error
        raise
    dist.destroy_process_group()
