"""A plan's tables with the lookups that a data set's counts let expect, and how uneven their owners are."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mlet_dist.embeddings.planning.cost_model import Device, step_time
from mlet_dist.embeddings.planning.owner_skew import (
    BlockSums,
    ExpectedLookups,
    busiest_owner,
    expected_lookups,
    sums_of_blocks,
)
from mlet_dist.embeddings.planning.plan_cost import Tables
from mlet_dist.embeddings.planning.table_cost import TableCost
from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig
from mlet_dist.models.row_widths import Counts
from mlet_dist.training.model_plan import ModelPlan


@dataclass(frozen=True)
class ExpectedStep:
    """What a data set's counts say of a step.

    Attributes:
        lookups: of the unique_rows tables whose counts are known.
        busiest: the work of the busiest owner of their rows over the mean.
    """

    lookups: Mapping[str, ExpectedLookups] = field(default_factory=dict)
    busiest: float = 1.0

    def costs(self, tables: Tables) -> Tables:
        """Return the costs of tables with the expected numbers of distinct rows."""
        return {
            name: (self._with_counts(name, cost) if cost.exchange == "unique_rows" else cost, rows)
            for name, (cost, rows) in tables.items()
        }

    def _with_counts(self, name: str, cost: TableCost) -> TableCost:
        own = self.lookups.get(name)
        if own is None:
            return cost
        return dataclasses.replace(cost, distinct_ids=own.distinct_ids, distinct_of_all=own.distinct_of_all)


def expected_step(
    planned: ModelPlan,
    tables: Sequence[MultiLayerEmbeddingBagConfig],
    counts: Mapping[str, Counts],
    device: Device,
) -> ExpectedStep:
    """Return what the counts say of a step of a plan.

    Args:
        planned: the plan.
        tables: the configs of its tables.
        counts: how often the data set looks up each row, by table, where it is known.
        device: hardware of a rank.
    """
    params = {name: each for of_collection in planned.plan.plan.values() for name, each in of_collection.items()}
    orders = {table.name: table.row_order for table in tables}
    found, ranks = {}, {}
    for name, (cost, rows) in planned.tables.items():
        if cost.exchange != "unique_rows" or name not in counts:
            continue
        traffic = cost.traffic
        ids = traffic.local_batch_size * traffic.num_features * traffic.pooling_factor
        found[name] = expected_lookups(counts[name], ids, len(rows), _sums_of(orders[name]))
        shards = params[name].sharding_spec.shards
        ranks[name] = [shard.placement.rank() for shard in sorted(shards, key=lambda each: each.shard_offsets[0])]
    step = ExpectedStep(found)
    costs = step.costs(planned.tables)
    seconds = {name: step_time(costs[name][0].owner_step(), device).total for name in found}
    return ExpectedStep(found, busiest_owner(found, seconds, ranks))


def _sums_of(order: RowOrder | None) -> BlockSums:
    """Return the sums over blocks of rows that are stored in an order; None is that of their ids."""
    if order is None:
        return sums_of_blocks
    return lambda values, ranks: sums_of_blocks(order.to_stored(torch.from_numpy(values)).numpy(), ranks)
