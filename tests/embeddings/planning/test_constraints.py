"""The planner's constraints for each table, and the kernels of its plans."""

from typing import Any

import pytest
import torch
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams

from mlet_dist.embeddings import (
    MultiLayerEmbeddingBagCollection,
    MultiLayerEmbeddingBagCollectionSharder,
    MultiLayerEmbeddingBagConfig,
)
from mlet_dist.embeddings.planning.plan_cost import Ranks
from mlet_dist.embeddings.planning.planner import multi_layer_planner
from mlet_dist.embeddings.planning.search_space import most_even_constraints, table_constraints

ALL = ["row_wise", "table_row_wise", "table_wise", "data_parallel"]


def _table(rows: int, name: str = "t") -> MultiLayerEmbeddingBagConfig:
    return MultiLayerEmbeddingBagConfig(
        name=name, num_embeddings=rows, embedding_dim=4, hidden_dim=16, feature_names=[f"f_{name}"]
    )


def _offered(
    rows: int,
    world_size: int,
    local_world_size: int,
    requested: list[str] | None = None,
    exchange: Any = "auto",
    replicated_bytes: float = 1 << 20,
    on_cpu: bool = True,
) -> set[str]:
    sharder = MultiLayerEmbeddingBagCollectionSharder(exchange=exchange)
    given = {} if requested is None else {"t": ParameterConstraints(sharding_types=requested)}
    ranks = Ranks(world_size, local_world_size, on_cpu)
    found = table_constraints([_table(rows)], ranks, sharder, given, replicated_bytes)["t"]
    return set(found.sharding_types or [])


def test_sharding_types_of_a_table() -> None:
    assert _offered(1000, 4, 2) == set(ALL)
    assert _offered(1000, 4, 4) == {"row_wise", "table_wise", "data_parallel"}
    assert _offered(1000, 1, 1) == {"row_wise"}
    assert _offered(1000, 1, 1, ["data_parallel"]) == {"data_parallel"}
    assert _offered(5, 4, 2) == {"table_row_wise", "table_wise", "data_parallel"}  # 2 + 2 + 1 + 0 rows
    assert _offered(1, 4, 2) == {"table_wise", "data_parallel"}
    assert _offered(1 << 20, 4, 2) == set(ALL) - {"data_parallel"}
    assert _offered(1000, 4, 2, exchange="unique_rows") == {"row_wise", "data_parallel"}
    assert _offered(1000, 4, 2, exchange={"t": "unique_rows"}) == {"row_wise", "data_parallel"}
    assert _offered(1, 4, 2, exchange="unique_rows", replicated_bytes=0) == {"data_parallel"}


def test_requested_types_take_precedence() -> None:
    assert _offered(1 << 20, 4, 2, ["data_parallel"]) == {"data_parallel"}
    assert _offered(1 << 20, 4, 2, ["row_wise", "data_parallel"]) == {"row_wise"}
    assert _offered(5, 4, 2, ["row_wise", "table_wise"]) == {"table_wise"}
    assert _offered(1000, 4, 4, ["table_row_wise"]) == {"table_row_wise"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"rows": 5, "requested": ["row_wise"]},
            r"table 't' cannot be row_wise: with 5 rows, some of 4 ranks would have none",
        ),
        (
            {"rows": 1, "requested": ["table_row_wise"]},
            r"with 1 rows, some of 2 ranks would have none; it can be table_wise",
        ),
        ({"rows": 1000, "requested": ["column_wise"]}, r"table 't' cannot be column_wise: "),
        (
            {"rows": 1000, "requested": ["table_wise"], "exchange": "unique_rows"},
            r"exchange 'unique_rows' does not support that",
        ),
        (
            {"rows": 3, "requested": ["table_wise", "row_wise"], "exchange": "unique_rows"},
            r"cannot be table_wise or row_wise: with 3 rows, some of 4 ranks would have none; it can be data_parallel",
        ),
    ],
)
def test_impossible_types_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _offered(world_size=4, local_world_size=2, **arguments)


def test_constraints_of_an_unknown_table_are_refused() -> None:
    ranks, sharder = Ranks(2, 2, True), MultiLayerEmbeddingBagCollectionSharder()
    with pytest.raises(ValueError, match=r"no table 'adz' \(did you mean 'ads'\?\); the tables are ads, users$"):
        table_constraints([_table(9, "ads"), _table(9, "users")], ranks, sharder, {"adz": ParameterConstraints()})


def test_a_pod_of_nodes_counts_as_a_node() -> None:
    topology = Topology(144, "cuda", local_world_size=4, pod_size=18)
    assert Ranks.of(topology) == Ranks(144, 72, False)
    assert Ranks.of(topology).num_owners("table_row_wise") == 72


def test_kernels() -> None:
    sharder = MultiLayerEmbeddingBagCollectionSharder()
    given = {"t": ParameterConstraints(compute_kernels=["fused", "fused_uvm_caching"])}
    gpus = Ranks(4, 4, False)
    assert set(table_constraints([_table(99)], gpus, sharder)["t"].compute_kernels or []) == {"fused", "dense"}
    found = table_constraints([_table(99)], gpus, sharder, given)["t"]
    even = most_even_constraints(found)
    assert (even.sharding_types, even.compute_kernels) == (["row_wise"], ["fused_uvm_caching"])
    with pytest.raises(ValueError, match=r"table 't' cannot have kernel fused_uvm_caching, .* on a CPU use fused,"):
        table_constraints([_table(99)], Ranks(4, 4, True), sharder, given)


def test_rows_are_in_host_memory_if_the_device_is_full() -> None:
    sizes = {"large": 400_000, "small": 1_000}  # the rows of the large table take 25.6 MB
    tables = [_table(rows, name) for name, rows in sizes.items()]
    module = torch.nn.Sequential(MultiLayerEmbeddingBagCollection(tables, device=torch.device("meta")))
    sharder = MultiLayerEmbeddingBagCollectionSharder(local_batch_size=8)
    given = {
        name: ParameterConstraints(
            compute_kernels=["fused", "fused_uvm_caching"], cache_params=CacheParams(load_factor=0.25)
        )
        for name in sizes
    }

    def kernels(device_bytes: int, host_bytes: int) -> dict[str, str]:
        topology = Topology(2, "cuda", hbm_cap=device_bytes, ddr_cap=host_bytes, local_world_size=2)
        planner = multi_layer_planner(tables, topology, sharder, constraints=given, replicated_bytes=0)
        plan = planner.plan(module, [sharder]).plan["0"]
        assert plan["large"].cache_params.load_factor == 0.25
        return {name: plan[name].compute_kernel for name in sizes}

    assert kernels(1 << 25, 1 << 25) == {"large": "fused", "small": "fused"}
    assert kernels(10_000_000, 1 << 25) == {"large": "fused_uvm_caching", "small": "fused"}
