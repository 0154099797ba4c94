"""From the first step that a job takes to the last."""

from collections.abc import Sequence
from contextlib import closing
from itertools import chain, islice, repeat

import torch

from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.training.guard import Finding, Guard
from mlet_dist.training.state import AfterStep, Training
from mlet_dist.training.step import take_steps
from mlet_dist.training.timing import StepTimer


def take_all_steps(
    training: Training,
    loader: DataLoader,
    device: torch.device,
    guard: Guard,
    timer: StepTimer,
    after_step: Sequence[AfterStep],
    *,
    pipelined: bool,
) -> None:
    """Take the steps that are left, from the loader's position on.

    Args:
        guard, timer, pipelined: as ``take_steps``.
        after_step: what is done after each step, in this order.

    Raises:
        NonFinite: a loss or gradient is not finite; the run can be taken up again from a checkpoint.
    """
    training.model.train()
    # One iterator over all epochs: whoever takes batches ahead neither stops between two nor goes beyond the last.
    batches = islice(chain.from_iterable(repeat(loader)), max(0, training.steps - training.step))
    with closing(take_steps(training, batches, device, guard, timer, pipelined=pipelined)) as outcomes:
        for outcome in outcomes:
            if not isinstance(outcome, Finding):
                training.metrics.update(*outcome)
            for done in after_step:
                done(training)
