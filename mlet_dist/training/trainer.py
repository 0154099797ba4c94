"""Training, from a config to a checkpoint and a summary.

This is the file to read first. ``train`` is a whole run, ``train_steps`` its loop with everything that happens between
two steps, and ``mlet_dist/training/step.py`` is one step: forward, backward and update.
"""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import distributed as dist
from torchrec.distributed import DistributedModelParallel

from mlet_dist.checkpoint.saver import CheckpointSaver
from mlet_dist.config.config_file import Config
from mlet_dist.config.sharding_section import RowsDtype
from mlet_dist.config.validation_settings import VALIDATED
from mlet_dist.data.id_counts import overall_share
from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.errors import UserError
from mlet_dist.models.build import build_training_model, multi_layer_tables, table_bytes
from mlet_dist.models.network_check import tracing_problem
from mlet_dist.progress import Progress
from mlet_dist.training.attempts import config_of_attempt, restarts
from mlet_dist.training.checkpoint_schedule import CheckpointSchedule
from mlet_dist.training.compressed_tables import compression_summary, compression_warnings, training_bytes
from mlet_dist.training.dense_arithmetic import configure_cublas, dense_arithmetic
from mlet_dist.training.evaluation import evaluate
from mlet_dist.training.fingerprint import weights_sha256
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.garbage_collection import GarbageCollection
from mlet_dist.training.job import Job, open_job
from mlet_dist.training.label_metrics import LabelMetrics, metric_prefixes, undefined_aucs
from mlet_dist.training.metrics_endpoint import MetricsEndpoint
from mlet_dist.training.model_plan import ModelPlan, describe_plan
from mlet_dist.training.nested_loss import NestedLoss
from mlet_dist.training.non_finite_guard import Finding, Guard, NonFinite
from mlet_dist.training.process_group import join_ranks
from mlet_dist.training.reporting import Recorder, TrainingReport
from mlet_dist.training.row_move_schedule import RowMoveSchedule, kept_shares
from mlet_dist.training.schedule import LearningRates, schedule_warnings
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.signals import StopSignal
from mlet_dist.training.snapshot import manifest_fields, restore, restore_latest, roll_back, seed_random_state
from mlet_dist.training.state import AfterStep, Training
from mlet_dist.training.step import pipeline_is_faster, take_steps
from mlet_dist.training.timing import StepTimer
from mlet_dist.training.tracked_run import TrackedRun
from mlet_dist.training.trackers import Trackers, check_trackers
from mlet_dist.training.validation import Validation, validated_metrics
from mlet_dist.training.validation_state import ValidationState, better_step
from mlet_dist.training.width_metrics import is_of_width

_PROGRESS_BINS = 1 << 16


def train(config: Config) -> dict[str, Any]:
    """Train, checkpoint and evaluate; every rank makes the same call.

    Args:
        config: the resolved settings.

    Returns:
        The summary that is written into the run directory.

    Raises:
        UserError: a setting, the data set, the run directory or a checkpoint is invalid, or the loss is not finite.
        Interrupted: a signal asked the run to stop, and its state is saved.
        RanksLost: other ranks did not take part in a collective within the timeout.
    """
    config = config_of_attempt(config)
    timeout = timedelta(seconds=config.train.collective_timeout_s)
    configure_cublas(config.train)
    with join_ranks(config.train.device, timeout) as worker, ExitStack() as stack:
        if worker.is_first:
            check_trackers(config.run.trackers)
        job = stack.enter_context(open_job(config, worker))
        model, plan = build_model(job)
        job, training = begin_training(job, model)
        stop = stack.enter_context(StopSignal())
        endpoint = None
        if worker.is_first and config.train.metrics_port is not None:
            run = str(job.run.path)
            endpoint = MetricsEndpoint(config.train.metrics_port, run, job.steps, job.first_step, restarts())
        recorder = stack.enter_context(_recorder(job, endpoint))

        steps_summary = train_steps(job, training, plan, recorder, stop)
        checkpoint = str(job.store.checkpoint(training.step))
        stop.exit_immediately(checkpoint)

        summary = {"run": str(job.run.path), "steps": training.step, "checkpoint": checkpoint}
        size = training_bytes(training, worker.device)
        summary |= _evaluate(job, training, recorder) | _model_summary(job, plan) | steps_summary
        summary |= compression_summary(job.spec, config.optimizer.name, size, kept_shares(model)[0])
        hint = better_step(job.run.path, summary)
        job.log([] if hint is None else [f"{hint}; `mlet export {job.run.path} --best` takes it"])
        summary["weights_sha256"] = weights_sha256(model)
        stop.ignore()
        dist.barrier()  # a rank that a signal has ended before keeps the others from finishing the run
        if worker.is_first:
            job.run.finish(summary)
        dist.barrier()
    return summary


def _recorder(job: Job, endpoint: MetricsEndpoint | None) -> Recorder:
    """Return the recorder of a job, which on rank 0 reports to the trackers of ``run.trackers``."""
    names, worker = job.config.run.trackers, job.worker
    tracked = TrackedRun.of(job.config, job.run, worker.world_size, worker.device.type)
    return Recorder(
        job.run,
        worker.is_first,
        job.first_step,
        job.recorded_bytes,
        endpoint,
        tensorboard="tensorboard" in names,
        trackers=Trackers(names, tracked) if worker.is_first else None,
    )


def build_model(job: Job) -> tuple[DistributedModelParallel, ModelPlan]:
    """Build the model, sharded over all ranks; log and save its plan. A collective call.

    It has initial values, except for rows that ``begin_training`` restores.

    Raises:
        UserError: no plan fits, or none meets the constraints of the config.
    """
    config = job.config
    rows_dtypes = config.sharding.rows_dtypes([table.name for table in job.spec.tables])
    model = build_training_model(job.spec, torch.device("meta"), rows_dtypes)
    dense_columns = len(job.spec.dense)
    fuse_row_optimizer(model, config.optimizer)
    if job.restores_rows:
        for tables in multi_layer_tables(model).values():
            tables.leave_rows_undrawn()
    sharded, plan = shard_model(
        model,
        job.worker,
        job.local_batch_size,
        config.sharding,
        job.spec.pooling_factors,
        dense_columns,
        config.model.copies_of_rows,
    )
    if job.worker.is_first:
        job.run.save_plan(plan.entries(), job.worker.world_size)
    job.log(f"plan  {line}" for line in describe_plan(plan))
    return sharded, plan


def begin_training(job: Job, model: DistributedModelParallel) -> tuple[Job, Training]:
    """Return the state that this job starts from: initial values, given weights, or a checkpoint. A collective call.

    Returns:
        The job, which resumes from an earlier checkpoint than before if the latest one is found damaged; and the state.

    Raises:
        UserError: the checkpoint does not fit the model, or cannot be read.
    """
    warnings = schedule_warnings(job.config.optimizer, job.steps) + compression_warnings(job.spec, job.steps)
    if job.config.train.precision == "tf32" and job.worker.device.type == "cpu":
        warnings.append("train.precision is tf32, which only NVIDIA GPUs and a few CPUs have; others compute in fp32")
    job.log(f"warning: {warning}" for warning in warnings)
    every = job.config.train.validate_every
    seed_random_state(job.config.train.seed)
    training = Training(
        model,
        build_optimizer(model, job.config.optimizer),
        LabelMetrics(job.spec.labels, job.worker.device, _PROGRESS_BINS, weighted=job.loader.weighted),
        steps=job.steps,
        batches_per_epoch=len(job.loader),
        batch_size=job.config.data.batch_size,
        rows_per_epoch=job.loader.rows,
        validate_every=len(job.loader) if every == "epoch" else every,
        patience=job.config.train.patience,
        precision=job.config.train.precision,
        label_weights=job.label_weights,
        nested=NestedLoss.of(job.spec, model),
    )
    point = job.resume_point
    if point is not None and point.is_own:
        job = job.resumed_from(restore_latest(training, job.store, point.found))
    elif point is not None:
        restore(training, point.found, point.tables, continues=point.continues)
        training.validation = ValidationState()  # the best step of another run is none of this one
    elif job.initial is not None:
        job.initial.load(model)
    return job, training


def train_steps(job: Job, training: Training, plan: ModelPlan, recorder: Recorder, stop: StopSignal) -> dict[str, Any]:
    """Take the remaining steps of the run, record them, and save the run after the last one. A collective call.

    Returns:
        What the summary says about this job's steps.

    Raises:
        Interrupted: a signal asked the run to stop, and its state is saved.
        UserError: a checkpoint or record cannot be written, a batch is invalid, or a loss or gradient is not finite.
    """
    config, worker = job.config.train, job.worker
    guard = Guard(training, worker.device, config.on_non_finite, config.non_finite_limit)
    with CheckpointSaver(job.store, worker.timeout, config.keep_last, config.keep_every, recorder.saved) as saver:
        with (
            Progress("train", job.steps, "steps", disable=not worker.is_first, done=job.first_step) as progress,
            StepTimer(training.model, worker.device, job.local_batch_size) as timer,
            dense_arithmetic(config, training.model, worker.device),
            GarbageCollection() as collect_garbage,
        ):
            report = TrainingReport(job.config, training, progress, recorder, guard, timer, job.spec.labels)
            if job.resume_point is not None and job.resume_point.continues:
                report.load_state_dict(job.resume_point.found.manifest.about["report"])
            learning_rates = LearningRates(job.config.optimizer, training)
            fields = partial(manifest_fields, job, plan, recorder, report)
            saved_step = job.first_step if job.resumes else None
            checkpoints = CheckpointSchedule(config, saver, stop, fields, saved_step, guard, timer)
            if config.on_non_finite == "rollback":
                checkpoints.save_first(training)
            validation = Validation(job, guard, recorder, report, checkpoints, stop)
            validation.resume(training)
            row_moves = RowMoveSchedule(training.model, recorder, config.log_every)
            after_step: list[AfterStep] = [learning_rates, row_moves, report, validation, checkpoints, collect_garbage]
            pipelined = _is_pipelined(job, training)
            while not training.is_done:
                try:
                    take_all_steps(training, job.loader, worker.device, guard, timer, after_step, pipelined=pipelined)
                except NonFinite as error:
                    if config.on_non_finite != "rollback":
                        recorder.record("diverged", training.step, {"batch_of_step": error.finding.step})
                        raise
                    checkpoints.wait()
                    about = roll_back(training, job.store, error, config.non_finite_limit)
                    job.loader.load_state_dict(about["data"])
                    recorder.roll_back(training.step, about["records"])
                    report.roll_back(training, error.finding, about["report"])
                    guard.reset()
                    learning_rates(training)
                    validation.resume(training)
        checkpoints.save_last(training)
    return {
        **report.summary(training),
        **validation.summary(training),
        "first_step": job.first_step,
        "checkpoints": checkpoints.saved,
        "checkpoints_failed": checkpoints.failed,
        "checkpoint_seconds": checkpoints.seconds,
    }


def _is_pipelined(job: Job, training: Training) -> bool:
    """Return whether steps go through TorchRec's pipeline, which must be able to trace the network.

    Raises:
        UserError: ``train.pipelined`` is true, and it cannot.
    """
    wanted = job.config.train.pipelined
    if not (pipeline_is_faster(job.worker) if wanted is None else wanted):
        return False
    problem = None if job.config.model.builder is None else tracing_problem(training.model)
    if problem is None:
        return True
    if wanted:
        raise UserError(f"train.pipelined is true, but the network cannot be traced ({problem}); use null or false")
    then = "so that steps follow one another instead of TorchRec's pipeline"
    job.log([f"warning: the network cannot be traced ({problem}), {then}"])
    return False


def take_all_steps(
    training: Training,
    loader: DataLoader,
    device: torch.device,
    guard: Guard,
    timer: StepTimer,
    after_step: Sequence[AfterStep],
    *,
    pipelined: bool,
) -> None:
    """Take the remaining steps, starting at the loader's position.

    Args:
        guard, timer, pipelined: as in ``take_steps``.
        after_step: called after each step, in this order.

    Raises:
        NonFinite: a loss or gradient is not finite; the run can be rolled back to a checkpoint.
    """
    epochs = chain.from_iterable(repeat(loader))
    while not training.is_done:
        training.model.train()
        # One iterator over all epochs, of exactly the steps up to the next validation or the end: a pipeline that
        # fetches ahead neither pauses between two epochs nor fetches beyond the last of these steps.
        batches = islice(epochs, training.steps_to_validation)
        with closing(take_steps(training, batches, device, guard, timer, pipelined=pipelined)) as outcomes:
            for outcome in outcomes:
                if not isinstance(outcome, Finding):
                    training.metrics.update(*outcome)
                for call in after_step:
                    call(training)


def _evaluate(job: Job, training: Training, recorder: Recorder) -> dict[str, Any]:
    """Return the metrics of the splits that were not trained on. A collective call."""
    summary: dict[str, Any] = {}
    for split, loader in job.split_loaders.items():
        metrics = validated_metrics(training) if split == VALIDATED else None
        if metrics is None:
            widths = None if training.nested is None else training.nested.widths
            metrics = evaluate(training.model, loader, job.worker, split, widths)
            recorder.record(split, training.step, metrics)
        undefined = undefined_aucs(metrics, job.spec.labels, f"{job.config.data.path}: {split}")
        job.log(f"warning: {each}" for each in undefined)
        names = [f"{prefix}{name}" for prefix in metric_prefixes(job.spec.labels) for name in ("auc", "logloss")]
        names += [name for name in metrics if is_of_width(name)]
        summary |= {f"{split}_{name}": metrics[name] for name in (*names, "rows")}
        summary[f"{split}_out_of_vocabulary"] = overall_share(job.id_counts, split)
    return summary


def _model_summary(job: Job, plan: ModelPlan) -> dict[str, Any]:
    """Return the bytes of the tables in training and in serving, and what the run was trained on."""
    stored: dict[str, RowsDtype] = job.config.sharding.rows_dtypes([table.name for table in job.spec.tables])
    stored |= {name: "fp16" if cost.row_bytes == 2 else "fp32" for name, (cost, _) in plan.tables.items()}
    trained, served = table_bytes(job.spec, stored)
    return {
        "trained_table_bytes": trained,
        "served_table_bytes": served,
        "world_size": job.worker.world_size,
        "device": job.worker.device.type,
    }
