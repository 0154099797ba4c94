"""Local gloo ranks for tests, which are started once and run any number of functions."""

import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tests.helpers.fork_server import fork_server

_TIMEOUT_SECONDS = 120


class RankFailed(Exception):
    """A function raised an exception in a rank; the message contains the traceback of every rank."""


class RankPool:
    """A gloo process group of ``world_size`` processes, on simulated nodes of ``local_world_size`` ranks."""

    def __init__(self, world_size: int, local_world_size: int | None = None) -> None:
        self.world_size, self.local_world_size = world_size, local_world_size or world_size
        self._workers: list[tuple[BaseProcess, Connection]] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a module-level function in every rank and return the results by rank.

        A failure ends all processes, since some may hang in a collective; the next call starts new ones.
        """
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        while waiting:
            # After a rank has failed, the others may never return.
            ready = wait(list(waiting), timeout=5 if failures else _TIMEOUT_SECONDS)
            if not ready:
                failures |= {rank: "no response" for rank in waiting.values()}
                break
            for pipe in ready:
                rank = waiting.pop(pipe)  # type: ignore[call-overload]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    process = self._workers[rank][0]
                    process.join(5)
                    ok, value = False, f"the process died with exit code {process.exitcode}"
                (results if ok else failures)[rank] = value
        if failures:
            self.close()
            raise RankFailed("\n".join(f"rank {rank}: {failure}" for rank, failure in sorted(failures.items())))
        return [results[rank] for rank in range(self.world_size)]

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = fork_server()
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for rank in range(self.world_size):
            pipe, pipe_of_rank = context.Pipe()
            process = context.Process(
                target=_serve, args=(pipe_of_rank, rank, self.world_size, self.local_world_size, port), daemon=True
            )
            process.start()
            pipe_of_rank.close()
            self._workers.append((process, pipe))


def _serve(pipe: Connection, rank: int, world_size: int, local_world_size: int, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank % local_world_size),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(local_world_size),
        OMP_NUM_THREADS="1",
    )
    from torch import distributed as dist

    dist.init_process_group("gloo")
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def full_tensor(tensor: Any) -> Any:
    """Return a copy of a tensor, the same on every rank; a ShardedTensor is gathered. A collective call."""
    import torch
    from torch import distributed as dist
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    if not isinstance(tensor, ShardedTensor):
        return tensor.detach().clone()
    found = torch.zeros(tensor.size())
    for shard in tensor.local_shards():
        starts, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        found[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))] = shard.tensor
    dist.all_reduce(found)
    return found
