"""One step of training: forward, backward and update, in a plain loop or in TorchRec's pipeline.

``TrainStep`` holds the parts of a step. Two loops drive it, ``_plain_steps`` and ``_pipelined_steps``, and both train
bitwise identical weights: zero_grad, forward, backward, optimizer step, in this order. fbgemm's fused kernels update W1
inside backward (``fused_optimizers.fuse_row_optimizer``); the optimizer step updates W2 and the dense layers.
"""

from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch
from torch import distributed as dist
from torch.nn import functional
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.sparse.jagged_tensor import _pin_and_move

from mlet_dist.data.loading.loader import Batch
from mlet_dist.training.dense_arithmetic import forward_precision
from mlet_dist.training.label_metrics import by_row
from mlet_dist.training.non_finite_guard import Finding, Guard
from mlet_dist.training.process_group import Worker
from mlet_dist.training.replicated_gradients import ReplicatedGradients
from mlet_dist.training.state import Training
from mlet_dist.training.timing import StepTimer

Predicted = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Logits, labels and weights of a batch, each ``(rows,)`` float32, without padding; no weights if all are the same.

With several labels, logits and labels are ``(rows, L)``, and a label that a row lacks is NaN.
"""


def pipeline_is_faster(worker: Worker) -> bool:
    """Return whether the pipeline is faster than the plain loop, as measured in ``benchmarks/results``.

    On a single CPU rank there is nothing to copy and nothing to exchange, so the pipeline only adds work.
    """
    return worker.device.type == "cuda" or worker.world_size > 1


def take_steps(
    training: Training,
    batches: Iterator[Batch],
    device: torch.device,
    guard: Guard,
    timer: StepTimer,
    *,
    pipelined: bool,
) -> Generator[Predicted | Finding, None, None]:
    """Train on every batch of one iterator, and yield after each step what was predicted for its batch.

    For a skipped batch it yields the reason instead. ``training`` counts both. Between two steps the caller may change
    learning rates, since forward of the next batch has not begun. After the last batch, and when it is closed, the
    model is as it was before, ready for evaluation or for another iterator.

    Args:
        guard: decides which batches are skipped.
        timer: measures the parts of the step.
        pipelined: whether to use TorchRec's TrainPipelineSparseDist, which works up to two batches ahead: while batch i
            is computed, the ids of batch i+1 are exchanged and batch i+2 is copied to the device.

    Raises:
        NonFinite: as in ``guard.check``; the model's modules are as they were before.
    """
    step = TrainStep(training, guard, timer)
    return (_pipelined_steps if pipelined else _plain_steps)(step, timer.fetch(batches), device)


def mean_loss(
    logits: torch.Tensor, batch: Batch, complete_rows: int, label_weights: Sequence[float] = (1.0,)
) -> torch.Tensor:
    """Return this rank's part of the mean loss over the global batch: the mean of all ranks' parts is that mean.

    Gradients are averaged over ranks. Padding rows have no loss, so a rank without rows returns 0. An incomplete batch
    counts by its share of a complete one, so that all rows of an epoch weigh the same: with Adagrad at rate 0.01, the
    mean over the 15 rows of a last batch was a step that cost 0.001 of LogLoss.

    Where rows have weights, the mean is the sum of weight times loss divided by the sum of weights, over all ranks; 0
    if all weights of the global batch are 0. The ranks then add up their weights, a collective call.

    With several labels it is the sum of the means of each label, times its factor. The mean of a label is that over the
    rows that have the label, over all ranks.

    Args:
        logits: ``(b,)`` float32; with several labels ``(b, L)``.
        batch: the rank's rows, b with padding.
        complete_rows: the rows of a complete global batch.
        label_weights: the factor of each label's loss.
    """
    if batch.labels.dim() > 1:
        return _sum_of_means(logits, batch, complete_rows, label_weights)
    rows, slots = batch.num_rows, len(logits) * dist.get_world_size()
    if batch.weights is not None:
        losses = functional.binary_cross_entropy_with_logits(logits[:rows], batch.labels[:rows], reduction="none")
        weights = batch.weights[:rows].double()
        total = weights.sum()
        dist.all_reduce(total)
        # The shares are at most 1, so that neither they nor the gradient overflow, however small or large the sum is.
        shares = (weights / torch.where(total > 0, total, 1.0)).float()
        return (losses * shares).sum() * (dist.get_world_size() * batch.global_rows / complete_rows)
    if batch.global_rows == slots:
        return functional.binary_cross_entropy_with_logits(logits, batch.labels)
    total = functional.binary_cross_entropy_with_logits(logits[:rows], batch.labels[:rows], reduction="sum")
    return total * (dist.get_world_size() / complete_rows)


def _sum_of_means(
    logits: torch.Tensor, batch: Batch, complete_rows: int, label_weights: Sequence[float]
) -> torch.Tensor:
    labels = batch.labels[: batch.num_rows]
    losses = functional.binary_cross_entropy_with_logits(
        logits[: batch.num_rows], labels.nan_to_num(), reduction="none"
    )
    weights = (~labels.isnan()).double()
    if batch.weights is not None:
        weights = weights * batch.weights[: batch.num_rows, None].double()
    totals = weights.sum(dim=0)
    dist.all_reduce(totals)
    factors = _pin_and_move(torch.tensor(label_weights, dtype=torch.float64), logits.device)
    shares = (weights / torch.where(totals > 0, totals, 1.0) * factors).float()
    return (losses * shares).sum() * (dist.get_world_size() * batch.global_rows / complete_rows)


class TrainStep:
    """The parts of one step, called by both loops. TorchRec's pipeline takes this object as its optimizer."""

    def __init__(self, training: Training, guard: Guard, timer: StepTimer) -> None:
        self.training, self.timer, self._guard = training, timer, guard
        self._gradients = ReplicatedGradients(training.model)

    def zero_grad(self) -> None:
        self.training.optimizer.zero_grad()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Predicted | Finding]:
        """Return the loss for backward, and what the step yields."""
        self.training.batch = batch
        with self.timer.phase("forward"):
            with forward_precision(self.training.precision, batch.dense.device):
                found = self._logits(batch)
            of_labels = self.training.label_weights
            logits = [by_row(each, len(of_labels)).float() for each in found]
            losses = [mean_loss(each, batch, self.training.complete_rows, of_labels) for each in logits]
            loss = losses[0] if len(losses) == 1 else torch.stack(losses).mean()
            with self.timer.phase("exchange"):
                loss = self._guard.check_loss(loss)
        return loss, self._guard.skip_reason or batch.predicted(logits[0].detach())

    def _logits(self, batch: Batch) -> list[torch.Tensor]:
        """Return the logits of the model; of one that is trained at several widths, those of each, d first."""
        training = self.training
        if training.nested is None:
            return [training.model(batch.dense, batch.sparse)]
        return training.nested.logits(training.model, batch.dense, batch.sparse, training.step)

    def step(self) -> None:
        """Update W2, the dense layers and rows without a fused kernel, unless the batch is skipped."""
        if self._guard.skip_reason is None:
            self._gradients.combine()
        self.timer.end_backward()
        if self._guard.skip_reason is None:
            with self.timer.phase("update"):
                self._guard.check_gradients()
                self.training.optimizer.step()

    def finish(self) -> None:
        """Count the step; raises NonFinite."""
        self._guard.check()
        self.training.step += 1
        self.training.skipped += self._guard.skip_reason is not None


def _plain_steps(
    step: TrainStep, batches: Iterator[Batch], device: torch.device
) -> Generator[Predicted | Finding, None, None]:
    for batch in batches:
        step.zero_grad()
        loss, outcome = step.forward(batch.to(device))
        loss.backward()
        del loss  # or the graph lives until the next loss is there, with what it has saved
        step.step()
        step.finish()
        yield outcome


def _pipelined_steps(
    step: TrainStep, batches: Iterator[Batch], device: torch.device
) -> Generator[Predicted | Finding, None, None]:
    pipeline = _TimedPipeline(
        step.timer,
        step.training.model,
        step,
        device,
        custom_model_fwd=step.forward,
        # The host waits for the loader while the device is busy with the forward pass, not before it.
        enqueue_batch_after_forward=True,
    )
    while True:
        try:
            outcome = pipeline.progress(batches)
        except StopIteration:  # there was no batch
            pipeline.detach()
            return
        try:
            step.finish()
            if not pipeline.batches:
                break
            yield outcome
        except BaseException:  # raised between two steps, when the modules can be restored
            pipeline.detach()
            raise
    pipeline.detach()  # before the last step is yielded, after which the caller may evaluate the model
    yield outcome


class _TimedPipeline(TrainPipelineSparseDist):
    """TorchRec's pipeline, with the host's time for exchanging the next batch's ids measured."""

    def __init__(self, timer: StepTimer, *arguments: Any, **named: Any) -> None:
        self._timer = timer
        super().__init__(*arguments, **named)

    def start_sparse_data_dist(self, batch: Any, context: Any) -> None:
        with self._timer.phase("ids", self._data_dist_stream):
            super().start_sparse_data_dist(batch, context)

    def wait_sparse_data_dist(self, context: Any) -> None:
        with self._timer.phase("ids", self._data_dist_stream):
            super().wait_sparse_data_dist(context)
