"""Saving behind training: a copy is taken at once, a thread writes it, and checkpoints beyond the retention go."""

import os
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor

from mlet_dist.checkpoint.manifest import ManifestError
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.checkpoint.writer import on_first, write_checkpoint


def staged(state: Any) -> Any:
    """The same nested dicts, of tensors copied to memory of their own on the CPU; the copy is done on return."""
    if isinstance(state, dict):
        return {key: staged(value) for key, value in state.items()}
    if isinstance(state, ShardedTensor):
        shards = state.local_shards()
        if any(shard.tensor.device.type != "cpu" for shard in shards):
            return state.cpu()
        copies = [Shard(shard.tensor.detach().clone(), shard.metadata) for shard in shards]
        return ShardedTensor._init_from_local_shards_and_global_metadata(
            copies, state.metadata(), process_group=state._process_group
        )
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    return state


def staged_bytes(state: Any, rank: int) -> int:
    """Bytes that this rank adds to a checkpoint: of what all ranks hold, the first writes the only copy."""
    if isinstance(state, dict):
        return sum(staged_bytes(value, rank) for value in state.values())
    if isinstance(state, ShardedTensor):
        return sum(_written(shard.tensor) for shard in state.local_shards())
    if isinstance(state, torch.Tensor):
        return _written(state) if rank == 0 else 0
    return 0


_BYTES_OF_A_RECORD = 2048  # what torch.save puts around a tensor, at most


def _written(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size() + _BYTES_OF_A_RECORD


def drop_old(store: CheckpointStore, keep_last: int, keep_every: int | None) -> None:
    """Remove whole checkpoints but the last ``keep_last`` and those whose step is a multiple of ``keep_every``.

    Those that are not whole are left alone: one may be being written.
    """
    whole = []
    for checkpoint in store.checkpoints():
        try:
            checkpoint.manifest()
        except ManifestError:
            continue
        whole.append(checkpoint)
    for checkpoint in whole[:-keep_last]:
        if keep_every is None or checkpoint.step % keep_every:
            checkpoint.remove()


_PATIENCE_SECONDS = 30.0
_NICENESS = 10


class CheckpointSaver:
    """Writes checkpoints of all ranks, one at a time.

    The thread that writes is each rank's own, and the threads talk over a process group of their own: they never share
    one with training. As a context manager it lets a save that is under way come to its end.

    Args:
        store: where to.
        timeout: in which a rank's thread must answer the others.
        keep_last, keep_every: as ``drop_old``.
    """

    def __init__(self, store: CheckpointStore, timeout: timedelta, keep_last: int, keep_every: int | None) -> None:
        self._store, self._keep_last, self._keep_every = store, keep_last, keep_every
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.saved: Checkpoint | None = None

    def save(self, step: int, state: dict[str, Any], about: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint; ``state`` may change as soon as this returns. A collective call.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        copy = staged(state)
        checkpoint = self._store.checkpoint(step)
        self._thread = threading.Thread(target=self._run, args=(checkpoint, copy, about), daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether ``wait`` would raise, at once."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is whole on all ranks.

        Raises:
            UserError: it could not be written.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, checkpoint: Checkpoint, state: dict[str, Any], about: Mapping[str, Any]) -> None:
        if sys.platform == "linux":  # there a thread has a priority of its own; training comes first
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            write_checkpoint(checkpoint, state, about, self._group)
            self.saved = checkpoint
            drop = partial(drop_old, self._store, self._keep_last, self._keep_every)
            on_first(drop, f"{self._store}: older checkpoints cannot be removed", self._group)
        except BaseException as error:
            self._error = error

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join(None if error is None else _PATIENCE_SECONDS)
