"""Where this process stands among the ranks, and the process group that joins them."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import distributed as dist

from mlet_dist.errors import ConnectionLost, RanksLost, UserError
from mlet_dist.training.roll_call import RollCall, connection_lost, fresh_store, timed_out

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
