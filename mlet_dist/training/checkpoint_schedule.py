"""When a run is saved: every so many steps or minutes, when it is told to stop, and at its end."""

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist.checkpoint.saver import CheckpointSaver
from mlet_dist.config.sections import TrainConfig
from mlet_dist.embeddings.sharded.collectives import Agreement
from mlet_dist.errors import UserError
from mlet_dist.training.guard import Guard
from mlet_dist.training.signals import StopSignal, interrupted
from mlet_dist.training.snapshot import tensors_of
from mlet_dist.training.state import Training
from mlet_dist.training.timing import StepTimer


class Checkpointing:
    """Saves after the steps after which it is due, the same ones on every rank.

    Clocks and signals differ between ranks. So the ranks agree on what they know after one step behind the next one,
    and all know it after that, without waiting. The group is gloo's: a device does not wait either.

    Args:
        saver: writes.
        stop: tells that the run is to end.
        describe: what goes into the manifest beside the tensors.
        saved_step: the step of the checkpoint of this run that training has begun with, if any.
        guard: settled before anything is saved.
        timer: told how long training is held up.

    Attributes:
        seconds: that training has waited for checkpoints.
        saved: how many it has begun to write.
        failed: how many could not be written, where ``train.checkpoint_failure`` is ``continue``.
    """

    def __init__(
        self,
        config: TrainConfig,
        saver: CheckpointSaver,
        stop: StopSignal,
        describe: Callable[[Training], Mapping[str, Any]],
        saved_step: int | None,
        guard: Guard,
        timer: StepTimer,
    ) -> None:
        self._config, self._saver, self._stop, self._describe = config, saver, stop, describe
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=config.collective_timeout_s))
        self._agree(signal=0, due=False, failed=False)
        self._saved_step, self._saved_at = saved_step, time.monotonic()
        self._guard, self._timer = guard, timer
        self.seconds, self.saved, self.failed = 0.0, 0, 0

    def __call__(self, training: Training) -> None:
        """After a step.

        Raises:
            Interrupted: a rank was told to stop; the run is saved.
            UserError: a checkpoint could not be written.
            NonFinite: a loss or gradient is not finite; nothing is saved.
        """
        signal, due, failed = self._agreed.read()
        self._agree(self._stop.number, self._is_time(), self._saver.has_failed)
        if failed:
            self.settle()
        if signal and not training.is_done:
            self.finish(training)
            raise interrupted(signal, str(self._saver.saved or f"step {training.step}"))
        every = self._config.checkpoint_every
        by_steps = every is not None and training.step % every == 0
        # What was said before the last save is no longer so.
        by_clock = due and training.step - (self._saved_step or 0) > 1
        if (by_steps or by_clock) and not training.is_done:
            self._save(training)

    def begin(self, training: Training) -> None:
        """Have a checkpoint to go back to."""
        if self._saved_step is None:
            self._save(training)

    def finish(self, training: Training) -> None:
        """Have a checkpoint of just this step, whole.

        Raises:
            UserError: it cannot be written.
        """
        self._agreed.read()
        self.settle()
        if self._saved_step != training.step:
            self._save(training)
        started = time.monotonic()
        self._saver.wait()
        self.seconds += time.monotonic() - started

    def settle(self) -> None:
        """Wait until what was saved is whole.

        Raises:
            UserError: it cannot be written.
        """
        try:
            self._saver.wait()
        except UserError as error:
            self._saved_step = None
            if self._config.checkpoint_failure == "stop":
                raise
            self.failed += 1
            if dist.get_rank() == 0:
                with suppress(OSError):
                    print(f"mlet: warning: {error}", file=sys.stderr, flush=True)

    def _agree(self, signal: int, due: bool, failed: bool) -> None:
        self._agreed = Agreement(torch.tensor([signal, due, failed], dtype=torch.int64), self._group)

    def _is_time(self) -> bool:
        minutes = self._config.checkpoint_minutes
        waited = time.monotonic() - self._saved_at
        return minutes is not None and dist.get_rank() == 0 and waited >= 60 * minutes

    def _save(self, training: Training) -> None:
        self._guard.settle()
        started = time.monotonic()
        self.settle()
        self._saver.save(training.step, tensors_of(training), self._describe(training))
        self.saved += 1
        self._saved_step = training.step
        if not self._config.checkpoint_async:
            self.settle()
        self._saved_at = time.monotonic()
        self.seconds += self._saved_at - started
        self._timer.saved_for(self._saved_at - started)
