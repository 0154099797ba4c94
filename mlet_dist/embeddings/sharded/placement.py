"""What a sharding plan must be for a table, and where it is changed."""

from collections.abc import Sequence

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding, ShardingType
from torchrec.modules.embedding_configs import DataType

from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES, EXCHANGES_OF, ExchangeChoice

REPLICATED_BYTES = 16e6
"""Of W1: up to this the planner may hold a table on every rank, where nobody says otherwise."""

_DENSE = EmbeddingComputeKernel.DENSE.value


HOST_KERNELS = (EmbeddingComputeKernel.FUSED_UVM_CACHING.value, EmbeddingComputeKernel.FUSED_UVM.value)
"""Kernels whose rows lie in the host's memory, with a cache on the device or without."""


BY_BLOCKS = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
"""Sharding types that split a table into equal blocks of rows."""


def check_plan(
    table: MultiLayerEmbeddingBagConfig, sharding: ParameterSharding, exchange: ExchangeChoice, *, on_cpu: bool
) -> None:
    """Raise ValueError if the table's rows are sharded unevenly, or in a way that ``exchange`` or device rule out."""
    kind, spec = sharding.sharding_type, sharding.sharding_spec
    if spec is not None and kind in BY_BLOCKS:
        # TorchRec routes ids by equal blocks, whatever the plan says, and its lookup would find other rows.
        try:
            ranks_of_blocks(spec.shards, table.num_embeddings)
        except ValueError as error:
            raise ValueError(f"table {table.name!r}: the plan's {error}") from None
    if spec is not None and any(shard.shard_sizes[1] != table.row_width for shard in spec.shards):
        raise ValueError(f"table {table.name!r}: the plan says {kind}; multi-layer tables are not split by columns")
    known = (*EXCHANGES_OF, ShardingType.DATA_PARALLEL.value)
    if kind not in known:
        raise ValueError(f"table {table.name!r}: the plan says {kind}; multi-layer tables are {', '.join(known)}")
    if exchange == "unique_rows" and "unique_rows" not in EXCHANGES_OF.get(kind, EXCHANGES):
        raise ValueError(
            f"table {table.name!r}: the plan says {kind}, and exchange {exchange!r} serves row_wise tables; "
            "'auto', 'after' and 'reduce_scatter' serve all"
        )
    if on_cpu and sharding.compute_kernel in HOST_KERNELS:
        raise ValueError(
            f"table {table.name!r}: the plan says {sharding.compute_kernel}, which is CUDA's memory on the host; on a "
            "CPU all rows are there, with kernel fused"
        )


def check_node(name: str, sharding: ParameterSharding, local_world_size: int) -> None:
    """Raise ValueError unless a table_row_wise plan has a block on each rank of one node, in the order of the ranks.

    Args:
        local_world_size: ranks of a node, or of a pod of nodes (TorchRec's ``TORCHREC_RESOLVED_POD_SIZE``).
    """
    if sharding.sharding_spec is None:
        return
    ranks = [shard.placement.rank() for shard in sharding.sharding_spec.shards]
    first = ranks[0] // local_world_size * local_world_size
    node = list(range(first, first + local_world_size))
    if ranks != node:
        raise ValueError(
            f"table {name!r}: the plan's table_row_wise shards are on ranks {ranks}; with {local_world_size} ranks a "
            f"node (LOCAL_WORLD_SIZE) they lie on {node}"
        )


def check_widths(tables: list[MultiLayerEmbeddingBagConfig]) -> None:
    """Raise ValueError if fbgemm's kernels cannot take the width of a table's rows."""
    for table in tables:
        if table.row_width % 4:
            key = "embedding_dim" if table.hidden_dim is None else "hidden_dim"
            raise ValueError(
                f"table {table.name!r}: {key} is {table.row_width}; fbgemm's kernels take multiples of 4 columns"
            )


def check_rows_dtype(table: MultiLayerEmbeddingBagConfig, sharding: ParameterSharding) -> None:
    """Raise ValueError if half-precision rows would leave a dense gradient, which fbgemm computes in half as well."""
    replicated = sharding.sharding_type == ShardingType.DATA_PARALLEL.value
    if table.data_type == DataType.FP16 and not replicated and sharding.compute_kernel == _DENSE:
        raise ValueError(
            f"table {table.name!r}: rows in FP16 need a fused kernel, and the plan says {_DENSE} (on a CPU, Adam has "
            "no other); use FP32 rows or another optimizer"
        )


def keep_replicated_if_too_small(
    table: MultiLayerEmbeddingBagConfig, sharding: ParameterSharding, world_size: int, on_cpu: bool
) -> None:
    """Make a plan by blocks that leaves a rank without rows data_parallel, in place (``costs.rows_of_rank``).

    fbgemm's CPU kernel fails on no rows.
    """
    if sharding.sharding_type not in BY_BLOCKS or sharding.sharding_spec is None:
        return
    blocks = len(sharding.sharding_spec.shards)
    if rows_of_rank(table.num_embeddings, table.row_width, blocks, on_cpu=on_cpu) is None:
        sharding.sharding_type = ShardingType.DATA_PARALLEL.value
        sharding.compute_kernel = _DENSE
        sharding.ranks = list(range(world_size))
        sharding.sharding_spec = None


def first_row(sharding: ParameterSharding, rank: int) -> int:
    """The first row of the table that ``rank`` holds."""
    if sharding.sharding_spec is None:
        return 0
    shards = sharding.sharding_spec.shards
    return next((shard.shard_offsets[0] for shard in shards if shard.placement.rank() == rank), 0)


def ranks_of_blocks(shards: Sequence[ShardMetadata], num_embeddings: int) -> list[int]:
    """The rank of each block of ``ceil(num_embeddings / R)`` rows; the r-th of ``shards`` is that of rank r.

    Raises:
        ValueError: the shards are not such blocks.
    """
    block = -(-num_embeddings // len(shards))
    starts = [shard.shard_offsets[0] for shard in shards]
    ranks = sorted(range(len(shards)), key=lambda rank: starts[rank])
    if [starts[rank] for rank in ranks] != [min(block * position, num_embeddings) for position in range(len(shards))]:
        raise ValueError(f"row shards start at rows {sorted(starts)}; {len(shards)} ranks take blocks of {block} rows")
    return ranks


def place_blocks(sharding: ParameterSharding, first: int = 0) -> None:
    """Put block b of a plan of R equal blocks on the (b + ``first`` modulo R)-th of its ranks, in place."""
    spec = sharding.sharding_spec
    assert spec is not None
    blocks = sorted(spec.shards, key=lambda shard: shard.shard_offsets[0])
    # TorchRec takes the r-th shard of the list for that of rank r.
    spec.shards = [
        ShardMetadata(
            shard_offsets=list(blocks[(rank - first) % len(blocks)].shard_offsets),
            shard_sizes=list(blocks[(rank - first) % len(blocks)].shard_sizes),
            placement=shard.placement,
        )
        for rank, shard in enumerate(spec.shards)
    ]


def spread_blocks(shardings: Sequence[ParameterSharding]) -> None:
    """Put the first blocks of tables on different ranks: change row_wise plans of equal blocks in place.

    Vocabularies are commonly sorted by frequency. TorchRec puts every table's first block of rows, the one that is
    asked for most, on rank 0, and all ranks wait for it. Here block b of the i-th table lies on rank b + i, or with
    more ranks than tables on rank b + i·(R/T), modulo R. Blocks stay what they were, so checkpoints do, too.
    """
    for index, sharding in enumerate(shardings):
        assert sharding.sharding_spec is not None
        world_size = len(sharding.sharding_spec.shards)
        place_blocks(sharding, index * max(1, world_size // len(shardings)) % world_size)


def keep_gradients_dense(shardings: Sequence[ParameterSharding]) -> None:
    """Have tables leave a dense gradient, as large as a rank's rows, instead of using fused kernels, in place."""
    for sharding in shardings:
        sharding.compute_kernel = _DENSE


def rows_of_rank(num_embeddings: int, row_width: int, blocks: int, *, on_cpu: bool) -> int | None:
    """Rows of the fullest rank of a table split into ``blocks``; None where the sharder replicates it.

    That is where some rank would hold no row and the kernel cannot take that (on the CPU) or holding the table whole
    costs little. With a thousand ranks a table of a million rows may leave the last without.
    """
    block = -(-num_embeddings // blocks)
    all_hold_rows = block * (blocks - 1) < num_embeddings
    cheap = torch.float32.itemsize * num_embeddings * row_width <= REPLICATED_BYTES
    return None if not all_hold_rows and (on_cpu or cheap) else block
