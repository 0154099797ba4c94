"""A job of a run: its data, the run directory that it locks, and the checkpoint that it starts from.

A run is what ``run.dir`` holds; every process group that trains it, first or after an interruption, is a job.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist.checkpoint.load import CompleteCheckpoint
from mlet_dist.checkpoint.long_work import Advance, run_long
from mlet_dist.checkpoint.manifest import RUN_ID
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.checkpoint.writer import on_first_rank
from mlet_dist.config.config_file import Config
from mlet_dist.config.validation_settings import VALIDATED, check_validation_split
from mlet_dist.data.id_counts import SplitCounts, of_features, out_of_vocabulary_warnings
from mlet_dist.data.label_classes import check_classes
from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.data.loading.order import Shuffle
from mlet_dist.data.location import DataPath, data_set_path
from mlet_dist.data.schema import SPLITS, DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.models.build import build_training_model, with_tables_prefix
from mlet_dist.models.network_check import check_network
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.attempts import restarts
from mlet_dist.training.compressed_tables import shared_row_ranges
from mlet_dist.training.evaluation import evaluation_loader
from mlet_dist.training.process_group import Worker
from mlet_dist.training.resume import (
    ResumePoint,
    check_outlives,
    check_replaceable,
    drop_later_checkpoints,
    find_resume_point,
    identity_of,
    warn_of_damage,
)
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.run_seal import new_run_id
from mlet_dist.training.warm_start import InitialWeights, find_initial_weights

_LOCK_SECONDS = 120.0
"""How long a restarted job waits for the lock of its own earlier attempt, whose rank 0 may be on a lost machine.

A file server releases the locks of such a machine after a lease, for NFS usually 90 s.
"""


@dataclass(frozen=True)
class Job:
    """One job of a run, on this rank.

    Attributes:
        config: the resolved settings.
        worker: this rank.
        spec: the model to build.
        loader: the training rows, positioned at the first batch to train on.
        id_counts: counts of the ids of the model's inputs in the data set.
        split_loaders: the rows to evaluate on at the end, by split.
        validation_loader: the rows to evaluate on between steps; None if ``train.validate_every`` is null.
        run: the run directory, locked by this job.
        store: the run's checkpoints.
        identity: the settings that make two jobs the same run, from ``identity_of``.
        resume_point: the checkpoint to start from; None for a new run.
        initial: weights for a new run instead of random ones, if any.
    """

    config: Config
    worker: Worker
    spec: ModelSpec
    loader: DataLoader
    id_counts: SplitCounts
    split_loaders: Mapping[str, DataLoader]
    validation_loader: DataLoader | None
    run: RunDirectory
    store: CheckpointStore
    identity: Mapping[str, Any]
    resume_point: ResumePoint | None
    initial: InitialWeights | None

    @property
    def steps(self) -> int:
        """The number of steps of the whole run."""
        steps = len(self.loader) * self.config.train.epochs
        return steps if self.config.train.max_steps is None else min(steps, self.config.train.max_steps)

    @property
    def label_weights(self) -> tuple[float, ...]:
        """The factor of each label's loss."""
        return tuple(self.config.train.label_weights.get(label, 1.0) for label in self.spec.labels)

    @property
    def first_step(self) -> int:
        """Steps taken by the jobs before this one."""
        return 0 if self.resume_point is None else self.resume_point.first_step

    @property
    def resumes(self) -> bool:
        """Whether the job resumes from a checkpoint of its own run."""
        return self.resume_point is not None and self.resume_point.is_own

    @property
    def recorded_bytes(self) -> int:
        """The size of metrics.jsonl that holds the steps before this job's first, in bytes."""
        return (
            self.resume_point.found.manifest.about["records"]
            if self.resume_point is not None and self.resume_point.is_own
            else 0
        )

    @property
    def restores_rows(self) -> bool:
        """Whether every row of the tables is loaded from a checkpoint, so that none needs an initial value."""
        return self.resume_point is not None and self.resume_point.tables is None

    def resumed_from(self, found: CompleteCheckpoint) -> "Job":
        """Return the job as it is if it resumes from ``found``, an own checkpoint. A collective call.

        Raises:
            UserError: a later checkpoint is damaged and cannot be removed.
        """
        if self.resume_point is None or found is self.resume_point.found:
            return self
        warn_of_damage(found)
        point = replace(self.resume_point, found=found)
        self.loader.load_state_dict(found.manifest.about["data"])
        on_first_rank(lambda: drop_later_checkpoints(self.store, point), f"{self.store} cannot be changed", None)
        return replace(self, resume_point=point)

    @property
    def local_batch_size(self) -> int:
        """The number of rows of a training batch on one rank."""
        return self.config.data.batch_size // self.worker.world_size

    def log(self, lines: Iterable[str]) -> None:
        """Print lines to stderr, on rank 0."""
        if self.worker.is_first:
            with suppress(OSError):  # stderr may be closed
                for line in lines:
                    print(line, file=sys.stderr, flush=True)


@contextmanager
def open_job(config: Config, worker: Worker) -> Iterator[Job]:
    """Open the data set, lock and prepare the run directory, and find where to start. A collective call.

    Errors in the network, the data, the directory or the checkpoint are raised before an earlier run is overwritten.

    Raises:
        UserError: the data set, the run directory, a checkpoint or the initial weights are invalid.
    """
    config.check_world_size(worker.world_size)
    config.check_device(worker.device.type)
    data, run = data_set_path(config.data.path), RunDirectory(Path(config.run.dir))
    schema = DatasetSchema.load(data)
    try:
        spec = with_tables_prefix(ModelSpec.of(config, schema))
    except ValueError as error:
        raise UserError(f"{data}: {error}") from None
    if config.model.builder is not None:
        network = build_training_model(spec, torch.device("meta"))
        check_network(network, len(spec.dense), len(spec.labels), config.model.nested_dims or ())
    spec, compressed = shared_row_ranges(spec, config)
    id_counts = of_features(schema.id_counts, [feature.name for feature in spec.sparse])
    evaluated = [split for split in schema.parts if split != "train"]
    config.check_labels(schema.labels)
    check_validation_split(config.train, data, schema.rows, schema.label_counts)
    warnings = check_classes(data, schema, SPLITS) + out_of_vocabulary_warnings(data, id_counts, evaluated)

    def open_loaders(advance: Advance) -> tuple[DataLoader, dict[str, DataLoader], DataLoader | None]:
        loader, others = _training_loader(config, data, spec, worker), {}
        for split in evaluated:
            advance()
            others[split] = evaluation_loader(data, split, spec, config.data.eval_batch_size, worker)
        share, validated = config.train.validation_share, None
        if config.train.validate_every is not None:
            advance()
            validated = evaluation_loader(data, VALIDATED, spec, config.data.eval_batch_size, worker, share)
        return loader, others, validated

    # Each rank opens a share of the files.
    loader, split_loaders, validation_loader = run_long(open_loaders)
    # The other ranks wait at the barrier.
    wait = min(_LOCK_SECONDS, worker.timeout.total_seconds() / 2) if restarts() else 0.0
    with run.lock(config, wait) if worker.is_first else nullcontext():
        dist.barrier()
        store, identity = run.checkpoint_store(config), identity_of(config, spec, schema.content_id("train"))
        resume_point = find_resume_point(config, store, identity)
        if resume_point is not None:
            if not resume_point.is_own:
                check_outlives(resume_point.found, run, store)
            resume_point = resume_point.open(spec, config.data.path)
            if resume_point.continues:
                loader.load_state_dict(resume_point.found.manifest.about["data"])
        initial = find_initial_weights(config, spec) if resume_point is None else None
        if initial is not None:
            check_outlives(initial.found, run, store)
        if resume_point is not None and resume_point.is_own:
            run = replace(run, run_id=resume_point.found.manifest.about.get(RUN_ID))
        else:
            run = replace(run, run_id=new_run_id())
        loaders = split_loaders, validation_loader
        job = Job(config, worker, spec, loader, id_counts, *loaders, run, store, identity, resume_point, initial)
        job.log(compressed)
        job.log(f"warning: {warning}" for warning in warnings)
        if config.train.checkpoint_dir is not None and not job.resumes:
            on_first_rank(lambda: check_replaceable(store, run), f"{store} cannot be read", None)
        if worker.is_first:
            run.prepare(config, spec, resumes=job.resumes)
            drop_later_checkpoints(store, resume_point)
        dist.barrier()
        if not run.config.exists():
            raise UserError(
                f"rank {worker.rank} does not see {run.config}: run.dir must be on storage that all hosts share"
            )
        yield job


def _training_loader(config: Config, path: DataPath, spec: ModelSpec, worker: Worker) -> DataLoader:
    return DataLoader(
        path,
        "train",
        batch_size=config.data.batch_size,
        rank=worker.rank,
        world_size=worker.world_size,
        dense_features=spec.dense,
        sparse_features=[feature.name for feature in spec.sparse],
        shuffle=Shuffle(config.train.seed, config.data.shuffle_buffer) if config.data.shuffle else None,
        threads=config.data.reader_threads,
        pin_memory=worker.device.type == "cuda",
    )
