"""The steps of a job, with all that is done between them: records, checkpoints, going back."""

from functools import partial
from typing import Any

from mlet_dist.checkpoint.saver import CheckpointSaver
from mlet_dist.progress import Progress
from mlet_dist.training.checkpoint_schedule import Checkpointing
from mlet_dist.training.guard import Guard, NonFinite
from mlet_dist.training.job import Job
from mlet_dist.training.loop import take_all_steps
from mlet_dist.training.model_plan import ModelPlan
from mlet_dist.training.recorder import Recorder
from mlet_dist.training.reporting import TrainingReport
from mlet_dist.training.rollback import go_back
from mlet_dist.training.schedule import LearningRates
from mlet_dist.training.signals import StopSignal
from mlet_dist.training.snapshot import about_ranks, now, versions
from mlet_dist.training.state import AfterStep, Training
from mlet_dist.training.step import pipeline_pays
from mlet_dist.training.timing import StepTimer


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
