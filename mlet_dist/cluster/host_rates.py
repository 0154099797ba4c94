"""Measures the host's own work in a step: steps of training with almost no rows, with few tables and with many."""

import statistics
import time
from collections.abc import Iterator
from itertools import islice, repeat

import torch
from torch import distributed as dist
from torchrec import KeyedJaggedTensor

from mlet_dist.cluster.collective_rates import median_of_ranks, synchronize
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.config.sharding_section import ShardingConfig
from mlet_dist.data.loading.loader import Batch
from mlet_dist.data.schema import SparseFeature
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.binary_metrics import BinaryMetrics
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.non_finite_guard import Finding, Guard
from mlet_dist.training.process_group import Worker
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.state import Training
from mlet_dist.training.step import Predicted, pipeline_is_faster, take_steps
from mlet_dist.training.timing import StepTimer

FEW_TABLES, MANY_TABLES = 2, 26
_BATCH, _ROWS = 4, 4096
_ROUNDS, _STEPS, _NOT_TIMED = 5, 8, 6


def measure_host(worker: Worker) -> tuple[float, float]:
    """Return the seconds of a tiny step with ``FEW_TABLES`` and with ``MANY_TABLES``. A collective call.

    Tables are row_wise with several ranks, as large tables are. The latency of collectives is part of the seconds.
    """
    runs = [_training(worker, tables) for tables in (FEW_TABLES, MANY_TABLES)]
    times: list[list[float]] = [[] for _ in runs]
    for run in runs:
        for _ in islice(run, _NOT_TIMED):
            pass
    for _ in range(_ROUNDS):
        for run, own in zip(runs, times, strict=True):
            dist.barrier()
            started = time.perf_counter()
            for _ in islice(run, _STEPS):
                pass
            synchronize(worker.device)
            own.append((time.perf_counter() - started) / _STEPS)
    for run in runs:
        run.close()  # type: ignore[attr-defined]
    few, many = median_of_ranks([statistics.median(own) for own in times], worker)
    return few, many


def _training(worker: Worker, tables: int) -> Iterator[Predicted | Finding]:
    layers = ModelConfig(embedding_dim=4, hidden_dim=8, bottom_mlp=(8, 8), top_mlp=(8, 8))
    features = tuple(SparseFeature(f"C{index}", _ROWS) for index in range(tables))
    model = build_training_model(ModelSpec(layers, ("I1",), features, seed=0), torch.device("meta"))
    config = OptimizerConfig(learning_rate=0.01)
    fuse_row_optimizer(model, config)
    sharding = ShardingConfig(data_parallel_up_to_mb=0)
    sharded, _ = shard_model(model, worker, _BATCH, sharding)
    sharded.train()
    optimizer = build_optimizer(sharded, config)
    metrics = BinaryMetrics(worker.device)
    training = Training(sharded, optimizer, metrics, steps=1, batches_per_epoch=1, batch_size=1, rows_per_epoch=1)
    guard, timer = Guard(training, worker.device, "stop", 0), StepTimer(sharded, worker.device, _BATCH)
    batches = repeat(_batch(worker, [feature.name for feature in features]))
    return take_steps(training, batches, worker.device, guard, timer, pipelined=pipeline_is_faster(worker))


def _batch(worker: Worker, names: list[str]) -> Batch:
    generator = torch.Generator().manual_seed(worker.rank)
    ids = torch.randint(_ROWS, (_BATCH * len(names),), generator=generator)
    sparse = KeyedJaggedTensor(
        names,
        ids,
        lengths=torch.ones(len(ids), dtype=torch.int64),
        stride=_BATCH,
        length_per_key=[_BATCH] * len(names),
        offset_per_key=[_BATCH * index for index in range(len(names) + 1)],
    )
    dense, labels = torch.rand(_BATCH, 1, generator=generator), torch.zeros(_BATCH)
    batch = Batch(dense, sparse, labels, _BATCH, _BATCH * worker.world_size)
    return batch.pin_memory() if worker.device.type == "cuda" else batch
