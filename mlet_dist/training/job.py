"""A job of a run: its data, the run directory it holds, and where it begins."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import distributed as dist

from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.config.sections import Config
from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.data.loading.order import Shuffle
from mlet_dist.data.location import DataPath, data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.evaluation import evaluation_loader
from mlet_dist.training.process_group import Worker
from mlet_dist.training.resume import Start, drop_later, find_start, identity_of
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.warm_start import InitialWeights, find_initial_weights


def for_this_attempt(config: Config) -> Config:
    """The config, of which torch elastic's restarts take no second `run.overwrite` or `never`: they go on."""
    if not _is_restart():
        return config
    resume = "auto" if config.train.resume == "never" else config.train.resume
    return replace(config, run=replace(config.run, overwrite=False), train=replace(config.train, resume=resume))


def finished_before(config: Config, *, by_any: bool = False) -> dict[str, Any] | None:
    """The summary of a run that an earlier attempt has finished, but did not live to show; None where there is none.

    Args:
        by_any: whether any earlier job counts as an attempt, and not those of this torch elastic alone.

    Raises:
        UserError: it cannot be read.
    """
    run = RunDirectory(Path(config.run.dir))
    if not (by_any or _is_restart()) or not run.summary.exists():
        return None
    saved, _, summary = run.load()
    return summary if for_this_attempt(saved) == for_this_attempt(config) else None


def _is_restart() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@dataclass(frozen=True)
class Job:
    """One job of a run, on this rank.

    Attributes:
        loader: of the rows to train on, at the batch that comes first.
        split_loaders: of the rows to evaluate on, by split.
        run: the run's directory, held by this job.
        store: of the run's checkpoints.
        identity: of ``identity_of``.
        start: the checkpoint to begin from; None where the run begins anew.
        initial: weights that a run which begins anew takes in place of random ones.
    """

    config: Config
    worker: Worker
    spec: ModelSpec
    loader: DataLoader
    split_loaders: Mapping[str, DataLoader]
    run: RunDirectory
    store: CheckpointStore
    identity: Mapping[str, Any]
    start: Start | None
    initial: InitialWeights | None

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        steps = len(self.loader) * self.config.train.epochs
        return steps if self.config.train.max_steps is None else min(steps, self.config.train.max_steps)

    @property
    def first_step(self) -> int:
        """Steps taken by the jobs before this one."""
        return 0 if self.start is None else self.start.found.manifest.step

    @property
    def goes_on(self) -> bool:
        """Whether it begins from a checkpoint of this very run."""
        return self.start is not None and self.start.is_own

    @property
    def recorded_bytes(self) -> int:
        """Of metrics.jsonl, up to which it holds the steps before the first of this job."""
        return self.start.found.manifest.about["records"] if self.start is not None and self.start.is_own else 0

    @property
    def local_batch_size(self) -> int:
        """Rows of a batch on one rank."""
        return self.config.data.batch_size // self.worker.world_size

    def say(self, lines: Iterable[str]) -> None:
        """Print lines on stderr, on the first rank."""
        if self.worker.is_first:
            with suppress(OSError):  # a log that nobody reads any more
                for line in lines:
                    print(line, file=sys.stderr, flush=True)


@contextmanager
def open_job(config: Config, worker: Worker) -> Iterator[Job]:
    """Open the data set, keep other jobs out of the run directory and make it ready. A collective call.

    Whatever can be wrong with the data, the directory or the checkpoint is found before an earlier run is dropped.

    Raises:
        UserError: one of them is not as it must be.
    """
    config.check_world_size(worker.world_size)
    config.check_device(worker.device.type)
    data, run = data_set_path(config.data.path), RunDirectory(Path(config.run.dir))
    schema = DatasetSchema.load(data)
    spec = ModelSpec.of(config, schema)
    loader = _training_loader(config, data, spec, worker)
    split_loaders = {
        split: evaluation_loader(data, split, spec, config.data.eval_batch_size, worker) for split in ("valid", "test")
    }
    with run.hold(config) if worker.is_first else nullcontext():
        dist.barrier()
        store, identity = run.checkpoint_store(config), identity_of(config, spec, schema.content_id("train"))
        start = find_start(config, store, identity)
        if start is not None:
            loader.load_state_dict(start.found.manifest.about["data"])
        initial = find_initial_weights(config, spec) if start is None else None
        job = Job(config, worker, spec, loader, split_loaders, run, store, identity, start, initial)
        if worker.is_first:
            run.start(config, spec, goes_on=job.goes_on)
            drop_later(store, start)
        dist.barrier()
        if not run.config.exists():
            raise UserError(f"rank {worker.rank} does not see {run.config}: run.dir must be one storage for all hosts")
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
        drop_last=True,
        shuffle=Shuffle(config.train.seed, config.data.shuffle_buffer) if config.data.shuffle else None,
        threads=config.data.reader_threads,
        pin_memory=worker.device.type == "cuda",
    )
