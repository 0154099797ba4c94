"""Finds the checkpoint that a run resumes from, and checks that it belongs to the same run."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import distributed as dist

from mlet_dist.checkpoint.load import CompleteCheckpoint, latest_complete, latest_unverified, require_complete
from mlet_dist.checkpoint.manifest import RUN_ID
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.config.config_file import Config
from mlet_dist.config.model_section import NETWORK_SETTINGS, ModelConfig
from mlet_dist.data.preprocessing import Preprocessing
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.models.spec import ModelSpec
from mlet_dist.node_log import log_of_first_rank
from mlet_dist.training.refitted_tables import RefittedTables
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.run_seal import run_id_of_yaml
from mlet_dist.training.source_inputs import (
    DENSE_FEATURES,
    SPARSE_FEATURES,
    VOCABULARY_ID,
    SourceInputs,
    describe_growth,
)
from mlet_dist.urls import is_url

# Keys of a run's identity, beside those that are names of settings, and those of ``source_inputs``.
_STATIC = ("policy", "budget", "widths", "alpha", "tables")  # settings of compression that others than adaptive read
_RULES = ("tables", "single_layer_up_to")  # settings of the model whose results by table are compared
_ADDED = (*NETWORK_SETTINGS, "projection_init")  # settings of the model that earlier versions recorded none of
_OWN, _LAYERS = "own settings of table ", "layers of table "
_RANGES = "row ranges of table "
_LAYOUT = tuple(f"compression.{key}" for key in ("policy", "nested", "chunks", "shared_rows"))  # beside the ranges
_PREPROCESSING, _TRAINING_FILES = "preprocessing", "the training split's files, by fingerprint,"
_ROWS = "rows of table "


_LABEL_WEIGHTS = "train.label_weights"
_NESTED = ("model.nested_dims", "model.nested_loss")


def identity_of(config: Config, spec: ModelSpec, content_id: str) -> dict[str, Any]:
    """Return setting -> plain value for all settings that determine the weights a run ends with.

    The other settings may change between two jobs of a run: ranks, devices, sharding, exchanges and their precision,
    intervals, paths. The number of steps is included where learning rates decay towards the last step.

    Args:
        config: the resolved settings.
        spec: the model.
        content_id: ``DatasetSchema.content_id`` of the training split.
    """
    plain = config.to_dict()
    defaults = asdict(ModelConfig())
    identity = {
        f"model.{key}": value
        for key, value in plain["model"].items()
        if key not in _RULES and (key not in _ADDED or value != defaults[key])
    }
    of_all = asdict(config.model.of_all_tables)
    for name, own in spec.table_settings.items():
        differing = {key: value for key, value in asdict(own).items() if value != of_all[key]}
        if "hidden_dim" in differing:
            identity[f"{_LAYERS}{name}"] = {"hidden_dim": differing.pop("hidden_dim")}
        if differing:
            identity[f"{_OWN}{name}"] = differing
    identity |= {f"optimizer.{key}": value for key, value in plain["optimizer"].items()}
    identity |= {
        "train.seed": config.train.seed,
        "train.initial_weights": config.train.initial_weights,
        "data.batch_size": config.data.batch_size,
        "data.shuffle": config.data.shuffle,
        DENSE_FEATURES: list(spec.dense),
        SPARSE_FEATURES: [feature.name for feature in spec.sparse],
        VOCABULARY_ID: spec.vocabulary_id,
        _TRAINING_FILES: content_id,
        _PREPROCESSING: spec.preprocessing and spec.preprocessing.to_dict(),
    }
    if len(spec.labels) > 1:
        weights = config.train.label_weights
        identity |= {"labels": list(spec.labels), _LABEL_WEIGHTS: [weights.get(label, 1.0) for label in spec.labels]}
    if config.data.shuffle:
        identity["data.shuffle_buffer"] = config.data.shuffle_buffer
    if config.optimizer.decay != "constant":
        identity |= {"train.epochs": config.train.epochs, "train.max_steps": config.train.max_steps}
    if spec.row_ranges:
        compression = {
            key: value
            for key, value in plain["compression"].items()
            if value != {} and key not in ("preset", "shared_rows")
        }
        decisive = compression if spec.adaptive else {key: compression[key] for key in _STATIC if key in compression}
        identity |= {f"compression.{key}": value for key, value in decisive.items()}
        if spec.shared_rows:  # versions that did not know of it read zero
            identity["compression.shared_rows"] = True
        identity |= {
            f"{_RANGES}{name}": [[rows, width] for rows, width, _ in ranges] for name, ranges in spec.row_ranges.items()
        }
    dtypes = config.sharding.rows_dtypes([table.name for table in spec.tables])
    identity |= {f"{_ROWS}{table.name}": table.num_embeddings for table in spec.tables}
    return identity | {f"rows_dtype of table {name}": dtype for name, dtype in dtypes.items()}


def check_same_run(saved: Mapping[str, Any], wanted: Mapping[str, Any], checkpoint: str, alternative: str) -> None:
    """Raise UserError naming the settings that differ, unless both identities are of the same run.

    Args:
        saved, wanted: results of ``identity_of``.
        checkpoint: what was saved, for the message.
        alternative: what the user can do instead of changing the settings back.
    """
    saved, wanted = dict(saved), dict(wanted)
    made = [each.pop(_PREPROCESSING, None) for each in (saved, wanted)]
    if None not in made:  # versions that did not record it compared the training split's files alone
        saved, wanted = (
            each | Preprocessing.from_dict(of).by_column() for each, of in zip((saved, wanted), made, strict=True)
        )
    keys = [key for key in sorted(saved.keys() | wanted.keys()) if saved.get(key) != wanted.get(key)]
    if any(key.startswith("compression.") for key in keys):  # which says why the rows have other widths
        keys = [key for key in keys if not key.startswith(_RANGES)]
    differing = [f"{key} was {to_json(saved.get(key))}, is {to_json(wanted.get(key))}" for key in keys]
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        if not any(key.startswith(_LAYERS) for key in saved) and any(key.startswith(_LAYERS) for key in keys):
            alternative = f"set model.single_layer_up_to=0 if all tables had two layers, or {alternative}"
        raise UserError(f"{checkpoint} was saved with other settings: {shown}; change them back, or {alternative}")


def without_learning_rates(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without learning rates, schedule, initial weights and loss, for ``train.resume: PATH``."""
    free = ("train.epochs", "train.max_steps", "train.initial_weights", _LABEL_WEIGHTS, *_NESTED)
    return {
        key: value
        for key, value in identity.items()
        if key not in free and (key == "optimizer.name" or not key.startswith("optimizer."))
    }


def _layout(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides where rows are stored, and with which widths."""
    return {key: value for key, value in identity.items() if key in _LAYOUT or key.startswith((_RANGES, _LAYERS))}


def _without_compression(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without what ``train.resume: PATH`` may change of the tables."""
    changing = ("compression.", _RANGES, _LAYERS)
    return {key: value for key, value in identity.items() if not key.startswith(changing)}


def _without_data(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return an identity without what another data set changes, whose columns are compared by ``SourceInputs``."""
    free = (_TRAINING_FILES, VOCABULARY_ID, _PREPROCESSING)
    return {key: value for key, value in identity.items() if key not in free and not key.startswith(_ROWS)}


@dataclass(frozen=True)
class ResumePoint:
    """A checkpoint to resume from.

    Attributes:
        found: the complete checkpoint.
        is_own: whether it belongs to this run, rather than to the path in ``train.resume``.
        refits: whether rows have other widths than there, because compression has changed, or k of some tables.
        continues: whether training goes on where it was in the data. With other training data, only weights and
            optimizer states are taken, and training begins with the first batch.
        tables: those of the checkpoint if it is ``open`` and their rows are not those of the model: it ``refits``, or
            vocabularies have grown.
    """

    found: CompleteCheckpoint
    is_own: bool
    refits: bool = False
    continues: bool = True
    tables: RefittedTables | None = None

    @property
    def first_step(self) -> int:
        """The number of steps that training has taken before it goes on."""
        return self.found.manifest.step if self.continues else 0

    def open(self, spec: ModelSpec, data: str) -> "ResumePoint":
        """Return the same with the tables that the model begins with, if they differ; log where the run resumes.

        Raises:
            UserError: the model cannot begin with the rows of these tables, or its inputs in ``data`` are not theirs.
        """
        found, tables = self.found, None
        warnings, grown = [], {}
        if not self.continues:
            inputs = SourceInputs.of(found.manifest.about, str(found.checkpoint))
            warnings, grown = inputs.check(spec, data, dense_layers=True), inputs.grown_tables(spec)
        if self.refits or grown:
            tables = RefittedTables.of_checkpoint(spec, found.checkpoint, found.manifest, grown)
            tables.check_has_states()
        size = found.manifest.about["world_size"]
        ranks = f"{size} rank{'s' if size > 1 else ''}"
        rows = "; its rows get the widths of this run's tables" if self.refits else ""
        rows += describe_growth(grown, spec)
        other = "" if self.continues else f"; training begins with the first batch of {data}, which is other data"
        resuming = f"resuming from {found.checkpoint}, saved on {ranks} after step {found.manifest.step:,}{rows}{other}"
        _log(resuming)
        for line in warnings:
            _log(f"warning: {found.checkpoint}: {line}")
        log_of_first_rank(resuming)
        return replace(self, tables=tables)


def find_resume_point(config: Config, store: CheckpointStore, identity: Mapping[str, Any]) -> ResumePoint | None:
    """Return the checkpoint to resume from, or None for a new run. A collective call.

    The sizes of the files of the run's own latest checkpoint are compared; its checksums are, when it is loaded.
    Other checkpoints are verified here, since a new run may replace an earlier one before it loads anything.

    Args:
        config: the resolved settings.
        store: the run's own checkpoints.
        identity: the run's settings, from ``identity_of``.

    Raises:
        UserError: no complete checkpoint exists where there must be one, or it was saved with other settings.
    """
    resume = config.train.resume
    if resume == "never" and not config.run.overwrite and store.checkpoints():
        raise UserError(f"{store} holds checkpoints, and train.resume is never; choose an empty directory")
    if resume == "never" or (resume == "auto" and config.run.overwrite):
        return None
    own = None if config.run.overwrite or _is_of(resume, store) else latest_unverified(store)
    if own is None and resume == "auto":
        return None
    if own is not None:
        point = ResumePoint(own, is_own=True)
    else:
        point = ResumePoint(checkpoint_at(resume, "train.resume", ", or auto or never"), is_own=_is_of(resume, store))
    warn_of_damage(point.found)
    checkpoint, about = point.found.checkpoint, point.found.manifest.about
    if resume == "auto":
        if config.train.checkpoint_dir is None:
            alternative = "choose another run.dir, or start over with run.overwrite=true"
        else:
            alternative = (
                "choose another train.checkpoint_dir, or, if this is the run of run.dir, start over with "
                "run.overwrite=true"
            )
        if _without_compression(about["identity"]) == _without_compression(identity):
            alternative = f"begin another run with train.resume={checkpoint} and another run.dir, or {alternative}"
        check_same_run(about["identity"], identity, str(checkpoint), alternative)
    else:
        saved, wanted = without_learning_rates(about["identity"]), without_learning_rates(identity)
        if point.is_own:  # the other checkpoints of the run have the same rows
            check_same_run(saved, wanted, str(checkpoint), "choose another run.dir")
        else:
            continues = saved.get(_TRAINING_FILES) == wanted[_TRAINING_FILES] or about.get("spec") is None
            same_but_rows = _without_compression(saved), _without_compression(wanted)
            if not continues:
                same_but_rows = _without_data(same_but_rows[0]), _without_data(same_but_rows[1])
            check_same_run(*same_but_rows, str(checkpoint), "resume from another checkpoint")
            point = replace(point, refits=_layout(saved) != _layout(wanted), continues=continues)
    if point.continues:
        _check_steps_left(config, point.found)
    return point


def warn_of_damage(found: CompleteCheckpoint) -> None:
    """Log which later checkpoints were passed over, because they are damaged."""
    for line in found.damage:
        _log(f"warning: {line}; using the one before it")


def _check_steps_left(config: Config, found: CompleteCheckpoint) -> None:
    """Raise UserError if the checkpoint is beyond the end of the run."""
    step, cursor = found.manifest.step, found.manifest.about["data"]
    ends = {"train.max_steps": step, "train.epochs": cursor["epoch"] + (cursor["row"] > 0)}
    for key, reached in ends.items():
        wanted = getattr(config.train, key.removeprefix("train."))
        if wanted is not None and wanted < reached:
            raise UserError(
                f"{found.checkpoint} was saved after step {step:,}, and {key} is {wanted}; use {reached} or more, "
                "or resume from another checkpoint"
            )


def check_replaceable(store: CheckpointStore, run: RunDirectory) -> None:
    """Check that a run which starts anew does not remove the checkpoints of a run in another directory.

    Raises:
        UserError: there is such a checkpoint in ``store``, which is ``train.checkpoint_dir``.
    """
    own = run_id_of_yaml(run.config) if run.config.exists() else ""
    for checkpoint, manifest in store.complete_checkpoints():
        if manifest.about.get(RUN_ID) != own:
            raise UserError(
                f"{checkpoint} is a checkpoint of another run than {run.path}, and a new run would remove it; choose "
                "another train.checkpoint_dir, or remove the checkpoints there"
            )


def check_outlives(found: CompleteCheckpoint, run: RunDirectory, store: CheckpointStore) -> None:
    """Raise UserError if a new run would remove the checkpoint that it begins with."""
    removed = (store.identity, CheckpointStore(run.checkpoints).identity)
    if found.checkpoint.store.identity in removed:
        raise UserError(
            f"{found.checkpoint}: the new run in {run.path} is to begin with it, and would remove it first; choose "
            "another run.dir (and another train.checkpoint_dir if that is set)"
        )


def drop_later_checkpoints(store: CheckpointStore, resume_point: ResumePoint | None) -> None:
    """Remove incomplete checkpoints, and those later than the resume point; called on rank 0 only.

    Raises:
        UserError: a checkpoint cannot be removed.
    """
    first = resume_point.found.checkpoint.step if resume_point is not None and resume_point.is_own else -1
    for checkpoint in store.checkpoints():
        if checkpoint.step > first or checkpoint.is_unfinished:
            try:
                checkpoint.remove()
            except Exception as error:  # each store has errors of its own
                raise UserError(f"{checkpoint}: cannot be removed: {error or type(error).__name__}") from None


def checkpoint_at(path: str, setting: str, advice: str = "") -> CompleteCheckpoint:
    """Return the latest complete checkpoint at a path: a checkpoint, a run or a directory of them. A collective call.

    Raises:
        UserError: there is none; the message names ``setting``, such as ``train.resume``, and ends with ``advice``.
    """
    single = Checkpoint.at(path)
    kinds = f"it must be a checkpoint, or a run that has one{advice}"
    if not is_url(path) and not Path(path).exists():
        names = [each.name for each in single.store.checkpoints()] if single is not None else []
        beside = f"; its directory has {', '.join(names)}" if names else ""
        raise UserError(f"{setting} {path}: does not exist{beside}; {kinds}")
    found: CompleteCheckpoint | None
    if single is not None:
        found = require_complete(single)
    elif not is_url(path) and (run := RunDirectory(Path(path))).config.exists():
        found = latest_complete(run.checkpoint_store(run.load_config()))
        if found is not None:
            run.check_own(found.checkpoint, found.manifest.about)
    else:
        found = latest_complete(CheckpointStore(path))
    if found is None:
        raise UserError(f"{setting} {path}: no complete checkpoint is there; {kinds}")
    return found


def _is_of(path: str, store: CheckpointStore) -> bool:
    """Return whether a path is a single checkpoint of ``store``."""
    single = Checkpoint.at(path)
    return single is not None and single.store.identity == store.identity


def _log(text: str) -> None:
    if dist.get_rank() == 0:
        with suppress(OSError):
            print(f"mlet: {text}", file=sys.stderr, flush=True)
