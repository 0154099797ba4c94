"""One flat all-reduce leaves the gradients that DistributedDataParallel and the embeddings' own all-reduce leave."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed import DistributedModelParallel

from benchmarks.step_counters import count_step_operations
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.fused_optimizers import fuse_row_optimizer
from mlet_dist.training.process_group import Worker
from mlet_dist.training.replicated_gradients import ReplicatedGradients
from mlet_dist.training.sharding import shard_model
from tests.helpers.ranks import RankPool
from tests.helpers.refused_batches import build, make_bags, to_kjt

pytestmark = pytest.mark.multirank

Ranks = Callable[[int], RankPool]


class _Parts(nn.Module):
    """Linear layers, of which ``forward`` uses those that it is told to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Linear(3, 2) for _ in range(4))

    def forward(self, rows: torch.Tensor, used: list[int]) -> torch.Tensor:
        return torch.stack([self.parts[index](rows).square().sum() for index in used]).sum()


def _dense(used_by: list[list[int]]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return the gradients of ReplicatedGradients and of DDP, and the collectives of the former."""
    rank = dist.get_rank()
    rows = torch.randn(5, 3, generator=torch.Generator().manual_seed(rank))
    found = []
    for wrapped in (False, True):
        model = _Parts()
        runs = DistributedDataParallel(model, find_unused_parameters=True) if wrapped else model
        gradients = None if wrapped else ReplicatedGradients(model)
        for _ in range(2):
            model.zero_grad()
            runs(rows, used_by[rank]).backward()
            with count_step_operations() as counts:
                if gradients is not None:
                    gradients.combine()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
        if not wrapped:
            names = [call.name for call in counts.collective_calls]
    return found[0], found[1], names


@pytest.mark.parametrize("used_by", [[[0, 1, 2, 3]] * 3, [[0, 1], [1, 2], [0, 2]], [[0], [1], []][:2]])
def test_dense_gradients_are_those_of_ddp_also_where_ranks_use_other_parameters(
    ranks: Ranks, used_by: list[list[int]]
) -> None:
    for found, expected, collectives in ranks(len(used_by)).run(_dense, used_by):
        assert collectives == ["allreduce_"]
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            if gradient is None:
                assert found[name] is None, name
            else:
                torch.testing.assert_close(found[name], gradient)


def _embeddings(exchange: Any, types: dict[str, str], deferred: bool) -> dict[str, torch.Tensor]:
    """Return the gradients of W2 and of replicated rows."""
    model, optimizer = build(exchange, sharding_types=types)
    gradients = ReplicatedGradients(model) if deferred else None
    for step in range(2):
        optimizer.zero_grad()
        loss, _ = model(to_kjt(make_bags(step, dist.get_rank())))
        loss.backward()
        if gradients is not None:
            gradients.combine()
    assert isinstance(model, DistributedModelParallel)
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and ("projections" in name or "tiny" in name)
    }


@pytest.mark.parametrize(
    ("exchange", "types"),
    [
        ("after", {}),
        ("reduce_scatter", {}),
        ("unique_rows", {}),
        ("auto", {"t0": "table_wise", "mean": "data_parallel", "large": "data_parallel"}),
    ],
)
def test_gradients_of_embeddings_are_those_of_their_own_all_reduce(
    ranks: Ranks, exchange: str, types: dict[str, str]
) -> None:
    own, deferred = (ranks(2).run(_embeddings, exchange, types, deferred) for deferred in (False, True))
    for expected, found in zip(own, deferred, strict=True):
        assert len(expected) >= 3
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert torch.equal(found[name], gradient), name


def test_a_module_may_be_asked_twice(ranks: Ranks) -> None:
    assert ranks(2).run(_asked_twice) == [True, True]


def _asked_twice() -> bool:
    model, _ = build("unique_rows")
    (module,) = (each for each in model.modules() if hasattr(each, "defer_gradients"))
    assert not isinstance(module, MultiLayerEmbeddingBagCollection)
    return bool(module.defer_gradients() == module.defer_gradients())


def _untrained() -> dict[str, torch.Tensor]:
    """Return the layers and buffers that are not trained of a model whose builder draws other ones on every rank."""
    own = ModelConfig(builder="tests.helpers.own_networks:frozen", embedding_dim=4, hidden_dim=8)
    spec = ModelSpec(own, ("I1", "I2"), (SparseFeature("C1", 10),), seed=0)
    model = build_training_model(spec, torch.device("meta"))
    fuse_row_optimizer(model, OptimizerConfig())
    worker = Worker(dist.get_rank(), dist.get_world_size(), dist.get_world_size(), torch.device("cpu"))
    network = shard_model(model, worker, 8)[0].module
    return {name: getattr(network, name).clone() for name in ("scale", "mask", "not_saved")} | {
        "fixed": network.fixed.weight.clone()
    }


def test_what_is_not_trained_is_the_same_on_all_ranks(ranks: Ranks) -> None:
    first, second = ranks(2).run(_untrained)
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
