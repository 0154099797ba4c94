"""Checks of a table's sharding plan, and the in-place changes that the sharder makes to it.

TorchRec splits row_wise and table_row_wise tables of n rows into R equal blocks of ``ceil(n / R)`` rows.
"""

from collections.abc import Sequence

import torch
from torch.distributed._shard.metadata import ShardMetadata
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding, ShardingType
from torchrec.modules.embedding_configs import DataType

from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES, EXCHANGES_OF, ExchangeChoice
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig

REPLICATED_BYTES = 16e6
"""Default limit on the bytes of W1 up to which the planner may replicate a table on every rank."""

HOST_KERNELS = (EmbeddingComputeKernel.FUSED_UVM_CACHING.value, EmbeddingComputeKernel.FUSED_UVM.value)
"""Kernels whose rows are in host memory, with and without a cache on the device."""

BLOCK_SHARDING_TYPES = (ShardingType.ROW_WISE.value, ShardingType.TABLE_ROW_WISE.value)
"""Sharding types that split a table into equal blocks of rows."""

_DENSE = EmbeddingComputeKernel.DENSE.value
_MAX_CUDA_COLUMNS = 2048  # `max_embedding_dim` of the code generator of fbgemm, which checks it in backward alone
_OPTIMIZERS_OF_MOVING_ROWS = ("SGD", "Adagrad", "RowWiseAdagrad", "Adam")
# Not fused_uvm_caching: the cache on the device would have the values that a slot had before a row moved to it.
_KERNELS_OF_MOVING_ROWS = (EmbeddingComputeKernel.FUSED.value, EmbeddingComputeKernel.FUSED_UVM.value)


def check_plan(
    table: MultiLayerEmbeddingBagConfig, sharding: ParameterSharding, exchange: ExchangeChoice, *, on_cpu: bool
) -> None:
    """Check that a table's plan is supported by the multi-layer module, by ``exchange`` and by the device.

    Raises:
        ValueError: the blocks of rows are uneven, the sharding type or the kernel is not supported. The message names
            the table.
    """
    kind, spec = sharding.sharding_type, sharding.sharding_spec
    if spec is not None and kind in BLOCK_SHARDING_TYPES and not table.num_buckets:
        # TorchRec routes ids by equal blocks whatever the plan is, so uneven blocks would return wrong rows.
        try:
            ranks_of_blocks(spec.shards, table.num_embeddings)
        except ValueError as error:
            raise ValueError(f"table {table.name!r}: the plan's {error}") from None
    if spec is not None and any(shard.shard_sizes[1] != table.row_width for shard in spec.shards):
        raise ValueError(f"table {table.name!r}: the plan is {kind}; multi-layer tables cannot be split by columns")
    known = (*EXCHANGES_OF, ShardingType.DATA_PARALLEL.value)
    if table.segments:
        _check_pool(table, sharding, on_cpu=on_cpu)
    if kind not in known:
        raise ValueError(f"table {table.name!r}: the plan is {kind}; multi-layer tables can be {', '.join(known)}")
    if exchange == "unique_rows" and "unique_rows" not in EXCHANGES_OF.get(kind, EXCHANGES):
        raise ValueError(
            f"table {table.name!r}: the plan is {kind}, but exchange {exchange!r} requires row_wise; use 'auto', "
            "'after' or 'reduce_scatter'"
        )
    if on_cpu and sharding.compute_kernel in HOST_KERNELS:
        raise ValueError(
            f"table {table.name!r}: the plan's kernel is {sharding.compute_kernel}, which needs CUDA; on a CPU use "
            "kernel fused, whose rows are in host memory there"
        )


def _check_pool(table: MultiLayerEmbeddingBagConfig, sharding: ParameterSharding, *, on_cpu: bool) -> None:
    """Raise ValueError unless a pool of row ranges is row_wise, and all ranks of a CPU own some of it."""
    kind, spec = sharding.sharding_type, sharding.sharding_spec
    if kind != ShardingType.ROW_WISE.value or spec is None:
        raise ValueError(f"table {table.name!r}: the plan is {kind}; a pool of row ranges must be row_wise")
    if on_cpu and any(shard.shard_sizes[0] == 0 for shard in spec.shards):
        raise ValueError(
            f"table {table.name!r}: a pool of {table.num_embeddings:,} rows leaves some of {len(spec.shards):,} ranks "
            "without rows, which fbgemm's CPU kernel does not support; use more rows of this width or fewer ranks"
        )


def check_node_placement(name: str, sharding: ParameterSharding, local_world_size: int) -> None:
    """Check that a table_row_wise plan has one block on each rank of a single node, in the order of the ranks.

    Args:
        name: the table's name.
        sharding: its plan.
        local_world_size: ranks per node, or per pod of nodes (TorchRec's ``TORCHREC_RESOLVED_POD_SIZE``).

    Raises:
        ValueError: the blocks are on other ranks.
    """
    if sharding.sharding_spec is None:
        return
    ranks = [shard.placement.rank() for shard in sharding.sharding_spec.shards]
    first = ranks[0] // local_world_size * local_world_size
    node = list(range(first, first + local_world_size))
    if ranks != node:
        raise ValueError(
            f"table {name!r}: the plan's table_row_wise shards are on ranks {ranks}; with {local_world_size} ranks per "
            f"node (LOCAL_WORLD_SIZE) they must be on {node}"
        )


def check_widths(tables: list[MultiLayerEmbeddingBagConfig], device: torch.device | None = None) -> None:
    """Raise ValueError if fbgemm's kernels for a device, by default the CPU, do not support the width of a row."""
    for table in tables:
        key = "embedding_dim" if table.hidden_dim is None else "hidden_dim"
        if table.row_width % 4:
            raise ValueError(
                f"table {table.name!r}: {key} is {table.row_width}; fbgemm's kernels need a multiple of 4 columns"
            )
        if device is not None and device.type == "cuda" and table.row_width > _MAX_CUDA_COLUMNS:
            raise ValueError(
                f"table {table.name!r}: {key} is {table.row_width}; fbgemm's CUDA kernels support at most "
                f"{_MAX_CUDA_COLUMNS} columns"
            )


def check_rows_dtype(table: MultiLayerEmbeddingBagConfig, sharding: ParameterSharding) -> None:
    """Raise ValueError if a plan combines FP16 rows with a dense gradient, which fbgemm would compute in FP16, too."""
    replicated = sharding.sharding_type == ShardingType.DATA_PARALLEL.value
    if table.data_type == DataType.FP16 and not replicated and sharding.compute_kernel == _DENSE:
        raise ValueError(
            f"table {table.name!r}: rows in FP16 need a fused kernel, but the plan's kernel is {_DENSE} (on a CPU, "
            "Adam has no fused kernel); use FP32 rows or another optimizer"
        )


def check_moving_rows(
    table: MultiLayerEmbeddingBagConfig, sharding: ParameterSharding, optimizers: Sequence[type]
) -> None:
    """Raise ValueError if rows of a pool of adaptive tables cannot move with its optimizer or its plan's kernel.

    Args:
        table: the pool.
        sharding: its plan.
        optimizers: the classes that were passed to apply_optimizer_in_backward; none for the kernel's own optimizer.
    """
    names = [kind.__name__ for kind in optimizers]
    unknown = [name for name in names if name not in _OPTIMIZERS_OF_MOVING_ROWS]
    if unknown:
        raise ValueError(
            f"table {table.name!r}: rows that move between widths cannot have optimizer {unknown[0]}; use "
            f"{', '.join(_OPTIMIZERS_OF_MOVING_ROWS)}"
        )
    kernels = (*_KERNELS_OF_MOVING_ROWS, _DENSE) if "Adam" in names else _KERNELS_OF_MOVING_ROWS  # LazyAdam's is dense
    if sharding.compute_kernel not in kernels:
        raise ValueError(
            f"table {table.name!r}: rows that move between widths cannot have kernel {sharding.compute_kernel}; use "
            f"{' or '.join(_KERNELS_OF_MOVING_ROWS)}"
        )


def replicate_if_too_small(
    table: MultiLayerEmbeddingBagConfig, sharding: ParameterSharding, world_size: int, on_cpu: bool
) -> None:
    """Change a plan by blocks to data_parallel, in place, if ``max_rows_per_rank`` returns None for it."""
    if sharding.sharding_type not in BLOCK_SHARDING_TYPES or sharding.sharding_spec is None:
        return
    blocks = len(sharding.sharding_spec.shards)
    if max_rows_per_rank(table.num_embeddings, table.row_width, blocks, on_cpu=on_cpu) is None:
        sharding.sharding_type = ShardingType.DATA_PARALLEL.value
        sharding.compute_kernel = _DENSE
        sharding.ranks = list(range(world_size))
        sharding.sharding_spec = None


def place_blocks(sharding: ParameterSharding, first: int = 0) -> None:
    """Place block b of a plan of R equal blocks on the rank with index (b + ``first``) mod R, in place."""
    spec = sharding.sharding_spec
    assert spec is not None
    blocks = sorted(spec.shards, key=lambda shard: shard.shard_offsets[0])
    # TorchRec assumes that the r-th shard of the list is on rank r.
    spec.shards = [
        ShardMetadata(
            shard_offsets=list(blocks[(rank - first) % len(blocks)].shard_offsets),
            shard_sizes=list(blocks[(rank - first) % len(blocks)].shard_sizes),
            placement=shard.placement,
        )
        for rank, shard in enumerate(spec.shards)
    ]


def place_buckets(table: MultiLayerEmbeddingBagConfig, sharding: ParameterSharding) -> None:
    """Change the blocks of a pool of adaptive tables to whole buckets (``SlotLayout.first_bucket``), in place.

    Raises:
        ValueError: there are more ranks than buckets.
    """
    spec = sharding.sharding_spec
    assert spec is not None
    buckets, ranks = table.num_buckets, len(spec.shards)
    if ranks > buckets:
        raise ValueError(
            f"table {table.name!r}: its slots are in {buckets} buckets, of which {ranks} ranks cannot each own "
            "one; use fewer ranks"
        )
    slots = table.num_embeddings // buckets
    starts = [rank * buckets // ranks * slots for rank in range(ranks + 1)]
    spec.shards = [
        ShardMetadata(
            shard_offsets=[starts[rank], 0],
            shard_sizes=[starts[rank + 1] - starts[rank], table.row_width],
            placement=shard.placement,
        )
        for rank, shard in enumerate(spec.shards)
    ]


def stagger_blocks(shardings: Sequence[ParameterSharding]) -> None:
    """Place the first blocks of the tables on different ranks, in place; the plans are row_wise.

    Blocks have nearly equal shares of the requests (``row_order``), but those with one frequent row more than others
    are the same in every table, and the last blocks of small tables have few rows. So block b of the i-th table is on
    rank (b + i) mod R. The blocks themselves do not change, so checkpoints do not change either.
    """
    for index, sharding in enumerate(shardings):
        assert sharding.sharding_spec is not None
        world_size = len(sharding.sharding_spec.shards)
        place_blocks(sharding, index % world_size)


def use_dense_kernels(shardings: Sequence[ParameterSharding]) -> None:
    """Replace fused kernels by dense ones, in place. Their gradient is dense, as large as a rank's rows."""
    for sharding in shardings:
        sharding.compute_kernel = _DENSE


def max_rows_per_rank(num_embeddings: int, row_width: int, blocks: int, *, on_cpu: bool) -> int | None:
    """Return the most rows of a rank if a table is split into ``blocks``, or None if the sharder replicates the table.

    The sharder replicates a table if some rank would own no rows and either the kernel does not support that (fbgemm's
    CPU kernel fails) or the table is small (``REPLICATED_BYTES``). With a thousand ranks, even a table of a million
    rows may leave the last rank without rows.
    """
    block = -(-num_embeddings // blocks)
    all_own_rows = block * (blocks - 1) < num_embeddings
    small = torch.float32.itemsize * num_embeddings * row_width <= REPLICATED_BYTES
    return None if not all_own_rows and (on_cpu or small) else block


def first_row(sharding: ParameterSharding, rank: int) -> int:
    """Return the first row of the table that ``rank`` owns."""
    if sharding.sharding_spec is None:
        return 0
    shards = sharding.sharding_spec.shards
    return next((shard.shard_offsets[0] for shard in shards if shard.placement.rank() == rank), 0)


def ranks_of_blocks(shards: Sequence[ShardMetadata], num_embeddings: int) -> list[int]:
    """Return the rank of each block of ``ceil(num_embeddings / R)`` rows; the r-th of ``shards`` is on rank r.

    Raises:
        ValueError: the shards are not such blocks.
    """
    block = -(-num_embeddings // len(shards))
    starts = [shard.shard_offsets[0] for shard in shards]
    ranks = sorted(range(len(shards)), key=lambda rank: starts[rank])
    if [starts[rank] for rank in ranks] != [min(block * position, num_embeddings) for position in range(len(shards))]:
        raise ValueError(
            f"row shards start at rows {sorted(starts)}; with {len(shards)} ranks they must be blocks of {block} rows"
        )
    return ranks
