"""The search space of TorchRec's planner: each table's sharding types and kernels, without unpromising options."""

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.types import ParameterConstraints, PartitionByType, ShardingOption
from torchrec.distributed.types import ModuleSharder

from mlet_dist.embeddings.multi_layer_tables import MultiLayerTables
from mlet_dist.embeddings.planning.cost_model import FLOAT
from mlet_dist.embeddings.planning.plan_cost import Ranks, has_enough_rows
from mlet_dist.embeddings.planning.plan_rating import Groups, added_latency
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
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig

Constraints = Mapping[str, ParameterConstraints]
"""TorchRec's constraints by table."""

_FUSED, _DENSE = EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.DENSE.value

_NOTHING_ADDED: Mapping[str, float] = MappingProxyType({})

# An uneven option must save at least this share of the work of the best even option.
_MIN_SAVED_SHARE = 0.5


def table_constraints(
    tables: Sequence[MultiLayerEmbeddingBagConfig],
    ranks: Ranks,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    given: Constraints | None = None,
    replicated_bytes: float = 0,
) -> dict[str, ParameterConstraints]:
    """Return TorchRec's constraints of every table.

    By default a table may have every sharding type that is useful for it, and the kernel fused, whose rows are on the
    device:

    - row_wise and table_row_wise if all owner ranks get rows, table_row_wise only with several nodes;
    - table_wise with several ranks;
    - data_parallel with several ranks if the table has at most ``replicated_bytes`` of float32 rows, or if nothing else
      is possible. It would give a single rank a dense gradient and save nothing.

    If ``given`` requests several types for a table, the same limits apply among them; a single requested type is used
    without these limits as long as it is possible.

    Args:
        tables: the tables to plan.
        ranks: the ranks.
        sharder: the sharder, for the requested exchanges.
        given: the user's constraints by table; they take precedence.
        replicated_bytes: the limit for data_parallel.

    Raises:
        ValueError: ``given`` names an unknown table, or requests what is not possible.
    """
    given = given or {}
    names = [table.name for table in tables]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"constraints: no table {name!r}{hint}; the tables are {', '.join(names)}")
    found = {}
    for table in tables:
        own = given.get(table.name) or ParameterConstraints()
        found[table.name] = dataclasses.replace(
            own,
            sharding_types=_sharding_types(table, ranks, sharder, own.sharding_types, replicated_bytes),
            compute_kernels=_kernels(table, ranks, own.compute_kernels),
        )
    return found


def most_even_constraints(constraints: ParameterConstraints) -> ParameterConstraints:
    """Reduce constraints to the sharding type and kernel that need the least memory on the fullest device."""
    types, kernels = constraints.sharding_types or [], constraints.compute_kernels or []
    kind = next(each for each in (ROW_WISE, TABLE_ROW_WISE, TABLE_WISE, DATA_PARALLEL) if each in types)
    kernel = next((each for each in (UVM, UVM_CACHING) if each in kernels), _FUSED)
    return dataclasses.replace(constraints, sharding_types=[kind], compute_kernels=[kernel])


def _sharding_types(
    table: MultiLayerEmbeddingBagConfig,
    ranks: Ranks,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    requested: Sequence[str] | None,
    replicated_bytes: float,
) -> list[str]:
    device = "cpu" if ranks.on_cpu else "cuda"
    exchange = sharder.requested_exchange(table)
    known = [
        kind
        for kind in sharder.sharding_types(device)
        if exchange != "unique_rows" or kind == DATA_PARALLEL or exchange in EXCHANGES_OF[kind]
    ]
    if table.segments:
        known = [ROW_WISE]
    if table.segments and not has_enough_rows(table, ROW_WISE, ranks):
        raise ValueError(
            f"{table.num_embeddings:,} rows of {table.row_width} columns, which are stored together, leave some of "
            f"{ranks.world_size:,} ranks without rows, which fbgemm's CPU kernel does not support; use fewer ranks, "
            "other widths or another budget"
        )
    possible = [kind for kind in known if has_enough_rows(table, kind, ranks)]
    found = [kind for kind in possible if not requested or kind in requested]
    if not found:
        assert requested is not None
        why = f"exchange {exchange!r} does not support that"
        blocks = min((ranks.num_owners(kind) for kind in requested if kind in known), default=0)
        if blocks:
            why = f"with {table.num_embeddings:,} rows, some of {blocks:,} ranks would have none"
        raise ValueError(
            f"table {table.name!r} cannot be {' or '.join(requested)}: {why}; it can be {', '.join(possible)}: add one "
            "of these types for such tables"
        )
    small = FLOAT * table.num_embeddings * table.row_width <= replicated_bytes
    ruled_out = set() if small else {DATA_PARALLEL}
    if ranks.world_size == ranks.local_world_size:
        ruled_out.add(TABLE_ROW_WISE)  # on a single node it is the same as row_wise
    if ranks.world_size == 1:
        ruled_out |= {TABLE_WISE, DATA_PARALLEL}
    return [kind for kind in found if kind not in ruled_out] or (found if requested else [DATA_PARALLEL])


def _kernels(table: MultiLayerEmbeddingBagConfig, ranks: Ranks, requested: Sequence[str] | None) -> list[str]:
    kernels = list(requested or [_FUSED])
    for kernel in kernels:
        if ranks.on_cpu and kernel not in (_FUSED, _DENSE):
            raise ValueError(
                f"table {table.name!r} cannot have kernel {kernel}, which needs CUDA; on a CPU use {_FUSED}, whose "
                "rows are in host memory there"
            )
    return [*kernels, _DENSE]  # dense is the kernel of data_parallel


class PruningEnumerator(EmbeddingEnumerator):
    """TorchRec's enumerator with unpromising options of multi-layer tables removed (``prune_options``).

    TorchRec's greedy proposers move the largest table to its next option, and never back. Without pruning they exhaust
    the options of the large tables before they move a small one.

    Args:
        groups: the groups of tables that share collectives.
        launch: milliseconds of a kernel, below which differences mean nothing.
        *torchrec_arguments: positional arguments of TorchRec's enumerator.
    """

    def __init__(self, groups: Groups, launch: float, *torchrec_arguments: Any) -> None:
        super().__init__(*torchrec_arguments)
        self._groups, self._launch = groups, launch

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """Return the remaining options, with their estimates."""
        found = super().enumerate(module, sharders)
        own = [each for each in found if isinstance(each.module[1], MultiLayerTables)]
        added = added_latency(own, self._groups)
        dropped = {id(each) for each in own} - {id(each) for each in prune_options(own, self._launch, added)}
        return [each for each in found if id(each) not in dropped]


def prune_options(
    options: Sequence[ShardingOption], launch: float = 0.0, added: Mapping[str, float] = _NOTHING_ADDED
) -> list[ShardingOption]:
    """Return the options of tables without those that no good plan uses.

    An even option loads all ranks equally. Of a table's even options with the same kernel the best is kept, and others
    only if they need less memory. The best is the fastest, or of those that differ from it by less than ``launch`` the
    one with the least memory.

    An uneven option loads some ranks only. It is dropped if it takes longer on them than all tables together in the
    best even plan, or if the total work of its ranks is more than half of that of the best even option, or if all
    tables together save less by its sharding type than its collectives take.

    Args:
        options: of all tables, with estimates.
        launch: milliseconds of a kernel.
        added: the milliseconds that the collectives of a sharding type add to a step.
    """
    groups: dict[tuple[str, str], list[ShardingOption]] = defaultdict(list)
    for option in options:
        kernel = option.compute_kernel if option.compute_kernel in (UVM, UVM_CACHING) else ""
        groups[option.fqn, kernel].append(option)
    even = {key: [each for each in group if _is_even(each)] for key, group in groups.items()}
    best = {key: _best_even(group, launch) for key, group in even.items() if group}
    by_table: dict[str, float] = {}
    for (table, _), option in best.items():
        by_table[table] = min(_time(option), by_table.get(table, float("inf")))
    all_even = len(by_table) == len({table for table, _ in groups})
    limit = sum(by_table.values()) if all_even else float("inf")
    saving = [each for each in added if _saved(each, groups, best) > added[each]]
    kept = []
    for key, group in groups.items():
        own = best.get(key)
        for option in group:
            if own is None or option is own or _is_kept(option, own, limit, saving if added else None):
                kept.append(option)
    return kept


def _best_even(options: Sequence[ShardingOption], launch: float) -> ShardingOption:
    fastest = min(map(_time, options))
    return min(
        (each for each in options if _time(each) <= fastest + launch), key=lambda each: (_memory(each), _time(each))
    )


def _is_kept(option: ShardingOption, best: ShardingOption, limit: float, saving: Sequence[str] | None) -> bool:
    if _is_even(option):
        return _memory(option) < _memory(best)
    if saving is not None and option.sharding_type not in saving:
        return False
    return _time(option) <= limit and _work(option) <= (1 - _MIN_SAVED_SHARE) * _work(best)


def _saved(
    sharding_type: str,
    groups: Mapping[tuple[str, str], Sequence[ShardingOption]],
    best: Mapping[tuple[str, str], ShardingOption],
) -> float:
    """Return the milliseconds a rank that all tables together save at most by an uneven sharding type."""
    saved = 0.0
    for key, group in groups.items():
        own = [each for each in group if each.sharding_type == sharding_type]
        if own and key in best:
            saved += max(0.0, _work(best[key]) - min(map(_work, own))) / len(best[key].shards)
    return saved


def _is_even(option: ShardingOption) -> bool:
    return option.partition_by == PartitionByType.UNIFORM.value


def _time(option: ShardingOption) -> float:
    return max(shard.perf.total for shard in option.shards if shard.perf is not None)


def _work(option: ShardingOption) -> float:
    return sum(shard.perf.total for shard in option.shards if shard.perf is not None)


def _memory(option: ShardingOption) -> int:
    return max(shard.storage.hbm + shard.storage.ddr for shard in option.shards if shard.storage is not None)
