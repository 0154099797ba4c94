"""Local ranks for tests, over gloo or NCCL, which are started once and run any number of functions."""

import logging
import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from tests.helpers.fork_server import fork_server

_TIMEOUT_SECONDS = 120
_DEVICE = "MLET_TEST_DEVICE"


class RankFailed(Exception):
    """A function raised an exception in a rank; the message contains the traceback of every rank."""


class RankPool:
    """A process group of ``world_size`` processes, on simulated nodes of ``local_world_size`` ranks.

    ``device`` is cpu (gloo) or cuda (NCCL, a GPU for each rank); a function may take ``timeout_s``.
    """

    def __init__(
        self,
        world_size: int,
        local_world_size: int | None = None,
        device: str = "cpu",
        timeout_s: float = _TIMEOUT_SECONDS,
    ) -> None:
        self.world_size, self.local_world_size = world_size, local_world_size or world_size
        self.device, self._timeout_s = device, timeout_s
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
            ready = wait(list(waiting), timeout=5 if failures else self._timeout_s)
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
        # A process in which CUDA may have been initialized cannot be forked.
        context: Any = fork_server() if self.device == "cpu" else multiprocessing.get_context("spawn")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        for rank in range(self.world_size):
            pipe, pipe_of_rank = context.Pipe()
            of_rank = (pipe_of_rank, rank, self.world_size, self.local_world_size, port, self.device)
            process = context.Process(target=_serve, args=of_rank, daemon=True)
            process.start()
            pipe_of_rank.close()
            self._workers.append((process, pipe))


def _serve(pipe: Connection, rank: int, world_size: int, local_world_size: int, port: int, device: str) -> None:
    os.environ.update(
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank % local_world_size),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(local_world_size),
        OMP_NUM_THREADS="1",
    )
    os.environ[_DEVICE] = device
    logging.getLogger("torchrec").setLevel(logging.ERROR)  # it logs of every plan
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchrec")
    if device == "cuda":
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # for tests of deterministic algorithms
    import torch
    from torch import distributed as dist

    if device == "cuda":
        torch.cuda.set_device(rank_device())
    dist.init_process_group(rank_backend())
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*args)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


def rank_device() -> Any:
    """Return the device of this rank; the CPU in a process that is none."""
    import torch

    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if rank_backend() == "nccl" else torch.device("cpu")


def rank_backend() -> str:
    """Return the backend of this rank's process group."""
    return "nccl" if os.environ.get(_DEVICE) == "cuda" else "gloo"


def full_tensor(tensor: Any) -> Any:
    """Return a copy of a tensor on the CPU, the same on every rank; a ShardedTensor is gathered. A collective call."""
    import torch
    from torch import distributed as dist
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    if not isinstance(tensor, ShardedTensor):
        return tensor.detach().clone().cpu()
    found = torch.zeros(tensor.size(), device=rank_device())
    for shard in tensor.local_shards():
        starts, sizes = shard.metadata.shard_offsets, shard.metadata.shard_sizes
        found[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))] = shard.tensor
    dist.all_reduce(found)
    return found.cpu()
