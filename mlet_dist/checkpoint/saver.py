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

from torch import distributed as dist

from mlet_dist.checkpoint.manifest import ManifestError
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.checkpoint.writer import on_first, staged, write_checkpoint


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
