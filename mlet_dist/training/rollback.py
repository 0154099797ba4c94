"""Going back to the last checkpoint, to go on without the batch behind which weights may be spoiled."""

from collections.abc import Mapping
from typing import Any

from mlet_dist.checkpoint.choosing import newest_whole
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.training.guard import NonFinite
from mlet_dist.training.snapshot import restore
from mlet_dist.training.state import Training


def go_back(training: Training, store: CheckpointStore, error: NonFinite, limit: int) -> Mapping[str, Any]:
    """Take up the newest whole checkpoint; the batch of ``error`` is passed over from now on. A collective call.

    The batches between are trained again: the result is that of a run in which the one batch never came.

    Args:
        store: of this run, which saves nothing before its guard is settled.
        limit: how often a run may go back.

    Returns:
        What the checkpoint's manifest says of the run.

    Raises:
        NonFinite: the run has gone back as often as it may, or there is no checkpoint.
        UserError: each checkpoint is damaged.
    """
    if len(training.passed_over) >= limit:
        raise NonFinite(error.finding, f"the run has gone back {limit} times, as often as it may") from None
    found = newest_whole(store)
    if found is None:
        raise NonFinite(error.finding, f"{store} holds no checkpoint to go back to") from None
    # The checkpoint knows of none that were found after it was saved.
    passed_over = training.passed_over | {error.finding.step}
    restore(training, found)
    training.passed_over = passed_over
    return found.manifest.about
