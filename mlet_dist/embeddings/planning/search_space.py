"""What TorchRec's planner may try: sharding types and kernels for each table, without options that cannot pay."""

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints, PartitionByType, ShardingOption
from torchrec.distributed.types import ModuleSharder

from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.planning.cost_model import FLOAT
from mlet_dist.embeddings.planning.plan_cost import Ranks, serves
from mlet_dist.embeddings.planning.table_cost import (
    DATA_PARALLEL,
    ROW_WISE,
    TABLE_ROW_WISE,
    TABLE_WISE,
    UVM,
    UVM_CACHING,
)
from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES_OF
from mlet_dist.embeddings.sharded.sharder import MultiLayerEmbeddingBagCollectionSharder

Constraints = Mapping[str, ParameterConstraints]

_FUSED, _DENSE = EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value


def table_constraints(
    tables: Sequence[MultiLayerEmbeddingBagConfig],
    ranks: Ranks,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    given: Constraints | None = None,
    replicated_bytes: float = 0,
) -> dict[str, ParameterConstraints]:
    """TorchRec's constraints of every table; what ``given`` says wins.

    Without it a table may have every sharding type that serves it, and the kernel fused, which holds rows on the
    device. By blocks of rows it may be sharded where all ranks get rows; over the ranks of a node where there are
    several nodes; on one rank where there are several; on every rank up to ``replicated_bytes`` of float32 rows, or if
    nothing else serves. Those limits hold among several types that are asked for, too; one alone is what it is.

    Raises:
        ValueError: ``given`` names a table that is not there, or asks what cannot be.
    """
    given = given or {}
    names = [table.name for table in tables]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"constraints: there is no table {name!r}{hint}; there are {', '.join(names)}")
    found = {}
    for table in tables:
        own = given.get(table.name) or ParameterConstraints()
        found[table.name] = dataclasses.replace(
            own,
            sharding_types=_sharding_types(table, ranks, sharder, own.sharding_types, replicated_bytes),
            compute_kernels=_kernels(table, ranks, own.compute_kernels),
        )
    return found


def evenest(constraints: ParameterConstraints) -> ParameterConstraints:
    """Of ``table_constraints``, the one sharding type and kernel that leave most room on the fullest device."""
    types, kernels = constraints.sharding_types or [], constraints.compute_kernels or []
    kind = next(each for each in (ROW_WISE, TABLE_ROW_WISE, TABLE_WISE, DATA_PARALLEL) if each in types)
    kernel = next((each for each in (UVM, UVM_CACHING) if each in kernels), _FUSED)
    return dataclasses.replace(constraints, sharding_types=[kind], compute_kernels=[kernel])


def _sharding_types(
    table: MultiLayerEmbeddingBagConfig,
    ranks: Ranks,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    asked: Sequence[str] | None,
    replicated_bytes: float,
) -> list[str]:
    device = "cpu" if ranks.on_cpu else "cuda"
    exchange = sharder.asked(table.name)
    known = [
        kind
        for kind in sharder.sharding_types(device)
        if exchange != "unique_rows" or kind == DATA_PARALLEL or exchange in EXCHANGES_OF[kind]
    ]
    serving = [kind for kind in known if serves(table, kind, ranks)]
    found = [kind for kind in serving if not asked or kind in asked]
    if not found:
        assert asked is not None
        why = f"exchange {exchange!r} does not serve that"
        blocks = min((ranks.holders(kind) for kind in asked if kind in known), default=0)
        if blocks:
            why = f"with {table.num_embeddings:,} rows, some of {blocks:,} ranks would hold none"
        raise ValueError(
            f"table {table.name!r} cannot be {' or '.join(asked)}: {why}; it can be {', '.join(serving)}: name one of "
            "them, too, for such tables"
        )
    small = FLOAT * table.num_embeddings * table.row_width <= replicated_bytes
    ruled_out = set() if small else {DATA_PARALLEL}
    if ranks.world_size == ranks.local_world_size:
        ruled_out.add(TABLE_ROW_WISE)  # which is row_wise on one node
    if ranks.world_size == 1:
        ruled_out.add(TABLE_WISE)
    return [kind for kind in found if kind not in ruled_out] or (found if asked else [DATA_PARALLEL])


def _kernels(table: MultiLayerEmbeddingBagConfig, ranks: Ranks, asked: Sequence[str] | None) -> list[str]:
    kernels = list(asked or [_FUSED])
    for kernel in kernels:
        if ranks.on_cpu and kernel not in (_FUSED, _DENSE):
            raise ValueError(
                f"table {table.name!r} cannot have kernel {kernel}, which keeps rows of CUDA kernels in the host's "
                f"memory: on a CPU all rows are there; use {_FUSED}"
            )
    return [*kernels, _DENSE]  # of what is data_parallel


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
