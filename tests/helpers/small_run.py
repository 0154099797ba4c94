"""The pieces of a small run, as `mlet train` builds them, for functions that run in ranks."""

from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from mlet_dist.config.config_file import Config
from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.embeddings.sharded.module import ShardedMultiLayerEmbeddingBagCollection
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.binary_metrics import BinaryMetrics
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer
from mlet_dist.training.process_group import Worker
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.state import Training

BATCHES_AN_EPOCH = 10  # of which the last has 444 rows
SETTINGS = (
    "data.batch_size=484",
    "train.epochs=3",
    "train.log_every=4",
    "optimizer.warmup_steps=5",
    "optimizer.decay=linear",
)


def this_worker() -> Worker:
    """Return this rank of the gloo process group."""
    return Worker(dist.get_rank(), dist.get_world_size(), dist.get_world_size(), torch.device("cpu"))


def training_of(config: Config, steps: int) -> tuple[Training, torch.nn.Module]:
    """Return the state of a new run, and the sharded collection within its model."""
    schema = DatasetSchema.load(Path(config.data.path))
    spec = ModelSpec.of(config, schema)
    model = build_training_model(spec, torch.device("meta"))
    fuse_row_optimizer(model, config.optimizer)
    local_batch_size = config.data.batch_size // dist.get_world_size()
    sharded, _ = shard_model(model, this_worker(), local_batch_size, config.sharding)
    (embeddings,) = (each for each in sharded.modules() if isinstance(each, ShardedMultiLayerEmbeddingBagCollection))
    optimizer, metrics = build_optimizer(sharded, config.optimizer), BinaryMetrics(this_worker().device)
    rows, batch_size = schema.rows["train"], config.data.batch_size
    batches = -(-rows // batch_size)
    training = Training(
        sharded, optimizer, metrics, steps, batches_per_epoch=batches, batch_size=batch_size, rows_per_epoch=rows
    )
    training.precision = config.train.precision
    return training, embeddings


def loader(config: Config) -> DataLoader:
    """Return this rank's batches of an epoch."""
    worker = this_worker()
    return DataLoader(
        Path(config.data.path),
        "train",
        batch_size=config.data.batch_size,
        rank=worker.rank,
        world_size=worker.world_size,
        dense_features=None,
        sparse_features=None,
    )


def local(tensor: Any) -> torch.Tensor:
    """Return a copy of this rank's part of a tensor. Only the owner rank of a table_wise table has its states."""
    if not isinstance(tensor, ShardedTensor):
        return tensor.detach().clone()
    return torch.cat([shard.tensor.detach().flatten() for shard in tensor.local_shards()] or [torch.empty(0)])
