"""Tables that plain TorchRec shards column_wise, row_wise and table_wise, saved from ranks."""

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import (
    column_wise,
    construct_module_sharding_plan,
    row_wise,
    table_wise,
)
from torchrec.distributed.types import ShardingPlan

ROWS, COLUMNS = 51, 8


def table(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(ord(name[-1]))
    return torch.randn(ROWS, COLUMNS, generator=generator)


class _AnyShardings(EmbeddingBagCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["column_wise", "row_wise", "table_wise"]


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        configs = [
            EmbeddingBagConfig(name=name, num_embeddings=ROWS, embedding_dim=COLUMNS, feature_names=[name])
            for name in ("by_columns", "by_rows", "on_one_rank")
        ]
        self.tables = EmbeddingBagCollection(configs, device=torch.device("meta"))


def save(path: str) -> None:
    """Shard the tables over all ranks, fill them and save the state dict with torch.distributed.checkpoint."""
    model, ranks = _Model(), list(range(dist.get_world_size()))
    shardings = {"by_columns": column_wise(ranks), "by_rows": row_wise(), "on_one_rank": table_wise(rank=ranks[-1])}
    plan = construct_module_sharding_plan(
        model.tables, shardings, _AnyShardings(), local_size=len(ranks), world_size=len(ranks), device_type="cpu"
    )
    sharded = DistributedModelParallel(
        model, device=torch.device("cpu"), plan=ShardingPlan({"tables": plan}), sharders=[_AnyShardings()]
    )
    state = sharded.state_dict()
    for name, tensor in state.items():
        for shard in tensor.local_shards():
            (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
            shard.tensor.copy_(table(name.split(".")[-2])[row : row + rows, column : column + columns])
    dcp.save(state, checkpoint_id=path)
