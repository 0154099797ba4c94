"""Saving in a thread of each rank, which writes and applies retention.

In the background it writes a copy of the state, which takes as much host memory; otherwise the state itself, in chunks.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist.checkpoint.host_copy import copied_bytes, copy_to_cpu, in_chunks
from mlet_dist.checkpoint.manifest import RUN_ID
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.checkpoint.writer import on_first_rank, write_checkpoint
from mlet_dist.errors import UserError, print_warning
from mlet_dist.machine_limits import memory_bytes

_JOIN_SECONDS_ON_ERROR = 30.0
_COPY_SHARE = 0.9  # of the available memory: the rest is left for buffers of the file system and for loaders


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
        self._has_room: bool | None = None
        self._error: BaseException | None = None
        self.saved: Checkpoint | None = None
        self.write_seconds = 0.0

    def save(
        self,
        step: int,
        state: dict[str, Any],
        about: Mapping[str, Any],
        *,
        in_background: bool = True,
        kept: int | None = None,
    ) -> None:
        """Write a checkpoint; ``state`` may change as soon as this returns. A collective call.

        Args:
            step: of the checkpoint.
            state: nested dicts of tensors, sharded or the same on all ranks.
            about: as in ``write_checkpoint``.
            in_background: write a copy of the state while training continues. The copy is made only if some host has
                memory for those of its ranks; otherwise, and where this is false, the state is written in chunks
                before this returns.
            kept: the step of a checkpoint that is not removed when this one is complete, however old it is.

        Raises:
            UserError: the previous checkpoint could not be written.
        """
        self.wait()
        copies = in_background and self._copies_fit(state)
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
        written = copy_to_cpu(state) if copies else in_chunks(state)
        checkpoint = self._store.checkpoint(step)
        self._thread = threading.Thread(target=self._run, args=(checkpoint, written, about, kept, device), daemon=True)
        self._thread.start()
        if not copies:
            self._thread.join()

    def _copies_fit(self, state: dict[str, Any]) -> bool:
        """Return whether all hosts have memory for copies, found out before the first; warn if not. A collective call.

        Ranks of a host are taken to have as much as the fullest one.
        """
        if self._has_room is None:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            counts = torch.tensor([copied_bytes(state) * ranks, -int(_COPY_SHARE * memory_bytes()[1])])
            dist.all_reduce(counts, dist.ReduceOp.MAX, self._group)
            needed, available = int(counts[0]), -int(counts[1])
            self._has_room = needed <= available
            if not self._has_room and dist.get_rank() == 0:
                print_warning(
                    f"checkpoints are written while training waits: for train.checkpoint_async a host would need "
                    f"{needed:,} bytes for copies of the weights and optimizer state, and {available:,} can be used "
                    "there; raise the host's or container's memory, or set train.checkpoint_async=false"
                )
        return self._has_room

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

    def _run(
        self,
        checkpoint: Checkpoint,
        state: dict[str, Any],
        about: Mapping[str, Any],
        kept: int | None,
        device: int | None,
    ) -> None:
        # At the priority of training, since a thread of a lower one that holds Python's lock would delay training.
        if device is not None:  # each thread begins with the first
            torch.cuda.set_device(device)
        started = time.monotonic()
        try:
            write_checkpoint(checkpoint, state, about, self._group)
            self.saved, self.write_seconds = checkpoint, time.monotonic() - started
            if self._on_saved is not None:
                self._on_saved(checkpoint.step)
            run_id = about.get(RUN_ID)
            remove_old = partial(apply_retention, self._store, run_id, self._keep_last, self._keep_every, kept)
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


def apply_retention(
    store: CheckpointStore, run_id: str | None, keep_last: int, keep_every: int | None, kept: int | None = None
) -> None:
    """Remove finished checkpoints but the last ``keep_last``, multiples of ``keep_every``, and that of step ``kept``.

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
        if checkpoint.step != kept and (keep_every is None or checkpoint.step % keep_every):
            checkpoint.remove()
