"""Why a table has its sharding type: what that type and the best other one cost in a step."""

from collections.abc import Mapping, Sequence

from torchrec.distributed.planner.types import ParameterConstraints

from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.planning.cost_model import Device, milliseconds, step_time
from mlet_dist.embeddings.planning.plan_cost import Ranks, table_cost
from mlet_dist.embeddings.planning.table_cost import DATA_PARALLEL, UVM, UVM_CACHING, TableCost
from mlet_dist.embeddings.sharded.sharder import MultiLayerEmbeddingBagCollectionSharder


def sharding_reasons(
    module: MultiLayerEmbeddingBagCollection,
    tables: Mapping[str, tuple[TableCost, Sequence[int]]],
    asked: Mapping[str, ParameterConstraints],
    constraints: Mapping[str, ParameterConstraints],
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    ranks: Ranks,
    device: Device,
) -> dict[str, str]:
    """A few words for each table of a plan.

    Args:
        tables: costs and rows of the plan.
        asked: constraints that were given.
        constraints: what the planner could choose from (``table_constraints``).
        device: hardware of a rank.
    """
    found = {}
    for table in module.embedding_bag_configs():
        chosen = tables[table.name][0]
        types = constraints[table.name].sharding_types or []
        rows = module.embedding_bags[table.name].weight
        others = [
            table_cost(table, rows, sharder, ranks, kind, chosen.kernel)
            for kind in types
            if kind != chosen.sharding_type
        ]
        reason = _cost_of(chosen, device)
        if others:
            best = min(others, key=lambda cost: step_time(cost.held_step(), device).total)
            reason += f", {best.sharding_type} {_cost_of(best, device)}"
            if chosen.holders < best.holders:
                reason += "; other ranks are left to other tables"
        elif table.name in asked and asked[table.name].sharding_types == [chosen.sharding_type]:
            reason += "; no other type was asked for"
        elif chosen.sharding_type == DATA_PARALLEL:
            reason += "; its rows are too few for a share on every rank"
        elif ranks.world_size == 1:
            reason = "one rank"
        if chosen.kernel in (UVM, UVM_CACHING):
            reason += "; rows in the host's memory"
        found[table.name] = reason
    return found


def _cost_of(cost: TableCost, device: Device) -> str:
    holders = "one rank" if cost.holders == 1 else f"each of {cost.holders:,} ranks"
    return f"{milliseconds(step_time(cost.held_step(), device))} a step on {holders}"
