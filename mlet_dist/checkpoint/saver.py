"""Asynchronous saving: the state is copied to host memory, and a background thread writes it and applies retention."""

import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any

from torch import distributed as dist

from mlet_dist.checkpoint.manifest import RUN_ID
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.checkpoint.writer import copy_to_cpu, on_first_rank, write_checkpoint
from mlet_dist.errors import UserError

_JOIN_SECONDS_ON_ERROR = 30.0
_NICENESS = 10


class CheckpointSaver:
    """Writes checkpoints from all ranks, one at a time.

    Each rank has a thread that writes. The threads communicate over a process group of their own, never over that of
    training. As a context manager, the saver waits at the end for a save in progress.

    Args:
        store: where to save.
        timeout: of the collectives between the threads.
        keep_last, keep_every: as in ``apply_retention``.
        on_saved: called in the thread with the step of a checkpoint that is complete.

    Attributes:
        saved: the last checkpoint that was completed; None before the first.
        write_seconds: how long it took to write.
    """

    def __init__(
        self,
        store: CheckpointStore,
        timeout: timedelta,
        keep_last: int,
        keep_every: int | None,
        on_saved: Callable[[int], None] | None = None,
    ) -> None:
        self._on_saved = on_saved
        self._store, self._keep_last, self._keep_every = store, keep_last, keep_every
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.saved: Checkpoint | None = None
        self.write_seconds = 0.0

    def save(self, step: int, state: dict[str, Any], about: Mapping[str, Any]) -> None:
        """Start to write a checkpoint; ``state`` may change as soon as this returns. A collective call.

        Raises:
            UserError: the previous checkpoint could not be written.
        """
        self.wait()
        copy = copy_to_cpu(state)
        checkpoint = self._store.checkpoint(step)
        self._thread = threading.Thread(target=self._run, args=(checkpoint, copy, about), daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether the last save has failed, so that ``wait`` would raise. Does not block."""
        return self._error is not None

    def wait(self) -> None:
        """Wait until the last checkpoint is complete on all ranks.

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
        if sys.platform == "linux":  # threads have their own priority there; training comes first
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        started = time.monotonic()
        try:
            write_checkpoint(checkpoint, state, about, self._group)
            self.saved, self.write_seconds = checkpoint, time.monotonic() - started
            if self._on_saved is not None:
                self._on_saved(checkpoint.step)
            remove_old = partial(apply_retention, self._store, about.get(RUN_ID), self._keep_last, self._keep_every)
            on_first_rank(remove_old, f"{self._store}: older checkpoints cannot be removed", self._group)
        except BaseException as error:
            self._error = error

    def __enter__(self) -> "CheckpointSaver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join(None if error is None else _JOIN_SECONDS_ON_ERROR)


def apply_retention(store: CheckpointStore, run_id: str | None, keep_last: int, keep_every: int | None) -> None:
    """Remove finished checkpoints except the last ``keep_last`` and those whose step is a multiple of ``keep_every``.

    Checkpoints without a valid manifest are left alone: one of them may be being written.

    Raises:
        UserError: another run than ``run_id`` saves in the same place, so that neither could be resumed. Local
            directories are locked, but stores at URLs cannot be.
    """
    finished = []
    for checkpoint, manifest in store.complete_checkpoints():
        if manifest.about.get(RUN_ID) != run_id:
            raise UserError(
                f"{checkpoint}: another run saves its checkpoints there, too; stop one of them, give each run a "
                "train.checkpoint_dir of its own, and remove this checkpoint from that of the other run"
            )
        finished.append(checkpoint)
    for checkpoint in finished[:-keep_last]:
        if keep_every is None or checkpoint.step % keep_every:
            checkpoint.remove()
