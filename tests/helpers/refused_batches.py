"""A few tables of every kind, batches for them, and a sharded model, for tests of refused batches and plans."""

import random
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import distributed as dist
from torchrec import EmbeddingBagConfig, KeyedJaggedTensor, KeyedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from mlet_dist.embeddings import (
    MultiLayerEmbeddingBagCollection,
    MultiLayerEmbeddingBagCollectionSharder,
    MultiLayerEmbeddingBagConfig,
)
from mlet_dist.embeddings.sharded.exchange_choice import ExchangeChoice
from tests.helpers.ranks import full_tensor
from tests.helpers.sharded_module import planner, row_tables_of, weights_by_id

Bags = dict[str, list[list[int]]]
ROWS_RATE, PROJECTIONS_RATE, SHARE = 0.05, 0.02, 3
LIMITS = {"f0": 100, "f1": 60, "f2": 1, "f3": 50, "unused": 10}


def tables_of_every_kind() -> list[EmbeddingBagConfig]:
    """Return tables: f1 is in two of them, of 90 and 60 rows; with 2 ranks the one with a single row is replicated."""

    def table(name: str, n: int, features: list[str], k: int | None = 8, **more: Any) -> MultiLayerEmbeddingBagConfig:
        return MultiLayerEmbeddingBagConfig(
            name=name, num_embeddings=n, embedding_dim=4, hidden_dim=k, feature_names=features, **more
        )

    return [
        table("t0", 100, ["f0"]),
        table("large", 90, ["f1"]),
        table("small", 60, ["f1"], k=None),
        table("tiny", 1, ["f2"]),
        table("mean", 50, ["f3"], k=12, pooling=PoolingType.MEAN),
    ]


def make_bags(step: int, rank: int, rows: int = SHARE) -> Bags:
    """Draw bags with keys in a different order in each step, and with an unused feature whose ids are arbitrary."""
    draw = random.Random(100 * step + rank)
    names = list(LIMITS)
    draw.shuffle(names)
    bags = {
        name: [[draw.randrange(LIMITS[name]) for _ in range(draw.randint(0, 3))] for _ in range(rows)] for name in names
    }
    bags["unused"][:1] = [[-5, 10**9]] if rows else []
    return bags


def to_kjt(bags: Bags, weighted: bool = False) -> KeyedJaggedTensor:
    values = [each for rows in bags.values() for ids in rows for each in ids]
    return KeyedJaggedTensor(
        keys=list(bags),
        values=torch.tensor(values, dtype=torch.int64),
        lengths=torch.tensor([len(ids) for rows in bags.values() for ids in rows], dtype=torch.int32),
        weights=torch.linspace(0.5, 1.5, len(values)) if weighted else None,
    )


@torch.fx.wrap
def _loss(pooled: KeyedTensor) -> tuple[torch.Tensor, torch.Tensor]:
    return row_losses(pooled.to_dict()).sum(), pooled.values().detach()


def row_losses(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    total: Any = 0.0
    for index, name in enumerate(sorted(outputs)):
        columns = torch.linspace(0.5, 1.5, outputs[name].shape[1], dtype=outputs[name].dtype)
        total = total + (outputs[name] * columns).sum(dim=1) * (1 + 0.3 * index)
    return total**2 / 100


class _Model(torch.nn.Module):
    def __init__(self, embeddings: MultiLayerEmbeddingBagCollection) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _loss(self.embeddings(features))


def positive_module(weighted: bool = False, without: str = "") -> MultiLayerEmbeddingBagCollection:
    tables = [table for table in tables_of_every_kind() if table.name != without]
    module = MultiLayerEmbeddingBagCollection(tables, is_weighted=weighted, seed=5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.abs_().mul_(0.3).add_(0.05)
    return module


def build(
    exchange: ExchangeChoice,
    weighted: bool = False,
    without: str = "",
    sharding_types: Mapping[str, str] = MappingProxyType({}),
) -> tuple[DistributedModelParallel, torch.optim.Optimizer]:
    embeddings = positive_module(weighted, without)
    apply_optimizer_in_backward(torch.optim.SGD, embeddings.embedding_bags.parameters(), {"lr": ROWS_RATE})
    sharders = [MultiLayerEmbeddingBagCollectionSharder(exchange=exchange)]
    model = _Model(embeddings)
    plan = planner(embeddings, sharding_types).collective_plan(model, sharders, dist.group.WORLD)
    sharded = DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=sharders)
    groups: dict[float, list[torch.Tensor]] = {}
    for name, parameter in in_backward_optimizer_filter(sharded.named_parameters()):
        groups.setdefault(PROJECTIONS_RATE if "projections" in name else ROWS_RATE, []).append(parameter)
    return sharded, torch.optim.SGD([{"params": each, "lr": rate} for rate, each in groups.items()])


def train(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[KeyedJaggedTensor]
) -> list[torch.Tensor]:
    outputs = []
    for batch in batches:
        optimizer.zero_grad()
        loss, output = model(batch)
        loss.backward()
        optimizer.step()
        outputs.append(output)
    return outputs


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the full tensors of the state dict, with the rows of W1 by id."""
    state = {name.removeprefix("embeddings."): full_tensor(tensor) for name, tensor in model.state_dict().items()}
    return weights_by_id(state, row_tables_of(model))
