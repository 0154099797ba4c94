"""Measures what one rank's device and host do by themselves, while all ranks work."""

import time
from collections.abc import Callable

import torch

from mlet_dist.cluster.collective_rates import median_of_ranks, synchronize
from mlet_dist.training.process_group import Worker

_ROWS, _WIDTH, _BATCH = 1 << 17, 64, {"cpu": 1 << 11, "cuda": 1 << 16}  # as many as a table has in a batch
_PRODUCT_ROWS, _INPUTS, _OUTPUTS = 512, 512, 256
_IDS = 1 << 16
_SMALL_OPERATIONS = 200
_SECONDS = 0.4  # of each measurement


def measure_device(worker: Worker) -> tuple[float, float, float, float]:
    """Measure a rank's rates; they are medians over all ranks. A collective call.

    Returns:
        Bytes of rows, operations of matrix products and ids, each per second, and the seconds of a small operation.
    """
    moved, operations, small = _rows(worker.device), _products(worker.device), _small(worker.device)
    rates = [moved[0] / _seconds(moved[1], worker), operations[0] / _seconds(operations[1], worker)]
    found, ids = _ids(worker.device)
    values = [*rates, found / _seconds(ids, worker), _seconds(small, worker) / _SMALL_OPERATIONS]
    memory, flops, per_second, launch = median_of_ranks(values, worker)
    return memory, flops, per_second, launch


def _seconds(work: Callable[[], object], worker: Worker) -> float:
    work()
    synchronize(worker.device)
    started, count = time.perf_counter(), 0
    # The mean and not the median: ranks that share cores take turns, and each one often works without a pause.
    while (elapsed := time.perf_counter() - started) < _SECONDS or not count:
        work()
        synchronize(worker.device)
        count += 1
    return elapsed / count


def _rows(device: torch.device) -> tuple[float, Callable[[], object]]:
    """Gather rows, compute on them and add to them, each into new memory, as lookups, activations and updates do."""
    rows = torch.zeros(_ROWS, _WIDTH, device=device)
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(_ROWS, (_BATCH[device.type],), generator=generator).to(device)

    def work() -> None:
        rows.index_add_(0, index, rows.index_select(0, index) * 0.5)

    return 4.0 * len(index) * _WIDTH * 7, work  # two passes, two and three


def _products(device: torch.device) -> tuple[float, Callable[[], object]]:
    """Multiply a batch by a layer's weights, and compute both gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((_PRODUCT_ROWS, _INPUTS), (_INPUTS, _OUTPUTS), (_PRODUCT_ROWS, _OUTPUTS))
    batch, weights, gradient = (torch.randn(*shape, generator=generator).to(device) for shape in shapes)

    def work() -> None:
        batch @ weights, gradient @ weights.t(), batch.t() @ gradient

    return 6.0 * _PRODUCT_ROWS * _INPUTS * _OUTPUTS, work


def _ids(device: torch.device) -> tuple[float, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    # The squares of uniform numbers repeat small ids, as real ids do.
    ids = (torch.rand(_IDS, generator=generator).square() * 1e6).long().to(device)
    return float(_IDS), lambda: torch.unique(ids, return_inverse=True)


def _small(device: torch.device) -> Callable[[], object]:
    tensor = torch.zeros(8, device=device)

    def work() -> None:
        for _ in range(_SMALL_OPERATIONS):
            tensor.add_(1.0)

    return work
