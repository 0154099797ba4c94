"""The step of training: forward, backward and update, in a plain loop or in TorchRec's pipeline."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch.nn import functional
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from mlet_dist.data.loading.loader import Batch, DataLoader
from mlet_dist.training.guard import Finding, Guard
from mlet_dist.training.process_group import Worker
from mlet_dist.training.state import AfterStep, Training
from mlet_dist.training.timing import StepTimer


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
    """Take the steps that are left, from the loader's position on.

    Args:
        guard, timer, pipelined: as ``take_steps``.
        after_step: what is done after each step, in this order.

    Raises:
        NonFinite: a loss or gradient is not finite; the run can be taken up again from a checkpoint.
    """
    training.model.train()
    # One iterator over all epochs: whoever takes batches ahead neither stops between two nor goes beyond the last.
    batches = islice(chain.from_iterable(repeat(loader)), max(0, training.steps - training.step))
    with closing(take_steps(training, batches, device, guard, timer, pipelined=pipelined)) as outcomes:
        for outcome in outcomes:
            if not isinstance(outcome, Finding):
                training.metrics.update(*outcome)
            for done in after_step:
                done(training)


Predicted = tuple[torch.Tensor, torch.Tensor]
"""Logits and labels of a batch, each ``(b,)`` float32."""


def pipeline_pays(worker: Worker) -> bool:
    """Whether the pipeline is the faster of the two, as far as measured (``benchmarks/results``).

    On one CPU rank there is nothing to copy and nothing to exchange: the pipeline is then only longer.
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
    """Train on all batches of one iterator; yields what was predicted for each, after the optimizer's step on it.

    For a batch that was skipped it yields the reason. ``training`` counts both. Between two batches the caller may
    change learning rates: forward has not begun on the next one. Both ways train the same bits. Taken to its end or
    closed, it leaves the model as it was found, ready for evaluation or for another iterator.

    Args:
        guard: which batches train nothing.
        timer: told where the time goes.
        pipelined: TorchRec's TrainPipelineSparseDist, which takes up to two batches ahead: it copies one to the device
            and exchanges the ids of the other behind the compute of the current one.

    Raises:
        NonFinite: as ``guard.check``; the model's modules are as they were found.
    """
    step = _Step(training, guard, timer)
    return (_pipelined if pipelined else _plain)(step, timer.fetch(batches), device)


class _Step:
    """The parts of a step, as both loops call them; to TorchRec's pipeline it is the optimizer."""

    def __init__(self, training: Training, guard: Guard, timer: StepTimer) -> None:
        self.training, self.timer, self._guard = training, timer, guard

    def zero_grad(self) -> None:
        self.training.optimizer.zero_grad()

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Predicted | Finding]:
        """The loss for backward, and what the step yields."""
        with self.timer.phase("forward"):
            logits = self.training.model(batch.dense, batch.sparse).squeeze(-1)
            loss = functional.binary_cross_entropy_with_logits(logits, batch.labels)
            with self.timer.phase("exchange"):
                loss = self._guard.admit(loss)
        return loss, self._guard.refused or (logits.detach(), batch.labels)

    def step(self) -> None:
        self.timer.backward_done()
        if self._guard.refused is None:
            with self.timer.phase("update"):
                self._guard.look_at_gradients()
                self.training.optimizer.step()

    def done(self) -> None:
        """Count the step; raises NonFinite."""
        self._guard.check()
        self.training.step += 1
        self.training.skipped += self._guard.refused is not None


def _plain(step: _Step, batches: Iterator[Batch], device: torch.device) -> Generator[Predicted | Finding, None, None]:
    for batch in batches:
        step.zero_grad()
        loss, outcome = step.forward(batch.to(device))
        loss.backward()
        step.step()
        step.done()
        yield outcome


class _Pipeline(TrainPipelineSparseDist):
    """TorchRec's, which tells how long the ids that go ahead take the host."""

    def __init__(self, timer: StepTimer, *arguments: Any, **named: Any) -> None:
        self._timer = timer
        super().__init__(*arguments, **named)

    def start_sparse_data_dist(self, batch: Any, context: Any) -> None:
        with self._timer.phase("ids"):
            super().start_sparse_data_dist(batch, context)

    def wait_sparse_data_dist(self, context: Any) -> None:
        with self._timer.phase("ids"):
            super().wait_sparse_data_dist(context)


def _pipelined(
    step: _Step, batches: Iterator[Batch], device: torch.device
) -> Generator[Predicted | Finding, None, None]:
    pipeline = _Pipeline(
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
        except StopIteration:
            break
        try:
            step.done()
            yield outcome
        except BaseException:  # it came between two steps: the modules are whole
            pipeline.detach()
            raise
    pipeline.detach()
