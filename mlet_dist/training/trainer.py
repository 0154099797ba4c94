"""Training, from a config to a checkpoint and a summary."""

from contextlib import ExitStack
from datetime import timedelta
from typing import Any

from torch import distributed as dist

from mlet_dist.config.sections import Config, RowsDtype
from mlet_dist.models.dlrm import table_bytes
from mlet_dist.training.attempt import for_this_attempt
from mlet_dist.training.building import begin_training, build_model
from mlet_dist.training.evaluation import evaluate
from mlet_dist.training.job import Job, open_job
from mlet_dist.training.model_plan import ModelPlan
from mlet_dist.training.process_group import join_ranks
from mlet_dist.training.recorder import Recorder
from mlet_dist.training.signals import StopSignal
from mlet_dist.training.state import Training
from mlet_dist.training.steps import train_steps
from mlet_dist.training.weights import weights_sha256


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
