"""Validation between two steps: the metrics of the split ``valid``, the best step so far, and when a run stops early.

All ranks evaluate together, and decide by the numbers of rank 0. Weights, optimizer states and batches are as if there
had been no validation: the iterator that steps are taken from ends where one is due, so that the pipeline is empty.
"""

import time
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from mlet_dist.checkpoint.long_work import collective_device
from mlet_dist.config.validation_settings import VALIDATED, metrics_to_choose_by
from mlet_dist.embeddings.sharded.collectives import AsyncAllReduceMax
from mlet_dist.models.nested_widths import NestedWidths
from mlet_dist.progress import Progress
from mlet_dist.training.checkpoint_schedule import CheckpointSchedule
from mlet_dist.training.dense_arithmetic import evaluation_arithmetic
from mlet_dist.training.evaluation import predict_at_widths
from mlet_dist.training.job import Job
from mlet_dist.training.label_metrics import metric_prefixes
from mlet_dist.training.non_finite_guard import Guard
from mlet_dist.training.reporting import Recorder, TrainingReport, shown_metric
from mlet_dist.training.signals import StopSignal
from mlet_dist.training.state import Training
from mlet_dist.training.width_metrics import WidthMetrics

VALIDATED_PART = "valid_part"
"""The split in the records of validations that measure a share of the rows."""


class Validation:
    """Validates where it is due; does nothing if ``train.validate_every`` is null.

    Args:
        job: this job of the run.
        guard: flushed before weights are measured.
        recorder: metrics.jsonl and TensorBoard.
        report: shows the results; the time that validation takes is left out of its rates.
        checkpoints: saves the weights of the best validation, and the run if a signal stops it.
        stop: the signal that asks the run to stop, if one came.

    Attributes:
        seconds: the time that training has waited for validations.
    """

    def __init__(
        self,
        job: Job,
        guard: Guard,
        recorder: Recorder,
        report: TrainingReport,
        checkpoints: CheckpointSchedule,
        stop: StopSignal,
    ) -> None:
        self._job, self._guard, self._recorder, self._report = job, guard, recorder, report
        self._checkpoints, self._stop = checkpoints, stop
        self._share, best = job.config.train.validation_share, job.config.train.keep_best
        self._metric = None if best is None else metrics_to_choose_by(job.spec.labels)[best]
        self.seconds = 0.0

    def resume(self, training: Training) -> None:
        """Go on from the state that ``training`` was restored to, and validate if its step has not been validated.

        Called before the first step and after a rollback.

        Raises:
            Interrupted: as for a call.
        """
        forgotten = training.validation.choose_by(self._metric, self._share)
        if forgotten is not None:
            self._report.log(
                f"warning: step {forgotten:,} was the best so far by another train.keep_best or "
                "train.validation_share; the best step is chosen anew"
            )
        training.optimizer.zero_grad()  # what is left of a step that was rolled back is not finite
        self(training)

    def __call__(self, training: Training) -> None:
        """Validate if it is due; called after each step, before the run is saved. A collective call.

        Raises:
            Interrupted: a signal asked some rank to stop; the run is saved, and validates when it is resumed.
            NonFinite: a loss or gradient is not finite; nothing is measured.
            UserError: the results or a checkpoint cannot be written, or the data cannot be read.
        """
        if not training.needs_validation or self._job.validation_loader is None:
            return
        self._guard.flush()
        started = time.monotonic()
        widths = None if training.nested is None else training.nested.widths
        metrics, signal = self._measure(training.model, widths)
        if signal:
            self._checkpoints.stop(training, signal)
        is_best = training.validation.note(training.step, metrics)
        seconds = time.monotonic() - started
        self.seconds += seconds
        self._report.exclude(seconds)
        self._record(training, metrics)
        if is_best:
            self._checkpoints.save_best(training)

    def summary(self, training: Training) -> dict[str, Any]:
        """Return what the run's summary says about validations."""
        if self._job.validation_loader is None:
            return {}
        found: dict[str, Any] = {"validation_seconds": self.seconds}
        state = training.validation
        if state.metric is not None:
            best = None if state.best_step is None else str(self._job.store.checkpoint(state.best_step))
            found |= {
                "best_step": state.best_step,
                "best_metric": f"{self._split} {state.metric}",
                "best_value": state.best_value,
                "best_checkpoint": best,
                "last_is_best": state.best_step == training.step,
                "stopped_early": training.stops_early,
            }
        return found

    @property
    def _split(self) -> str:
        return VALIDATED if self._share == 1 else VALIDATED_PART

    def _measure(self, model: nn.Module, widths: NestedWidths | None) -> tuple[dict[str, float], int]:
        """Return the metrics and 0; or as soon as a signal has come to some rank, nothing and its number."""
        loader, worker = self._job.validation_loader, self._job.worker
        assert loader is not None
        metrics = WidthMetrics(loader.labels, worker.device, widths, weighted=loader.weighted)
        asked: AsyncAllReduceMax | None = None
        with (
            evaluation_arithmetic(model),
            Progress("validate", len(loader), "batches", disable=not worker.is_first) as progress,
            closing(predict_at_widths(model, loader, worker, widths)) as batches,
        ):
            for predicted in batches:
                if asked is not None and (signal := asked.read()[0]):
                    return {}, signal
                asked = AsyncAllReduceMax(torch.tensor([self._stop.number], device=worker.device), None)
                metrics.update(predicted)
                progress.update(1)
        if asked is not None:
            asked.read()  # a signal of the last batch is found after the next step
        return _of_first_rank(metrics.compute()), 0

    def _record(self, training: Training, metrics: Mapping[str, float]) -> None:
        state, best = training.validation, {}
        prefixes = metric_prefixes(self._job.spec.labels)
        found = [
            f"{prefix.replace('_', ' ') if prefix else ''}AUC {shown_metric(metrics[f'{prefix}auc'])}, "
            f"LogLoss {shown_metric(metrics[f'{prefix}logloss'])}"
            for prefix in prefixes
        ]
        shown = f"step {training.step:,}: {self._split} {'; '.join(found)}"
        if state.metric is not None:
            best = {"worse_in_a_row": state.worse}
            if state.best_step is not None:
                best["best_step"] = state.best_step
                is_best = state.best_step == training.step
                shown += ", the best so far" if is_best else f"; the best was step {state.best_step:,}"
        self._recorder.record(self._split, training.step, {**metrics, **best})
        self._report.log(shown)
        if training.stops_early and training.step < training.steps:
            self._report.log(
                f"{state.worse} validations in a row were not better than that of the best step: training stops after "
                f"step {training.step:,} of {training.steps:,} (train.patience)"
            )


def validated_metrics(training: Training) -> dict[str, float] | None:
    """Return the metrics of all rows of ``valid`` with the current weights, if the last validation measured them."""
    state = training.validation
    is_current = training.validate_every is not None and state.step == training.step and state.share == 1
    return dict(state.metrics) if is_current and state.metrics else None


def _of_first_rank(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of rank 0 on every rank: sums may be rounded differently on hosts of other kinds."""
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=collective_device())
    dist.broadcast(values, src=0)
    found: dict[str, float] = dict(zip(metrics, values.tolist(), strict=True))
    return {name: int(value) if name.endswith("rows") else value for name, value in found.items()}
