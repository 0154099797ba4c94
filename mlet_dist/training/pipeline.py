"""The step of training (forward, backward, update), plainly or with the next batch's ids already on their way."""

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch.nn import functional
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import CombinedOptimizer

from mlet_dist.data.loader import Batch
from mlet_dist.training.distributed import Worker

Predicted = tuple[torch.Tensor, torch.Tensor]
"""Logits and labels of a batch, each ``(b,)`` float32."""


def pipeline_pays(worker: Worker) -> bool:
    """Whether the pipeline is the faster of the two, as far as measured (``benchmarks/results``).

    On one CPU rank there is nothing to copy and nothing to exchange: the pipeline is then only longer.
    """
    return worker.device.type == "cuda" or worker.world_size > 1


def take_steps(
    model: DistributedModelParallel,
    optimizer: CombinedOptimizer,
    batches: Iterator[Batch],
    device: torch.device,
    *,
    pipelined: bool,
) -> Iterator[Predicted]:
    """Train on all batches of one iterator; yields what was predicted for each, after the optimizer's step on it.

    Between two batches the caller may change learning rates: forward has not begun on the next one. Both ways train the
    same bits. Taken to its end, it leaves the model as it was found, ready for evaluation.

    Args:
        pipelined: TorchRec's TrainPipelineSparseDist, which takes up to two batches ahead: it copies one to the device
            and exchanges the ids of the other behind the compute of the current one.
    """
    return (_pipelined if pipelined else _plain)(model, optimizer, batches, device)


def _plain(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, batches: Iterator[Batch], device: torch.device
) -> Iterator[Predicted]:
    for batch in batches:
        optimizer.zero_grad()
        loss, predicted = _forward(model, batch.to(device))
        loss.backward()
        optimizer.step()
        yield predicted


def _pipelined(
    model: DistributedModelParallel, optimizer: CombinedOptimizer, batches: Iterator[Batch], device: torch.device
) -> Iterator[Predicted]:
    pipeline = TrainPipelineSparseDist(
        model,
        optimizer,
        device,
        custom_model_fwd=lambda batch: _forward(model, batch),
        # The host waits for the loader while the device is busy with the forward pass, not before it.
        enqueue_batch_after_forward=True,
    )
    with suppress(StopIteration):
        while True:
            yield pipeline.progress(batches)
    pipeline.detach()


def _forward(model: DistributedModelParallel, batch: Batch) -> tuple[torch.Tensor, Predicted]:
    logits = model(batch.dense, batch.sparse).squeeze(-1)
    loss = functional.binary_cross_entropy_with_logits(logits, batch.labels)
    return loss, (logits.detach(), batch.labels)
