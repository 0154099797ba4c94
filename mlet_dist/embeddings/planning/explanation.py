"""The reason for each table's sharding type: its cost per step beside that of the best alternative."""

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
    requested: Mapping[str, ParameterConstraints],
    constraints: Mapping[str, ParameterConstraints],
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    ranks: Ranks,
    device: Device,
) -> dict[str, str]:
    """Return the reason for each table's sharding type in a few words.

    Args:
        module: the unsharded collection.
        tables: cost of each table in the plan, and its rows by rank.
        requested: the constraints that the user requested.
        constraints: the constraints of the planner (``table_constraints``).
        sharder: the sharder of the plan.
        ranks: the ranks of the plan.
        device: hardware of a rank.
    """
    found = {}
    for table in module.row_tables():
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
            best = min(others, key=lambda cost: step_time(cost.owner_step(), device).total)
            reason += f", {best.sharding_type} {_cost_of(best, device)}"
            if chosen.num_owners < best.num_owners:
                reason += "; the other ranks are free for other tables"
        elif table.name in requested and requested[table.name].sharding_types == [chosen.sharding_type]:
            reason += "; no other type was asked for"
        elif chosen.sharding_type == DATA_PARALLEL:
            reason += "; it has too few rows to give every rank some"
        elif ranks.world_size == 1:
            reason = "one rank"
        if chosen.kernel in (UVM, UVM_CACHING):
            reason += "; rows in host memory"
        found[table.name] = reason
    return found


def _cost_of(cost: TableCost, device: Device) -> str:
    owners = "one rank" if cost.num_owners == 1 else f"each of {cost.num_owners:,} ranks"
    return f"{milliseconds(step_time(cost.owner_step(), device))} a step on {owners}"
