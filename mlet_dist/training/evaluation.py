"""Predictions and metrics of a split, every row exactly once, in bounded memory."""

import math
from collections.abc import Generator

import torch
from torch import distributed as dist
from torch import nn

from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.data.location import DataPath
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.models.nested_widths import NestedWidths
from mlet_dist.models.spec import ModelSpec
from mlet_dist.progress import Progress
from mlet_dist.training.label_metrics import by_row
from mlet_dist.training.process_group import Worker
from mlet_dist.training.width_metrics import Predicted, WidthMetrics


def evaluation_loader(
    path: DataPath, split: str, spec: ModelSpec, batch_size: int, worker: Worker, share: float = 1.0
) -> DataLoader:
    """Return a loader of every row of a split; a batch is at most the split, rounded up to a multiple of the ranks.

    With a ``share``, it is that share of the rows, from the beginning of the split and at least one. Ids of a
    vocabulary that has grown since the model was trained are out of its vocabulary: they become id 0.
    """
    schema = DatasetSchema.load(path)
    all_rows = schema.rows.get(split, batch_size)
    rows = max(1, math.ceil(share * all_rows))
    batch_size = max(1, min(batch_size, rows))
    return DataLoader(
        path,
        split,
        batch_size=-(-batch_size // worker.world_size) * worker.world_size,
        rank=worker.rank,
        world_size=worker.world_size,
        dense_features=spec.dense,
        sparse_features=[feature.name for feature in spec.sparse],
        known_ids=spec.known_ids(schema),
        pin_memory=worker.device.type == "cuda",
        first_rows=None if share == 1 else rows,
    )


def count_first_ids(loader: DataLoader, worker: Worker) -> dict[str, int]:
    """Return how often each feature has id 0 in a loader's rows, over all ranks. A collective call."""
    names: list[str] = []
    counts = torch.zeros(0, dtype=torch.int64)
    for batch in loader:
        names = batch.sparse.keys()
        of_features = batch.sparse.values().split(batch.sparse.length_per_key())
        own = torch.stack([(ids == 0).sum() for ids in of_features])
        counts = counts + own if len(counts) else own
    counts = counts.to(worker.device)
    dist.all_reduce(counts)
    return dict(zip(names, counts.tolist(), strict=True))


@torch.no_grad()
def predict(
    model: nn.Module, loader: DataLoader, worker: Worker
) -> Generator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], None, None]:
    """Yield logits, labels and weights (or None) of each batch, each ``(rows,)`` float32, without padding.

    With several labels, logits and labels are ``(rows, L)``, and a label that a row lacks is NaN.

    Every rank must take all batches, since the model's exchange is collective.
    """
    for (predicted,) in predict_at_widths(model, loader, worker, None):
        yield predicted


@torch.no_grad()
def predict_at_widths(
    model: nn.Module, loader: DataLoader, worker: Worker, widths: NestedWidths | None
) -> Generator[list[Predicted], None, None]:
    """Yield for each batch what ``predict`` does, at each of a model's widths; without ``widths`` once."""
    model.eval()
    for batch in loader:
        batch = batch.to(worker.device)
        if widths is None:
            found = [model(batch.dense, batch.sparse)]
        else:
            found = widths.at_all(model, batch.dense, batch.sparse)
        yield [batch.predicted(by_row(logits, len(loader.labels))) for logits in found]


def evaluate(
    model: nn.Module, loader: DataLoader, worker: Worker, description: str, widths: NestedWidths | None = None
) -> dict[str, float]:
    """Return the metrics of ``WidthMetrics`` over a loader's rows. A collective call."""
    metrics = WidthMetrics(loader.labels, worker.device, widths, weighted=loader.weighted)
    with Progress(f"evaluate {description}", len(loader), "batches", disable=not worker.is_first) as progress:
        for predicted in predict_at_widths(model, loader, worker, widths):
            metrics.update(predicted)
            progress.update(1)
    return metrics.compute()
