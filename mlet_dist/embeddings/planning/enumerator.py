"""What TorchRec's planner may try, without what cannot pay: its proposers find better plans among fewer options."""

from collections import defaultdict
from collections.abc import Sequence

from torch import nn
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import PartitionByType, ShardingOption
from torchrec.distributed.types import ModuleSharder

from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.planning.table_cost import UVM, UVM_CACHING

# An option that loads some ranks alone must save this share of the work of one that loads all alike.
_SAVED = 0.5


class WorthwhileEnumerator(EmbeddingEnumerator):
    """TorchRec's enumerator, whose options of multi-layer tables are thinned out (``worthwhile``).

    TorchRec's greedy proposers move the largest table to its next option, and never back: where large tables have
    options that no good plan takes, they are through all of them before a small table is moved.
    """

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """Options with estimates, those that are left."""
        found = super().enumerate(module, sharders)
        own = [each for each in found if isinstance(each.module[1], MultiLayerEmbeddingBagCollection)]
        dropped = {id(each) for each in own} - {id(each) for each in worthwhile(own)}
        return [each for each in found if id(each) not in dropped]


def worthwhile(options: Sequence[ShardingOption]) -> list[ShardingOption]:
    """Options of tables, without those that no good plan takes.

    Options of a kernel that load all ranks alike are compared by time and memory, and the worse ones dropped. One that
    loads some ranks alone is dropped if it takes longer there than all tables together in the best even plan, or if its
    ranks together do not work less than half of what all ranks do otherwise.
    """
    groups: dict[tuple[str, str], list[ShardingOption]] = defaultdict(list)
    for option in options:
        kernel = option.compute_kernel if option.compute_kernel in (UVM, UVM_CACHING) else ""
        groups[option.fqn, kernel].append(option)
    even = {key: [each for each in group if _is_even(each)] for key, group in groups.items()}
    fastest = {key: min(group, key=_time) for key, group in even.items() if group}
    by_table: dict[str, float] = {}
    for (table, _), option in fastest.items():
        by_table[table] = min(_time(option), by_table.get(table, float("inf")))
    all_even = len(by_table) == len({table for table, _ in groups})
    limit = sum(by_table.values()) if all_even else float("inf")
    kept = []
    for key, group in groups.items():
        best = fastest.get(key)
        for option in group:
            if best is None or option is best or _is_worthwhile(option, best, limit):
                kept.append(option)
    return kept


def _is_worthwhile(option: ShardingOption, best: ShardingOption, limit: float) -> bool:
    if _is_even(option):
        return _memory(option) < _memory(best)
    return _time(option) <= limit and _work(option) <= (1 - _SAVED) * _work(best)


def _is_even(option: ShardingOption) -> bool:
    return option.partition_by == PartitionByType.UNIFORM.value


def _time(option: ShardingOption) -> float:
    return max(shard.perf.total for shard in option.shards if shard.perf is not None)


def _work(option: ShardingOption) -> float:
    return sum(shard.perf.total for shard in option.shards if shard.perf is not None)


def _memory(option: ShardingOption) -> int:
    return max(shard.storage.hbm + shard.storage.ddr for shard in option.shards if shard.storage is not None)
