"""Training, from a config to a checkpoint and a summary."""

from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import distributed as dist
from torchrec.distributed import DistributedModelParallel

from mlet_dist.checkpoint.saver import CheckpointSaver
from mlet_dist.config.sections import Config, RowsDtype
from mlet_dist.models.dlrm import build_dlrm, table_bytes
from mlet_dist.progress import Progress
from mlet_dist.training.checkpoint_schedule import Checkpointing
from mlet_dist.training.evaluation import BinaryMetrics, evaluate
from mlet_dist.training.guard import Guard, NonFinite
from mlet_dist.training.job import Job, for_this_attempt, open_job
from mlet_dist.training.model_plan import ModelPlan, describe_plan
from mlet_dist.training.optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.process_group import join_ranks
from mlet_dist.training.reporting import Recorder, TrainingReport
from mlet_dist.training.schedule import LearningRates, schedule_warnings
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.signals import StopSignal
from mlet_dist.training.snapshot import about_ranks, go_back, now, restore, versions, weights_sha256
from mlet_dist.training.state import AfterStep, Training
from mlet_dist.training.step import pipeline_pays, take_all_steps
from mlet_dist.training.timing import StepTimer


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
    timeout = timedelta(seconds=config.train.collective_timeout_s)
    with join_ranks(config.train.device, timeout) as worker, ExitStack() as held:
        job = held.enter_context(open_job(config, worker))
        model, plan = build_model(job)
        training = begin_training(job, model)
        stop = held.enter_context(StopSignal())
        recorder = held.enter_context(Recorder(job.run, worker.is_first, job.first_step, job.recorded_bytes))

        of_steps = train_steps(job, training, plan, recorder, stop)
        checkpoint = str(job.store.checkpoint(training.step))
        stop.leave_at_once(checkpoint)

        summary = {"run": str(job.run.path), "steps": training.step, "checkpoint": checkpoint}
        summary |= _evaluate(job, training, recorder) | _about_model(job, plan) | of_steps
        if worker.is_first:
            job.run.finish(summary)
        if fingerprint:  # after the run has finished, which it must not put at risk
            summary["weights_sha256"] = weights_sha256(model, worker.device)
            if worker.is_first:
                job.run.finish(summary)
        dist.barrier()
    return summary


def _evaluate(job: Job, training: Training, recorder: Recorder) -> dict[str, Any]:
    """Metrics of the splits that were not trained on. A collective call."""
    summary: dict[str, Any] = {}
    for split, loader in job.split_loaders.items():
        found = evaluate(training.model, loader, job.worker, split)
        recorder.record(split, training.step, found)
        summary |= {f"{split}_{name}": found[name] for name in ("auc", "logloss", "rows")}
    return summary


def _about_model(job: Job, plan: ModelPlan) -> dict[str, Any]:
    stored: dict[str, RowsDtype] = {
        name: "fp16" if cost.row_bytes == 2 else "fp32" for name, (cost, _) in plan.tables.items()
    }
    trained, served = table_bytes(job.spec, stored)
    return {
        "trained_table_bytes": trained,
        "served_table_bytes": served,
        "world_size": job.worker.world_size,
        "device": job.worker.device.type,
    }


_PROGRESS_BINS = 1 << 16


def build_model(job: Job) -> tuple[DistributedModelParallel, ModelPlan]:
    """The model over all ranks, with initial values, and the plan, which is shown and saved. A collective call.

    Raises:
        UserError: no plan fits, or none is what was asked.
    """
    rows_dtypes = job.config.sharding.rows_dtypes([feature.name for feature in job.spec.sparse])
    model = build_dlrm(job.spec, torch.device("meta"), rows_dtypes)
    fuse_row_optimizer(model, job.config.optimizer)
    sharded, plan = shard_model(model, job.worker, job.local_batch_size, job.config.sharding, job.spec.pooling_factors)
    if job.worker.is_first:
        job.run.save_plan(plan.entries(), job.worker.world_size)
    job.say(f"plan  {line}" for line in describe_plan(plan))
    return sharded, plan


def begin_training(job: Job, model: DistributedModelParallel) -> Training:
    """The run as this job takes it up: from the beginning, on given weights, or from its checkpoint. A collective call.

    Raises:
        UserError: the checkpoint does not fit the model, or cannot be read.
    """
    job.say(f"warning: {warning}" for warning in schedule_warnings(job.config.optimizer, job.steps))
    training = Training(
        model,
        build_optimizer(model, job.config.optimizer),
        BinaryMetrics(job.worker.device, _PROGRESS_BINS),
        steps=job.steps,
        batches_per_epoch=len(job.loader),
    )
    if job.start is not None:
        restore(training, job.start.found)
    elif job.initial is not None:
        job.initial.load(model)
    return training


def train_steps(job: Job, training: Training, plan: ModelPlan, recorder: Recorder, stop: StopSignal) -> dict[str, Any]:
    """Take the steps that are left, record them, and save the run after the last one. A collective call.

    Returns:
        What the summary says of this job's steps.

    Raises:
        Interrupted: a signal asked to stop; the run is saved.
        UserError: a checkpoint or record cannot be written, a batch is bad, or a loss or gradient is not finite.
    """
    config, worker = job.config.train, job.worker
    guard = Guard(training, worker.device, config.on_non_finite, config.non_finite_limit)
    with CheckpointSaver(job.store, worker.timeout, config.keep_last, config.keep_every) as saver:
        with (
            Progress("train", job.steps, "steps", disable=not worker.is_first, done=job.first_step) as progress,
            StepTimer(training.model, worker.device, job.local_batch_size) as timer,
        ):
            report = TrainingReport(job.config, training, progress, recorder, guard, timer)
            if job.start is not None:
                report.load_state_dict(job.start.found.manifest.about["report"])
            rates = LearningRates(job.config.optimizer, training)
            describe = partial(_describe, job, plan, recorder, report)
            saved_step = job.first_step if job.goes_on else None
            checkpointing = Checkpointing(config, saver, stop, describe, saved_step, guard, timer)
            if config.on_non_finite == "rollback":
                checkpointing.begin(training)
            after_step: list[AfterStep] = [rates, report, checkpointing]
            pipelined = pipeline_pays(worker) if config.pipelined is None else config.pipelined
            while not training.is_done:
                try:
                    take_all_steps(training, job.loader, worker.device, guard, timer, after_step, pipelined=pipelined)
                except NonFinite as error:
                    if config.on_non_finite != "rollback":
                        raise
                    checkpointing.settle()
                    about = go_back(training, job.store, error, config.non_finite_limit)
                    job.loader.load_state_dict(about["data"])
                    recorder.go_back(training.step, about["records"])
                    report.go_back(training, error.finding, about["report"])
                    guard.forget()
                    rates(training)
        checkpointing.finish(training)
    return {
        **report.summary(training),
        "first_step": job.first_step,
        "checkpoints": checkpointing.saved,
        "checkpoints_failed": checkpointing.failed,
        "checkpoint_seconds": checkpointing.seconds,
    }


def _describe(
    job: Job, plan: ModelPlan, recorder: Recorder, report: TrainingReport, training: Training
) -> dict[str, Any]:
    """What a checkpoint's manifest says of the run."""
    return {
        "saved": now(),
        "versions": versions(),
        **about_ranks(training),
        "skipped": training.skipped,
        "passed_over": sorted(training.passed_over),
        "data": job.loader.state_dict(training.step),
        "records": recorder.size,
        "report": report.state_dict(),
        "identity": job.identity,
        "config": job.config.to_dict(),
        "plan": plan.entries(),
    }
