"""Finds the checkpoint of a run that a command reads: that of its last step, of another step, or of its best one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlet_dist.checkpoint.load import finished_manifest, latest_finished
from mlet_dist.checkpoint.manifest import MANIFEST, Manifest
from mlet_dist.checkpoint.store import INCOMPLETE, Checkpoint, CheckpointStore
from mlet_dist.errors import UserError
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.validation_state import VALIDATION

_SHOWN = 12  # steps of a message


@dataclass(frozen=True)
class CheckpointChoice:
    """Which checkpoint of a run is wanted; without both, that of the last step of a finished run.

    Attributes:
        step: that of this step.
        best: that of the best validation.
    """

    step: int | None = None
    best: bool = False

    def __bool__(self) -> bool:
        return self.best or self.step is not None


LAST = CheckpointChoice()


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run, after its files' sizes were compared; readers verify the checksums.

    Attributes:
        checkpoint: the checkpoint.
        manifest: its manifest.
        config: the run's settings as plain values.
        spec: the model.
        summary: the run's results; empty unless they are those of this checkpoint.
    """

    checkpoint: Checkpoint
    manifest: Manifest
    config: Mapping[str, Any]
    spec: ModelSpec
    summary: Mapping[str, Any]


def is_checkpoint(path: Path) -> bool:
    """Return whether a path is the directory of a single checkpoint."""
    return Checkpoint.at(str(path)) is not None and any((path / name).exists() for name in (MANIFEST, INCOMPLETE))


def find_checkpoint(path: Path, choice: CheckpointChoice = LAST) -> RunCheckpoint:
    """Return a checkpoint of a run, or the checkpoint whose directory ``path`` is.

    Raises:
        UserError: there is no such checkpoint, or it is damaged; or no ``choice`` was made, and the run never finished.
    """
    if is_checkpoint(path):
        return _single(path, choice)
    run = RunDirectory(path)
    config, spec, summary = run.load_unfinished()
    store = run.checkpoint_store(config)
    if choice:
        checkpoint = _chosen(run, store, summary, choice)
        manifest = finished_manifest(checkpoint, "the checkpoint")
    elif summary is None:
        advice = f", or name one of its checkpoints by --step: {steps}" if (steps := _steps_of(store)) else ""
        raise UserError(f"{run.never_finished}{advice}")
    else:
        checkpoint, manifest = latest_finished(store)
    run.check_own(checkpoint, manifest.about)
    is_last = summary is not None and summary.get("steps", checkpoint.step) == checkpoint.step
    return RunCheckpoint(checkpoint, manifest, config.to_dict(), spec, summary if summary and is_last else {})


def finished_steps(path: Path) -> list[int]:
    """Return the steps of the checkpoints of a run; none if ``path`` is a single checkpoint.

    Raises:
        UserError: it is neither.
    """
    if is_checkpoint(path):
        return []
    run = RunDirectory(path)
    config, _, _ = run.load_unfinished()
    return _finished(run.checkpoint_store(config))


def _single(path: Path, choice: CheckpointChoice) -> RunCheckpoint:
    """Return the checkpoint in a directory; its manifest holds the settings and the model, whatever is beside it."""
    if choice:
        raise UserError(f"{path}: is one checkpoint, and --step and --best choose one of a run; name either")
    checkpoint = Checkpoint.at(str(path))
    assert checkpoint is not None
    if checkpoint.is_unfinished:
        raise UserError(f"{path}: this checkpoint is not complete: writing or removing it was interrupted")
    manifest = finished_manifest(checkpoint, "the checkpoint")
    about = manifest.about
    if about.get("config") is None or about.get("spec") is None:
        raise UserError(f"{path}: is a checkpoint, but not of a run; name the directory that it is in")
    spec = ModelSpec.from_dict(about["spec"], str(checkpoint))
    return RunCheckpoint(checkpoint, manifest, about["config"], spec, {})


def _chosen(
    run: RunDirectory, store: CheckpointStore, summary: Mapping[str, Any] | None, choice: CheckpointChoice
) -> Checkpoint:
    step = choice.step
    if step is None:
        step = _best_step(run, store, summary)
    kept = _finished(store)
    if step not in kept:
        found = f"it has those of steps {_listed(kept)}" if kept else "it has none"
        which = f"step {step:,}, which was the best" if choice.best else f"step {step:,}"
        raise UserError(f"{run.path}: there is no checkpoint of {which}; {found}")
    return store.checkpoint(step)


def _best_step(run: RunDirectory, store: CheckpointStore, summary: Mapping[str, Any] | None) -> int:
    """Return the best step by the summary, or by the latest checkpoint of a run that has not finished."""
    found: int | None
    if summary is not None:
        found = summary.get("best_step")
    else:
        _, manifest = latest_finished(store)
        found = (manifest.about.get(VALIDATION) or {}).get("best_step")
    if found is None:
        steps = _steps_of(store)
        others = f"; name another by --step: {steps}" if steps else ""
        raise UserError(
            f"{run.path}: --best: this run has kept no best checkpoint, for which it needs train.validate_every and "
            f"train.keep_best{others}"
        )
    return found


def _finished(store: CheckpointStore) -> list[int]:
    return [each.step for each in store.checkpoints() if not each.is_unfinished]


def _steps_of(store: CheckpointStore) -> str:
    return _listed(_finished(store))


def _listed(steps: Sequence[int]) -> str:
    """Return the last steps as text; they are written as on the command line, without commas."""
    more = "…, " if len(steps) > _SHOWN else ""
    return more + ", ".join(map(str, steps[-_SHOWN:]))
