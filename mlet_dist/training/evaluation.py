"""Predictions and metrics over a split, every row exactly once."""

from collections.abc import Iterator

import torch
from torch import nn

from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.data.location import DataPath
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.models.spec import ModelSpec
from mlet_dist.progress import Progress
from mlet_dist.training.metrics import BinaryMetrics
from mlet_dist.training.process_group import Worker


def evaluation_loader(path: DataPath, split: str, spec: ModelSpec, batch_size: int, worker: Worker) -> DataLoader:
    """A loader of every row of a split, in batches no larger than it, rounded up to a multiple of the ranks."""
    batch_size = max(1, min(batch_size, DatasetSchema.load(path).rows.get(split, batch_size)))
    return DataLoader(
        path,
        split,
        batch_size=-(-batch_size // worker.world_size) * worker.world_size,
        rank=worker.rank,
        world_size=worker.world_size,
        dense_features=spec.dense,
        sparse_features=[feature.name for feature in spec.sparse],
        drop_last=False,
        pin_memory=worker.device.type == "cuda",
    )


@torch.no_grad()
def predict(model: nn.Module, loader: DataLoader, worker: Worker) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and labels, each ``(rows,)`` float32, batch by batch; padding is left out.

    Every rank must take all batches: the model's exchange is collective.
    """
    model.eval()
    for batch in loader:
        batch = batch.to(worker.device)
        logits = model(batch.dense, batch.sparse).squeeze(-1)
        yield logits[: batch.num_rows], batch.labels[: batch.num_rows]


def evaluate(model: nn.Module, loader: DataLoader, worker: Worker, description: str) -> dict[str, float]:
    """``auc``, ``logloss``, ``rows`` and ``positive_rate`` of a model over a loader's rows, on all ranks."""
    metrics = BinaryMetrics(worker.device)
    with Progress(f"evaluate {description}", len(loader), "batches", disable=not worker.is_first) as progress:
        for logits, labels in predict(model, loader, worker):
            metrics.update(logits, labels)
            progress.update(1)
    return metrics.compute()
