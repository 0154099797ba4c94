"""Random tables, bags, ranks, exchanges and optimizers against the dense float64 reference."""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist
from torchrec.modules.embedding_configs import PoolingType

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES, ExchangeChoice
from tests.helpers.dense_reference import Bags, DenseReference, toy_loss
from tests.helpers.ranks import RankPool
from tests.helpers.sharded_module import (
    OPTIMIZERS,
    dense_tables,
    full_weights,
    make_positive,
    optimizer_of,
    shard,
    to_kjt,
)

Ranks = Callable[..., RankPool]
STEPS = 2
EXAMPLES = int(os.environ.get("MLET_PROPERTY_EXAMPLES", "25"))


@dataclass(frozen=True)
class Case:
    """One random setting.

    Attributes:
        tables: (num_embeddings, hidden_dim, embedding_dim, pooling, features) of each table.
        local_batch_sizes: the batch size of each rank, possibly 0.
        longest: the number of ids of the longest bag.
        kinds: sharding types, assigned to the tables in turn.
        nodes: the number of nodes, at most that of ranks.
    """

    tables: tuple[tuple[int, int | None, int, PoolingType, tuple[str, ...]], ...]
    local_batch_sizes: tuple[int, ...]
    longest: int
    weighted: bool
    exchange: ExchangeChoice
    kinds: tuple[str, ...]
    nodes: int
    optimizer: str
    seed: int

    @property
    def sharding_types(self) -> dict[str, str]:
        """The sharding type of each table; unique_rows supports row_wise only."""
        kinds = ("row_wise",) if self.exchange == "unique_rows" else self.kinds
        return {f"t{index}": kinds[index % len(kinds)] for index in range(len(self.tables))}

    @property
    def rates(self) -> dict[str, float]:
        # Weights must stay positive (see toy_loss), and the gradient of a bag grows with its length squared.
        damping = (1 + self.longest) ** 2 if self.optimizer == "sgd" else 1
        return {"rows": 0.02 / damping, "projections": 0.01 / damping}

    def module(self) -> MultiLayerEmbeddingBagCollection:
        tables = [
            MultiLayerEmbeddingBagConfig(
                name=f"t{index}",
                num_embeddings=n,
                embedding_dim=d,
                hidden_dim=k,
                pooling=pooling,
                feature_names=list(features),
            )
            for index, (n, k, d, pooling, features) in enumerate(self.tables)
        ]
        return make_positive(MultiLayerEmbeddingBagCollection(tables, self.weighted, seed=self.seed))

    def bags(self, step: int) -> Bags:
        """Draw the bags of the global batch, of 0 to ``longest`` ids; short ones are more likely."""
        draw = random.Random(f"{self.seed} {step}")
        limits: dict[str, int] = {}
        for n, _, _, _, features in self.tables:
            for feature in features:
                limits[feature] = min(n, limits.get(feature, n))

        def bag(n: int) -> list[tuple[int, float]]:
            size = draw.choice([0, 1, min(2, self.longest), draw.randint(0, self.longest)]) if self.longest else 0
            return [(draw.randrange(n), draw.uniform(0.5, 2.0) if self.weighted else 1.0) for _ in range(size)]

        return {name: [bag(n) for _ in range(sum(self.local_batch_sizes))] for name, n in limits.items()}


tables = st.lists(
    st.tuples(
        st.integers(1, 40),
        st.sampled_from([None, 4, 8, 12]),
        st.sampled_from([4, 8]),
        st.sampled_from([PoolingType.SUM, PoolingType.MEAN]),
        st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=2, unique=True).map(tuple),
    ),
    min_size=1,
    max_size=4,
).map(tuple)
cases = st.builds(
    Case,
    tables=tables,
    local_batch_sizes=st.sampled_from([1, 2, 4]).flatmap(
        lambda ranks: st.tuples(*ranks * [st.integers(0, 3)]).filter(any)
    ),
    longest=st.sampled_from([0, 1, 5, 200]),
    weighted=st.booleans(),
    exchange=st.sampled_from(["auto", *EXCHANGES]),
    kinds=st.lists(
        st.sampled_from(["row_wise", "table_wise", "table_row_wise", "data_parallel"]), min_size=1, max_size=4
    ).map(tuple),
    nodes=st.sampled_from([1, 2]),
    optimizer=st.sampled_from(OPTIMIZERS),
    seed=st.integers(0, 2**31),
)


def _train(case: Case) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    last = list(accumulate(case.local_batch_sizes))[rank]
    first = last - case.local_batch_sizes[rank]
    rate, types = case.rates["rows"], case.sharding_types
    model = shard(case.module(), case.optimizer, rate, case.exchange, sharding_types=types)
    optimizer = optimizer_of(model, case.optimizer, case.rates)
    outputs = []
    for step in range(STEPS):
        optimizer.zero_grad()
        found = model(to_kjt(case.bags(step), first, last, case.weighted)).to_dict()
        # Ranks average their gradients; this factor makes the average that of the global batch.
        share = world_size * (last - first) / sum(case.local_batch_sizes)
        (toy_loss(found) * share if last > first else sum(each.sum() for each in found.values())).backward()
        optimizer.step()
        outputs.append({name: output.detach() for name, output in found.items()})
    return outputs, full_weights(model)


@pytest.mark.multirank
@settings(deadline=None, max_examples=EXAMPLES, derandomize=True)
@given(case=cases)
def test_any_setting_equals_the_dense_reference(ranks: Ranks, case: Case) -> None:
    reference = DenseReference(dense_tables(case.module()), case.optimizer, case.rates)
    world_size = len(case.local_batch_sizes)
    by_rank = ranks(world_size, max(1, world_size // case.nodes)).run(_train, case)
    for step in range(STEPS):
        for name, expected in reference.step(case.bags(step)).items():
            found = torch.cat([outputs[step][name] for outputs, _ in by_rank])
            torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-6)
    for table in reference.tables:
        for _, weights in by_rank:
            rows = weights[f"embedding_bags.{table.name}.weight"]
            torch.testing.assert_close(rows.double(), table.rows.detach(), rtol=2e-5, atol=2e-6)
            if table.projection is not None:
                projection = weights[f"projections.{table.name}.weight"]
                torch.testing.assert_close(projection.double(), table.projection.detach(), rtol=2e-5, atol=2e-6)
