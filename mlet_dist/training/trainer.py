"""Training, from a config to a checkpoint and a summary."""

import sys
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist.config import Config, RowsDtype
from mlet_dist.data.loader import DataLoader
from mlet_dist.data.location import data_set_path
from mlet_dist.data.order import Shuffle
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import build_dlrm, table_bytes
from mlet_dist.models.spec import ModelSpec
from mlet_dist.progress import Progress
from mlet_dist.training.attempt import for_this_attempt
from mlet_dist.training.checkpoint.saver import CheckpointSaver
from mlet_dist.training.checkpointing import Checkpointing
from mlet_dist.training.distributed import Worker, join_ranks
from mlet_dist.training.evaluation import evaluate, evaluation_loader
from mlet_dist.training.guards import Guard, NonFinite
from mlet_dist.training.identity import identity_of
from mlet_dist.training.initial import find_initial_weights
from mlet_dist.training.interruption import StopSignal
from mlet_dist.training.loop import take_all_steps
from mlet_dist.training.metrics import BinaryMetrics
from mlet_dist.training.optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.pipeline import pipeline_pays
from mlet_dist.training.plan import describe_plan
from mlet_dist.training.recorder import Recorder
from mlet_dist.training.report import TrainingReport
from mlet_dist.training.resume import drop_later, find_start
from mlet_dist.training.rollback import go_back
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.schedule import LearningRates, schedule_warnings
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.snapshot import about_ranks, now, restore, versions
from mlet_dist.training.state import AfterStep, Training
from mlet_dist.training.timing import StepTimer
from mlet_dist.training.weights import weights_sha256

_PROGRESS_BINS = 1 << 16


def train(config: Config, *, fingerprint: bool = False) -> dict[str, Any]:
    """Train, checkpoint and evaluate; the same call on every rank.

    Args:
        config: the resolved settings.
        fingerprint: also compute ``weights_sha256``, which sends the whole model through the first rank.

    Returns:
        The summary that is written into the run directory.

    Raises:
        UserError: a setting, the data set, the run directory or a checkpoint is not as it must be, or the loss is not
            finite.
        Interrupted: a signal asked to stop; the run is saved.
        RanksLost: other ranks did not take part in a collective in time.
    """
    config = for_this_attempt(config)
    data_path, run = data_set_path(config.data.path), RunDirectory(Path(config.run.dir))
    schema = DatasetSchema.load(data_path)
    spec = ModelSpec.of(config, schema)
    timeout = timedelta(seconds=config.train.collective_timeout_s)
    with join_ranks(config.train.device, timeout) as worker, ExitStack() as resources:
        config.check_world_size(worker.world_size)
        config.check_device(worker.device.type)
        # Whatever can be wrong with the data is found before an earlier run is dropped and before training.
        loader = _training_loader(config, data_path, spec, worker)
        split_loaders = {
            split: evaluation_loader(data_path, split, spec, config.data.eval_batch_size, worker)
            for split in ("valid", "test")
        }
        if worker.is_first:
            resources.enter_context(run.hold(config))
        dist.barrier()
        store, identity = run.checkpoint_store(config), identity_of(config, spec)
        start = find_start(config, store, identity)
        if start is not None:
            loader.load_state_dict(start.found.manifest.about["data"])
        initial = find_initial_weights(config, spec) if start is None else None
        if worker.is_first:
            run.start(config, spec, None if start is None or not start.is_own else start.found.manifest.step)
            drop_later(store, start)
        dist.barrier()
        if not run.config.exists():
            raise UserError(f"rank {worker.rank} does not see {run.config}: run.dir must be one storage for all hosts")

        rows_dtypes = config.sharding.rows_dtypes([feature.name for feature in spec.sparse])
        model = build_dlrm(spec, torch.device("meta"), rows_dtypes)
        fuse_row_optimizer(model, config.optimizer)
        local_batch_size = config.data.batch_size // worker.world_size
        sharded, plan = shard_model(model, worker, local_batch_size, config.sharding, spec.pooling_factors)
        if worker.is_first:
            run.save_plan(plan.entries(), worker.world_size)
            _say(f"plan  {line}" for line in describe_plan(plan))
        steps = len(loader) * config.train.epochs
        if config.train.max_steps is not None:
            steps = min(steps, config.train.max_steps)
        if worker.is_first:
            _say(f"warning: {warning}" for warning in schedule_warnings(config.optimizer, steps))
        training = Training(
            sharded,
            build_optimizer(sharded, config.optimizer),
            BinaryMetrics(worker.device, _PROGRESS_BINS),
            steps=steps,
            batches_per_epoch=len(loader),
        )
        if start is not None:
            restore(training, start.found)
        elif initial is not None:
            initial.load(sharded)
        first_step = training.step

        def about(training: Training) -> dict[str, Any]:
            return {
                "saved": now(),
                "versions": versions(),
                **about_ranks(training),
                "skipped": training.skipped,
                "data": loader.state_dict(training.step),
                "report": report.state_dict(),
                "identity": identity,
                "config": config.to_dict(),
                "plan": plan.entries(),
            }

        stop = resources.enter_context(StopSignal())
        recorder = resources.enter_context(Recorder(run, enabled=worker.is_first, first_step=first_step))
        saver = resources.enter_context(
            CheckpointSaver(store, timeout, config.train.keep_last, config.train.keep_every)
        )
        saved_step = first_step if start is not None and start.is_own else None
        guard = Guard(training, worker.device, config.train.on_non_finite, config.train.non_finite_limit)
        with (
            Progress("train", steps, "steps", disable=not worker.is_first, done=first_step) as progress,
            StepTimer(sharded, worker.device, local_batch_size) as timer,
        ):
            report = TrainingReport(config, training, progress, recorder, guard, timer)
            if start is not None:
                report.load_state_dict(start.found.manifest.about["report"])
            rates = LearningRates(config.optimizer, training)
            checkpointing = Checkpointing(config.train, saver, stop, about, saved_step, guard, timer)
            if config.train.on_non_finite == "rollback":
                checkpointing.begin(training)
            pipelined = pipeline_pays(worker) if config.train.pipelined is None else config.train.pipelined
            after_step: list[AfterStep] = [rates, report, checkpointing]
            while not training.is_done:
                try:
                    take_all_steps(training, loader, worker.device, guard, timer, after_step, pipelined=pipelined)
                except NonFinite as error:
                    if config.train.on_non_finite != "rollback":
                        raise
                    checkpointing.settle()
                    back_to = go_back(training, store, error, config.train.non_finite_limit)
                    loader.load_state_dict(back_to["data"])
                    report.go_back(training, error.finding, back_to["report"])
                    guard.forget()
                    rates(training)
        checkpointing.finish(training)
        checkpoint = store.checkpoint(training.step)
        stop.leave_at_once(str(checkpoint))

        summary: dict[str, Any] = {"run": str(run.path), "steps": training.step, "checkpoint": str(checkpoint)}
        for split, split_loader in split_loaders.items():
            found = evaluate(sharded, split_loader, worker, split)
            recorder.record(split, training.step, found)
            summary |= {f"{split}_{name}": found[name] for name in ("auc", "logloss", "rows")}
        stored: dict[str, RowsDtype] = {
            name: "fp16" if cost.row_bytes == 2 else "fp32" for name, (cost, _) in plan.tables.items()
        }
        trained, served = table_bytes(spec, stored)
        summary |= {
            "trained_table_bytes": trained,
            "served_table_bytes": served,
            "world_size": worker.world_size,
            "device": worker.device.type,
            **report.summary(training),
            "first_step": first_step,
            "checkpoints": checkpointing.saved,
            "checkpoints_failed": checkpointing.failed,
            "checkpoint_seconds": checkpointing.seconds,
        }
        if worker.is_first:
            run.finish(summary)
        if fingerprint:  # after the run has finished, which it must not put at risk
            summary["weights_sha256"] = weights_sha256(sharded, worker.device)
            if worker.is_first:
                run.finish(summary)
        dist.barrier()
    return summary


def _training_loader(config: Config, path: Path, spec: ModelSpec, worker: Worker) -> DataLoader:
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


def _say(lines: Iterable[str]) -> None:
    with suppress(OSError):  # a log that nobody reads any more
        for line in lines:
            print(line, file=sys.stderr, flush=True)
