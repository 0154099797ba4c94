"""The reason for each table's sharding type: its cost per step beside that of the best alternative.

The cost of an alternative includes the latency of collectives that no other table of the plan has.
"""

from collections.abc import Mapping, Sequence

from torchrec.distributed.planner.types import ParameterConstraints

from mlet_dist.embeddings.multi_layer_tables import MultiLayerTables
from mlet_dist.embeddings.planning.cost_model import Device, step_time
from mlet_dist.embeddings.planning.plan_cost import Ranks, table_cost
from mlet_dist.embeddings.planning.step_collectives import latency
from mlet_dist.embeddings.planning.table_cost import DATA_PARALLEL, UVM, UVM_CACHING, TableCost
from mlet_dist.embeddings.sharded.sharder import MultiLayerEmbeddingBagCollectionSharder


def sharding_reasons(
    module: MultiLayerTables,
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
    groups = [cost.group for cost, _ in tables.values()]
    waiting = latency(groups, ranks.world_size, ranks.local_world_size, device.collectives)
    for table in module.row_tables():
        chosen = tables[table.name][0]
        types = constraints[table.name].sharding_types or []
        rows = module.row_weight(table.name)
        others = [
            table_cost(table, rows, sharder, ranks, kind, chosen.kernel)
            for kind in types
            if kind != chosen.sharding_type
        ]
        reason = _cost_of(chosen, device)
        if others:
            added = {
                cost.sharding_type: latency(
                    [*groups, cost.group],
                    ranks.world_size,
                    ranks.local_world_size,
                    device.collectives,
                )
                - waiting
                for cost in others
            }
            best = min(others, key=lambda cost: _seconds(cost, device) + added[cost.sharding_type])
            reason += _compared(chosen, best, added[best.sharding_type], device)
        elif table.name in requested and requested[table.name].sharding_types == [chosen.sharding_type]:
            reason += "; no other type was asked for"
        elif chosen.sharding_type == DATA_PARALLEL:
            reason += "; it has too few rows to give every rank some"
        if chosen.kernel in (UVM, UVM_CACHING):
            reason += "; rows in host memory"
        found[table.name] = reason
    return found


def _compared(chosen: TableCost, other: TableCost, added: float, device: Device) -> str:
    """Compare with the best alternative; differences below a kernel's launch are not reasons."""
    if abs(_seconds(other, device) + added - _seconds(chosen, device)) <= device.launch:
        text = f"; {other.sharding_type} differs by less than the launch of a kernel"
    else:
        own = f" and {_milliseconds(added)} for its own collectives" if added else ""
        text = f"; {other.sharding_type} {_cost_of(other, device)}{own}"
    return text + ("; the other ranks are free for other tables" if chosen.num_owners < other.num_owners else "")


def _seconds(cost: TableCost, device: Device) -> float:
    return step_time(cost.owner_step(), device).total


def _cost_of(cost: TableCost, device: Device) -> str:
    owners = "one rank" if cost.num_owners == 1 else f"each of {cost.num_owners:,} ranks"
    return f"{_milliseconds(_seconds(cost, device))} a step on {owners}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2g} ms" if seconds >= 1e-5 else "under 0.01 ms"
