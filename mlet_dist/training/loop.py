"""From the first step that a job takes to the last."""

from collections.abc import Sequence
from itertools import chain, islice, repeat

import torch

from mlet_dist.data.loader import DataLoader
from mlet_dist.training.pipeline import take_steps
from mlet_dist.training.state import AfterStep, Training


def take_all_steps(
    training: Training, loader: DataLoader, device: torch.device, after_step: Sequence[AfterStep], *, pipelined: bool
) -> None:
    """Take the steps that are left, from the loader's position on.

    Args:
        after_step: what is done after each step, in this order.
        pipelined: as ``take_steps``.
    """
    training.model.train()
    # One iterator over all epochs: whoever takes batches ahead neither stops between two nor goes beyond the last.
    batches = islice(chain.from_iterable(repeat(loader)), max(0, training.steps - training.step))
    for logits, labels in take_steps(training.model, training.optimizer, batches, device, pipelined=pipelined):
        training.step += 1
        training.metrics.update(logits, labels)
        for done in after_step:
            done(training)
