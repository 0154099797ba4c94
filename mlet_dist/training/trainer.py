"""Training, from a config to a checkpoint and a summary."""

import sys
from contextlib import ExitStack, closing, suppress
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.optim.lr_scheduler import LambdaLR

from mlet_dist.config import Config
from mlet_dist.data.loader import DataLoader
from mlet_dist.data.location import data_set_path
from mlet_dist.data.order import Shuffle
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import build_dlrm, table_bytes
from mlet_dist.models.spec import ModelSpec
from mlet_dist.progress import Progress
from mlet_dist.training.checkpoint import save_checkpoint
from mlet_dist.training.distributed import Worker, join_ranks
from mlet_dist.training.evaluation import evaluate, evaluation_loader
from mlet_dist.training.guards import Finding, Guard
from mlet_dist.training.metrics import BinaryMetrics
from mlet_dist.training.optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.pipeline import pipeline_pays, take_steps
from mlet_dist.training.plan import describe_plan
from mlet_dist.training.recorder import Recorder
from mlet_dist.training.report import TrainingReport
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.schedule import learning_rate_factor, schedule_warnings
from mlet_dist.training.sharding import shard_model
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
        UserError: a setting, the data set or the run directory is not as it must be, or the loss is not finite.
    """
    data_path, run = data_set_path(config.data.path), RunDirectory(Path(config.run.dir))
    schema = DatasetSchema.load(data_path)
    spec = ModelSpec.of(config, schema)
    with join_ranks(config.train.device) as worker, ExitStack() as resources:
        config.check_world_size(worker.world_size)
        config.check_device(worker.device.type)
        # Whatever can be wrong with the data is found before an earlier run is dropped and before training.
        loader = DataLoader(
            data_path,
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
        split_loaders = {
            split: evaluation_loader(data_path, split, spec, config.data.eval_batch_size, worker)
            for split in ("valid", "test")
        }
        if worker.is_first:
            resources.enter_context(run.start(config, spec))
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
            with suppress(OSError):  # a log that nobody reads any more
                print(*(f"plan  {line}" for line in describe_plan(plan)), sep="\n", file=sys.stderr, flush=True)
        optimizer = build_optimizer(sharded, config.optimizer)
        steps = len(loader) * config.train.epochs
        if config.train.max_steps is not None:
            steps = min(steps, config.train.max_steps)
        if worker.is_first:
            for warning in schedule_warnings(config.optimizer, steps):
                with suppress(OSError):
                    print(f"warning: {warning}", file=sys.stderr, flush=True)
        metrics = BinaryMetrics(worker.device, _PROGRESS_BINS)
        training = Training(sharded, optimizer, metrics, steps=steps, batches_per_epoch=len(loader))
        with Recorder(run, enabled=worker.is_first) as recorder:
            trained_steps = _train_steps(training, config, loader, worker, recorder)
            progress = {"step": steps, "epoch": training.epoch, "batch_in_epoch": training.batch_in_epoch}
            checkpoint = save_checkpoint(run.checkpoints, steps, sharded, optimizer, progress)
            summary: dict[str, Any] = {"run": str(run.path), "steps": steps, "checkpoint": str(checkpoint)}
            for split, split_loader in split_loaders.items():
                found = evaluate(sharded, split_loader, worker, split)
                recorder.record(split, steps, found)
                summary |= {f"{split}_{name}": found[name] for name in ("auc", "logloss", "rows")}
        trained, served = table_bytes(spec, rows_dtypes)
        summary |= {
            "trained_table_bytes": trained,
            "served_table_bytes": served,
            "world_size": worker.world_size,
            "device": worker.device.type,
            **trained_steps,
        }
        if worker.is_first:
            run.finish(summary)
        if fingerprint:  # after the run has finished, which it must not put at risk
            summary["weights_sha256"] = weights_sha256(sharded, worker.device)
            if worker.is_first:
                run.finish(summary)
        dist.barrier()
    return summary


def _train_steps(
    training: Training,
    config: Config,
    loader: DataLoader,
    worker: Worker,
    recorder: Recorder,
) -> dict[str, Any]:
    """Take all steps of the run; returns what the summary says of them."""
    training.model.train()
    # One iterator over all epochs: whoever takes batches ahead neither stops between two nor goes beyond the last.
    batches = islice(chain.from_iterable(repeat(loader)), training.steps - training.step)
    pipelined = pipeline_pays(worker) if config.train.pipelined is None else config.train.pipelined
    guard = Guard(
        training.model,
        worker.device,
        config.train.on_non_finite,
        limit=config.train.non_finite_limit,
        step=training.step,
        skipped=training.skipped,
    )
    with (
        Progress("train", training.steps, "steps", disable=not worker.is_first) as progress,
        StepTimer(training.model, worker.device, config.data.batch_size // worker.world_size) as timer,
    ):
        report = TrainingReport(config, training, progress, recorder, guard, timer)
        schedule = LambdaLR(training.optimizer, learning_rate_factor(config.optimizer, training.steps))
        after_step: list[AfterStep] = [report]
        outcomes = take_steps(
            training.model, training.optimizer, batches, worker.device, pipelined=pipelined, guard=guard, timer=timer
        )
        with closing(outcomes):
            for outcome in outcomes:
                training.step += 1
                if isinstance(outcome, Finding):
                    training.skipped += 1
                    report.skip(training, outcome)
                else:
                    training.metrics.update(*outcome)
                    schedule.step()
                for done in after_step:
                    done(training)
        return report.summary(training)
