"""What a step cannot do without: its products, and the bytes of rows that it must read and write."""

import statistics
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch

from mlet_dist.data.loading.loader import Batch
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.process_group import Worker

_FLOAT_BYTES = 4
_REPEATS = 7


def floor(spec: ModelSpec, batch: Batch, worker: Worker, *, adagrad: bool) -> dict[str, Any]:
    """Return what one rank's step of a multi-layer model needs at least, if the tables are spread evenly.

    Returns:
        ``flops``: of the products of the dense layers and of W2, forward and backward; W2 is applied to each distinct
        id of the rank's batch once. ``row_bytes``: rows of W1 read in forward, and read and written in the update,
        with Adagrad's sums. ``products_ms``: the measured time of these products alone, with this process's threads.
    """
    shapes = list(_products(spec, batch))
    distinct = sum(len(ids.unique()) for ids in _ids(batch))
    width = spec.model.hidden_dim or spec.model.embedding_dim
    passes = 5 if adagrad else 3
    return {
        "flops": sum(3 * 2 * rows * inner * outer for rows, inner, outer in shapes),
        "row_bytes": passes * distinct * width * _FLOAT_BYTES,
        "products_ms": _products_ms(shapes, worker.device),
    }


def _products(spec: ModelSpec, batch: Batch) -> Iterator[tuple[int, int, int]]:
    """Yield rows, inner and outer size of each product of forward; backward has two more of the same size."""
    model, rows = spec.model, len(batch.dense)
    features = len(spec.sparse)
    interactions = model.embedding_dim + (features + 1) * features // 2
    bottom = [len(spec.dense), *model.bottom_mlp, model.embedding_dim]
    top = [interactions, *model.top_mlp, 1]
    for sizes in (bottom, top):
        yield from ((rows, inner, outer) for inner, outer in pairwise(sizes))
    if model.hidden_dim:
        yield from ((len(ids.unique()), model.hidden_dim, model.embedding_dim) for ids in _ids(batch))


def _ids(batch: Batch) -> list[torch.Tensor]:
    keys = batch.sparse.keys()
    return [batch.sparse[key].values() for key in keys]


def _products_ms(shapes: list[tuple[int, int, int]], device: torch.device) -> float:
    operands = [
        tuple(torch.randn(size, device=device) for size in ((rows, inner), (inner, outer), (rows, outer)))
        for rows, inner, outer in shapes
    ]
    times = []
    for _ in range(_REPEATS):
        synchronize(device)
        started = time.perf_counter()
        for inputs, weight, gradient in operands:
            torch.mm(inputs, weight)
            torch.mm(gradient, weight.t())
            torch.mm(inputs.t(), gradient)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


def synchronize(device: torch.device) -> None:
    """Wait for the device, if it works asynchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
