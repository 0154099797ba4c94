"""Where a run begins: at its beginning, or at a checkpoint of the same run; and what makes two runs the same."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import distributed as dist

from mlet_dist.checkpoint.load import CompleteCheckpoint, latest_complete, require_complete
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.config.config_file import load_config
from mlet_dist.config.sections import Config
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.run_directory import RunDirectory


def identity_of(config: Config, spec: ModelSpec, content_id: str) -> dict[str, Any]:
    """Setting -> plain value, of all settings that decide which weights a run ends with.

    What is not among them may change between two jobs of a run: ranks, devices, sharding, exchanges and their
    precision, cadences, places. The number of steps is among them where learning rates fall towards the last one.

    Args:
        content_id: of the training split, ``DatasetSchema.content_id``.
    """
    plain = config.to_dict()
    found = {f"model.{key}": value for key, value in plain["model"].items()}
    found |= {f"optimizer.{key}": value for key, value in plain["optimizer"].items()}
    found |= {
        "train.seed": config.train.seed,
        "train.initial_weights": config.train.initial_weights,
        "data.batch_size": config.data.batch_size,
        "data.shuffle": config.data.shuffle,
        "data.dense_features": list(spec.dense),
        "data.sparse_features": [feature.name for feature in spec.sparse],
        "the data set's vocabulary_id": spec.vocabulary_id,
        "the training split's files, by fingerprint,": content_id,
    }
    if config.data.shuffle:
        found["data.shuffle_buffer"] = config.data.shuffle_buffer
    if config.optimizer.decay != "constant":
        found |= {"train.epochs": config.train.epochs, "train.max_steps": config.train.max_steps}
    dtypes = config.sharding.rows_dtypes([feature.name for feature in spec.sparse])
    found |= {f"rows of table {feature.name}": feature.num_embeddings for feature in spec.sparse}
    return found | {f"rows_dtype of table {name}": dtype for name, dtype in dtypes.items()}


def check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], checkpoint: str, way_out: str) -> None:
    """Raise UserError, which names the settings, unless both are the same run's.

    Args:
        saved, wanted: of ``identity_of``.
        way_out: what the user may do instead of changing the settings back.
    """
    differing = []
    for key in sorted(saved.keys() | wanted.keys()):
        before, now = saved.get(key), wanted.get(key)
        if before != now:
            differing.append(f"{key} was {to_json(before)}, is {to_json(now)}")
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise UserError(f"{checkpoint} was saved with other settings: {shown}; set them back, or {way_out}")


def without_rates(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity less learning rates, their schedule and where a run began, all of which may be others if asked."""
    free = ("train.epochs", "train.max_steps", "train.initial_weights")
    return {
        key: value
        for key, value in identity.items()
        if key not in free and (key == "optimizer.name" or not key.startswith("optimizer."))
    }


@dataclass(frozen=True)
class Start:
    """A checkpoint to begin from.

    Attributes:
        found: whole.
        is_own: whether it is one of this run's own, and not of ``train.resume``'s path.
    """

    found: CompleteCheckpoint
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
    own = None if config.run.overwrite or _is_of(resume, store) else latest_complete(store)
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


def _check_left(config: Config, found: CompleteCheckpoint) -> None:
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
        if checkpoint.step > first or checkpoint.is_unfinished:
            try:
                checkpoint.remove()
            except Exception as error:  # each store has errors of its own
                raise UserError(f"{checkpoint}: cannot be removed: {error or type(error).__name__}") from None


def checkpoint_at(path: str, setting: str) -> CompleteCheckpoint:
    """The newest whole one of what a path names: a checkpoint, a run, or a directory of checkpoints. A collective call.

    Raises:
        UserError: there is none; the message names ``setting``.
    """
    single = Checkpoint.at(path)
    found: CompleteCheckpoint | None
    if single is not None:
        found = require_complete(single)
    elif "://" not in path and (run := RunDirectory(Path(path))).config.exists():
        found = latest_complete(run.checkpoint_store(load_config(run.config)))
    else:
        found = latest_complete(CheckpointStore(path))
    if found is None:
        raise UserError(f"{setting} {path}: no whole checkpoint is there; it must be one, or a run that has one")
    return found


def _is_of(path: str, store: CheckpointStore) -> bool:
    """Whether a path is that of a single checkpoint of ``store``."""
    single = Checkpoint.at(path)
    return single is not None and single.store.identity == store.identity


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        with suppress(OSError):
            print(f"mlet: {text}", file=sys.stderr, flush=True)
