"""Ratings and proposals of complete plans, which depend on the groups of tables that share collectives."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from torchrec.distributed.planner.proposers import Proposer
from torchrec.distributed.planner.types import Enumerator, PerfModel, ShardingOption, Topology
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_configs import PoolingType

from mlet_dist.embeddings.multi_layer_tables import MultiLayerTables
from mlet_dist.embeddings.planning.collective_time import CollectiveTimes
from mlet_dist.embeddings.planning.step_collectives import Group, latency
from mlet_dist.embeddings.sharded.sharder import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig

_DATA_PARALLEL = ShardingType.DATA_PARALLEL.value


class Groups:
    """The groups of tables that share collectives, and their latency.

    Args:
        tables: the tables to plan.
        topology: the ranks.
        sharder: the sharder, which decides on exchanges.
        times: the latencies of collectives.
    """

    def __init__(
        self,
        tables: Sequence[MultiLayerEmbeddingBagConfig],
        topology: Topology,
        sharder: MultiLayerEmbeddingBagCollectionSharder,
        times: CollectiveTimes,
    ) -> None:
        self._tables = {table.name: table for table in tables}
        self._world_size, self._local_world_size = topology.world_size, topology.intra_group_size
        self._on_cpu = topology.compute_device == "cpu"
        self._sharder, self._times = sharder, times

    def of(self, option: ShardingOption) -> Group:
        """Return the group of a table's option."""
        kind, table = option.sharding_type, self._tables[option.name]
        sequences = table.pooling == PoolingType.NONE
        if kind == _DATA_PARALLEL:
            return kind, None, sequences
        exchange, _ = self._sharder.exchange_for(table, kind, self._world_size, on_cpu=self._on_cpu)
        return kind, exchange, sequences

    def latency(self, options: Sequence[ShardingOption]) -> float:
        """Return the milliseconds that the collectives of a plan take without their bytes."""
        own = [each for each in options if isinstance(each.module[1], MultiLayerTables)]
        if not own:
            return 0.0
        groups = {self.of(option) for option in own}
        return 1e3 * latency(groups, self._world_size, self._local_world_size, self._times)


class LatencyPerfModel(PerfModel):
    """Rates a plan by the slowest rank's milliseconds of bytes and operations, and the latency of its collectives."""

    def __init__(self, topology: Topology, groups: Groups) -> None:
        self._world_size, self._groups = topology.world_size, groups

    def rate(self, plan: list[ShardingOption]) -> float:
        """Return the milliseconds of a plan whose shards have ranks."""
        of_ranks = [0.0] * self._world_size
        for option in plan:
            for shard in option.shards:
                if shard.perf is not None and shard.rank is not None:
                    of_ranks[shard.rank] += shard.perf.total
        return max(of_ranks) + self._groups.latency(plan)


class FewTypesProposer(Proposer):
    """Proposes plans with few sharding types, and so with few collectives: one plan for each set of types.

    TorchRec's greedy proposers start with the fastest option of each table, whatever collectives it adds. With these
    plans beside theirs, a type that a few tables save less with than its collectives take is not chosen.
    """

    def __init__(self) -> None:
        self._proposals: list[list[ShardingOption]] = []

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Make the proposals: in each, tables have their fastest option of the types, or else their fastest."""
        by_table: dict[str, list[ShardingOption]] = {}
        for option in search_space:
            by_table.setdefault(option.fqn, []).append(option)
        types = sorted({option.sharding_type for option in search_space} - {_DATA_PARALLEL})
        seen, self._proposals = set(), []
        for size in range(1, len(types)):
            for chosen in combinations(types, size):
                allowed = {*chosen, _DATA_PARALLEL}
                plan = [_fastest(options, allowed) for options in by_table.values()]
                key = tuple(id(option) for option in plan)
                if key not in seen:
                    seen.add(key)
                    self._proposals.append(plan)

    def propose(self) -> list[ShardingOption] | None:
        """Return the next plan, or None after the last one."""
        return self._proposals[0] if self._proposals else None

    def feedback(self, partitionable: bool, *arguments: Any, **named: Any) -> None:
        """Go on to the next plan, whatever became of this one."""
        del self._proposals[0]


def _fastest(options: Sequence[ShardingOption], allowed: set[str]) -> ShardingOption:
    possible = [option for option in options if option.sharding_type in allowed] or options
    return min(possible, key=lambda option: max(shard.perf.total for shard in option.shards if shard.perf is not None))


def added_latency(options: Sequence[ShardingOption], groups: Groups) -> Mapping[str, float]:
    """Return the milliseconds that a first table of each sharding type adds to a plan of all even options."""
    even = [option for option in options if option.partition_by == "uniform"]
    base = groups.latency(even)
    return {option.sharding_type: groups.latency([*even, option]) - base for option in options if option not in even}
