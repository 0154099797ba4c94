"""Where a run begins: at its beginning, or where another job left it."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed as dist

from mlet_dist.checkpoint.choosing import Found, newest_whole, whole
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.config.sections import Config, load_config
from mlet_dist.errors import UserError
from mlet_dist.training.identity import check_same, without_rates
from mlet_dist.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Start:
    """A checkpoint to begin from.

    Attributes:
        found: whole.
        is_own: whether it is one of this run's own, and not of ``train.resume``'s path.
    """

    found: Found
    is_own: bool


def find_start(config: Config, store: CheckpointStore, identity: Mapping[str, Any]) -> Start | None:
    """The checkpoint from which the run is to begin; None where it begins anew. A collective call.

    Args:
        store: the run's own checkpoints.
        identity: of ``identity_of``.

    Raises:
        UserError: no checkpoint is whole where there should be one, or it is of a run with other settings.
    """
    resume = config.train.resume
    if resume == "never" and not config.run.overwrite and store.checkpoints():
        raise UserError(f"{store} holds checkpoints, and train.resume is never; choose an empty directory")
    if resume == "never" or (resume == "auto" and config.run.overwrite):
        return None
    own = None if config.run.overwrite or _is_of(resume, store) else newest_whole(store)
    if own is None and resume == "auto":
        return None
    if own is not None:
        start = Start(own, is_own=True)
    else:
        start = Start(checkpoint_at(resume, "train.resume"), is_own=_is_of(resume, store))
    for line in start.found.damage:
        _say(f"warning: {line}; the one before it is taken")
    checkpoint, about = start.found.checkpoint, start.found.manifest.about
    if resume == "auto":
        way_out = "choose another run.dir, or begin anew with run.overwrite=true"
        check_same(about["identity"], identity, str(checkpoint), way_out)
    else:
        check_same(
            without_rates(about["identity"]), without_rates(identity), str(checkpoint), "begin from another checkpoint"
        )
    _check_left(config, start.found)
    ranks = f"{about['world_size']} rank{'s' if about['world_size'] > 1 else ''}"
    _say(f"goes on from {checkpoint}, saved on {ranks} after step {start.found.manifest.step:,}")
    return start


def _check_left(config: Config, found: Found) -> None:
    """Raise UserError where the checkpoint is beyond the end of the run."""
    step, cursor = found.manifest.step, found.manifest.about["data"]
    ends = {"train.max_steps": step, "train.epochs": cursor["epoch"] + (cursor["row"] > 0)}
    for key, reached in ends.items():
        wanted = getattr(config.train, key.removeprefix("train."))
        if wanted is not None and wanted < reached:
            raise UserError(
                f"{found.checkpoint} was saved after step {step:,}, and {key} is {wanted}; use {reached} or more, "
                "or begin from another checkpoint"
            )


def drop_later(store: CheckpointStore, start: Start | None) -> None:
    """Remove what a run's store holds that is not of the run as it goes on; called by the first rank alone.

    Raises:
        UserError: it cannot be removed.
    """
    first = start.found.checkpoint.step if start is not None and start.is_own else -1
    for checkpoint in store.checkpoints():
        if checkpoint.step > first or checkpoint.is_being_written:
            try:
                checkpoint.remove()
            except Exception as error:  # each store has errors of its own
                raise UserError(f"{checkpoint}: cannot be removed: {error or type(error).__name__}") from None


def checkpoint_at(path: str, setting: str) -> Found:
    """The newest whole one of what a path names: a checkpoint, a run, or a directory of checkpoints. A collective call.

    Raises:
        UserError: there is none; the message names ``setting``.
    """
    single = Checkpoint.at(path)
    found: Found | None
    if single is not None:
        found = whole(single)
    elif "://" not in path and (run := RunDirectory(Path(path))).config.exists():
        found = newest_whole(run.checkpoint_store(load_config(run.config)))
    else:
        found = newest_whole(CheckpointStore(path))
    if found is None:
        raise UserError(f"{setting} {path}: no whole checkpoint is there; it must be one, or a run that has one")
    return found


def _is_of(path: str, store: CheckpointStore) -> bool:
    """Whether a path is that of a single checkpoint of ``store``."""
    single = Checkpoint.at(path)
    return single is not None and single.store.place == store.place


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        with suppress(OSError):
            print(f"mlet: {text}", file=sys.stderr, flush=True)
