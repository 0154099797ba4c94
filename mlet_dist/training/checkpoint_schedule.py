"""When a run is saved: every N steps or minutes, at its best validation, when a signal stops it, and at its end."""

import os
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import distributed as dist

from mlet_dist.checkpoint.saver import CheckpointSaver
from mlet_dist.config.sections import TrainConfig
from mlet_dist.errors import UserError, print_warning
from mlet_dist.training.non_finite_guard import Guard
from mlet_dist.training.signals import StopSignal, interrupted
from mlet_dist.training.snapshot import state_to_save
from mlet_dist.training.state import Training
from mlet_dist.training.step_agreement import Flags
from mlet_dist.training.timing import StepTimer

_GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"


class CheckpointSchedule:
    """Saves the run after the steps for which a checkpoint is due, the same steps on every rank.

    Clocks and signals differ between ranks. They are therefore flags of the agreement that starts in each forward pass,
    and are acted upon after the following step, when all ranks have read it (``StepAgreement``).

    Args:
        config: the ``train`` section.
        saver: writes the checkpoints.
        stop: the signal that asks the run to stop, if one came.
        manifest_fields: returns what goes into the manifest beside the tensors.
        saved_step: the step of the checkpoint of this run that training was resumed from, if any.
        guard: flushed before anything is saved; its agreement takes the flags along.
        timer: receives the time that training was blocked.

    Attributes:
        seconds: the time that training has waited for checkpoints.
        saved: the number of checkpoints begun.
        failed: the number that could not be written, where ``train.checkpoint_failure`` is ``continue``.
    """

    def __init__(
        self,
        config: TrainConfig,
        saver: CheckpointSaver,
        stop: StopSignal,
        manifest_fields: Callable[[Training], Mapping[str, Any]],
        saved_step: int | None,
        guard: Guard,
        timer: StepTimer,
    ) -> None:
        self._config, self._saver, self._stop, self._manifest_fields = config, saver, stop, manifest_fields
        self._saved_step, self._saved_at = saved_step, time.monotonic()
        self._guard, self._timer = guard, timer
        guard.agreement.flags_of_rank = self._flags
        self.seconds, self.saved, self.failed = 0.0, 0, 0
        self._warned = False

    def __call__(self, training: Training) -> None:
        """Save if a checkpoint is due; called after each step.

        Raises:
            Interrupted: a signal asked some rank to stop, and the run is saved.
            UserError: a checkpoint could not be written.
            NonFinite: a loss or gradient is not finite; nothing is saved.
        """
        signal, due, failed = self._guard.agreement.flags
        if failed:
            self.wait()
        if signal and not training.is_done:
            self.stop(training, signal)
        every = self._config.checkpoint_every
        by_steps = every is not None and training.step % every == 0
        # A flag set before the last save is out of date.
        by_clock = due and training.step - (self._saved_step or 0) > 1
        if (by_steps or by_clock) and not training.is_done and self._saved_step != training.step:
            self._save(training)

    def stop(self, training: Training, signal: int) -> NoReturn:
        """Save the run, and end it because of a signal.

        Raises:
            Interrupted: the run is saved.
            UserError: it cannot be saved.
        """
        self.save_last(training)
        raise interrupted(signal, str(self._saver.saved or f"step {training.step}"))

    def save_best(self, training: Training) -> None:
        """Save the weights of the best validation, which is that of the current step, unless there is a checkpoint.

        Raises:
            UserError: an earlier checkpoint could not be written.
        """
        if self._saved_step != training.step and not training.is_done:  # the last step is saved anyway
            self._save(training)

    def save_first(self, training: Training) -> None:
        """Save a checkpoint to roll back to, unless there is one."""
        if self._saved_step is None:
            self._save(training)

    def save_last(self, training: Training) -> None:
        """Save a checkpoint of the current step unless there is one, and wait until it is complete.

        Raises:
            UserError: it cannot be written.
        """
        self.wait()
        if self._saved_step != training.step:
            self._save(training, is_last=True)
        started = time.monotonic()
        self._saver.wait()
        self.seconds += time.monotonic() - started

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

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
                print_warning(str(error))
        else:
            self._warn_of_short_grace()

    def _warn_of_short_grace(self) -> None:
        """Warn once if ranks that are told to stop could not complete a checkpoint."""
        seconds, given = self._saver.write_seconds, os.environ.get(_GRACE)
        if self._warned or given is None or seconds <= float(given) or dist.get_rank() != 0:
            return
        self._warned = True
        print_warning(
            f"a checkpoint took {seconds:.1f} s to write, and ranks that are told to stop have {given} s ({_GRACE}), "
            "so that a stop would lose the steps since the last checkpoint; raise it, and the scheduler's grace period "
            "above it, or lower train.checkpoint_minutes to what you can lose"
        )

    def _flags(self) -> Flags:
        return Flags(self._stop.number, int(self._is_due()), int(self._saver.has_failed))

    def _is_due(self) -> bool:
        minutes = self._config.checkpoint_minutes
        waited = time.monotonic() - self._saved_at
        return minutes is not None and dist.get_rank() == 0 and waited >= 60 * minutes

    def _save(self, training: Training, *, is_last: bool = False) -> None:
        """Save. No step follows the last checkpoint, so it is written without a copy, and ``save_last`` waits."""
        in_background = self._config.checkpoint_async and not is_last
        self._guard.flush()
        started = time.monotonic()
        self.wait()
        fields = self._manifest_fields(training)
        best = training.validation.best_step
        self._saver.save(training.step, state_to_save(training), fields, in_background=in_background, kept=best)
        self.saved += 1
        self._saved_step = training.step
        if not self._config.checkpoint_async and not is_last:
            self.wait()
        self._saved_at = time.monotonic()
        self.seconds += self._saved_at - started
        self._timer.add_checkpoint_seconds(self._saved_at - started)
