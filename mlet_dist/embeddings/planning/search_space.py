"""What the planner may do with each table: sharding types and kernels that serve it."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner.types import ParameterConstraints

from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagConfig
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
