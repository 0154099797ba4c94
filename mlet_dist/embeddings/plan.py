"""What a sharding plan must be for a table, and where it is changed."""

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.types import ParameterSharding, ShardingType

from mlet_dist.embeddings.exchange import ExchangeChoice
from mlet_dist.embeddings.multi_layer import MultiLayerEmbeddingBagConfig


def check_plan(table: MultiLayerEmbeddingBagConfig, sharding: ParameterSharding, exchange: ExchangeChoice) -> None:
    """Raise ValueError if the table's rows are sharded unevenly, or in a way that ``exchange`` cannot serve."""
    kind, spec = sharding.sharding_type, sharding.sharding_spec
    if kind == ShardingType.ROW_WISE.value and spec is not None:
        # TorchRec routes ids by equal blocks, whatever the plan says, and its lookup would find other rows.
        block = -(-table.num_embeddings // len(spec.shards))
        starts = [shard.shard_offsets[0] for shard in spec.shards]
        if starts != [block * rank for rank in range(len(starts))]:
            blocks = f"blocks of {block} rows in the order of the ranks"
            raise ValueError(
                f"table {table.name!r}: the plan's row shards start at rows {starts}; row_wise takes {blocks}"
            )
    elif exchange in ("reduce_scatter", "unique_rows") and kind != ShardingType.DATA_PARALLEL.value:
        raise ValueError(
            f"table {table.name!r}: the plan says {kind}, and exchange {exchange!r} serves row_wise tables; "
            "'after' and 'auto' serve all"
        )


def check_widths(tables: list[MultiLayerEmbeddingBagConfig]) -> None:
    """Raise ValueError if fbgemm's kernels cannot take the width of a table's rows."""
    for table in tables:
        if table.row_width % 4:
            key = "embedding_dim" if table.hidden_dim is None else "hidden_dim"
            raise ValueError(
                f"table {table.name!r}: {key} is {table.row_width}; fbgemm's kernels take multiples of 4 columns"
            )


def keep_replicated_if_too_small(sharding: ParameterSharding, world_size: int) -> None:
    """Make a row_wise plan that leaves a rank without rows data_parallel, since fbgemm's CPU kernel fails there."""
    spec = sharding.sharding_spec
    if sharding.sharding_type != ShardingType.ROW_WISE.value or spec is None:
        return
    if any(shard.shard_sizes[0] == 0 for shard in spec.shards):
        sharding.sharding_type = ShardingType.DATA_PARALLEL.value
        sharding.compute_kernel = EmbeddingComputeKernel.DENSE.value
        sharding.ranks = list(range(world_size))
        sharding.sharding_spec = None


def first_row(sharding: ParameterSharding, rank: int) -> int:
    """The first row of the table that ``rank`` holds."""
    if sharding.sharding_spec is None:
        return 0
    shards = sharding.sharding_spec.shards
    return next((shard.shard_offsets[0] for shard in shards if shard.placement.rank() == rank), 0)
