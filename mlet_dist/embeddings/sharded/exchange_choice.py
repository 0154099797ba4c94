"""The exchanges of each sharding type, and what decides the exchange of a table (``choose_exchange``).

An exchange is the collective that brings a table's vectors from the owner ranks to the rank of their batch, together
with the place where W2 is applied:

- ``after``: TorchRec's exchange of k-dimensional sums; the receiving rank applies W2.
- ``reduce_scatter``: the owner ranks apply W2 to partial sums of bags; a reduce-scatter adds up d-dimensional vectors.
- ``all_to_all``: the same for table_wise tables, whose sums are complete on one rank.
- ``unique_rows``: the owner rank applies W2 to each distinct row and sends it; the receiving rank pools.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torchrec.distributed.types import CommOp, ShardingType

Exchange = Literal["after", "reduce_scatter", "all_to_all", "unique_rows"]
"""The exchange of a table."""

ExchangeChoice = Literal["auto", "after", "reduce_scatter", "unique_rows"]
"""What a user may request for a table."""

EXCHANGES: tuple[Exchange, ...] = ("after", "reduce_scatter", "unique_rows")
"""The exchanges of row_wise tables, which are also those that a user may request."""

EXCHANGES_OF: dict[str, tuple[Exchange, ...]] = {
    ShardingType.ROW_WISE.value: EXCHANGES,
    ShardingType.TABLE_ROW_WISE.value: ("after", "reduce_scatter"),
    ShardingType.TABLE_WISE.value: ("after", "all_to_all"),
}
"""The exchanges of each sharding type; data_parallel tables exchange no vectors."""

COMM_OPS: dict[Exchange, CommOp] = {
    "after": CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER,
    "reduce_scatter": CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER,
    "all_to_all": CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL,
    "unique_rows": CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL,
}
"""The key of each exchange's collective in TorchRec's ``qcomm_codecs_registry``."""

_FEWEST_BAGS = 512
"""On a single rank, with fewer bags finding the distinct ids takes longer than it saves; measured at 128 and 1,024."""

_FLOAT32_BYTES = {exchange: 8 for exchange in COMM_OPS}


@dataclass(frozen=True)
class TableTraffic:
    """The sizes that determine a table's traffic.

    Attributes:
        num_embeddings: n.
        embedding_dim: d, the width of the exchanged vectors.
        pooling_factor: the average number of ids per bag.
        num_features: the number of features that the table serves.
        local_batch_size: b, the number of bags per feature on one rank.
    """

    num_embeddings: int
    embedding_dim: int
    pooling_factor: float
    num_features: int
    local_batch_size: int

    def distinct_ids(self, ranks: int = 1) -> float:
        """Return the expected number of distinct ids in the batches of ``ranks`` ranks.

        Of m ids drawn uniformly from n it is n·(1 - (1 - 1/n)^m). For any other distribution it is lower.
        """
        ids = ranks * self.local_batch_size * self.num_features * self.pooling_factor
        return self.num_embeddings * (1 - (1 - 1 / self.num_embeddings) ** ids)


def choose_exchange(
    requested: ExchangeChoice,
    sharding_type: str,
    table: TableTraffic,
    world_size: int,
    value_bytes: Mapping[Exchange, int] = _FLOAT32_BYTES,
    *,
    has_projection: bool,
    on_cpu: bool,
) -> tuple[Exchange, str]:
    """Return the exchange of a table, and the reason in a few words.

    Row_wise tables have the requested exchange, or under ``auto`` that of ``cheapest_exchange``. The other sharding
    types have one exchange beside ``after``, and use it unless ``after`` is requested.

    Args:
        requested: the exchange that the user chose for the table.
        sharding_type: the table's sharding type in the plan; not data_parallel, which exchanges nothing.
        table, world_size, value_bytes, on_cpu: as in ``cheapest_exchange``.
        has_projection: whether the table has a W2.
    """
    if sharding_type == ShardingType.ROW_WISE.value:
        if requested != "auto":
            return requested, "asked for"
        return cheapest_exchange(table, world_size, value_bytes, on_cpu=on_cpu)
    if requested == "after":
        return "after", "asked for"
    before = EXCHANGES_OF[sharding_type][-1]
    if requested == before:
        return before, "asked for"
    projected = "are projected before they " if has_projection else ""
    return before, f"sums {projected}cross the network"


def cheapest_exchange(
    table: TableTraffic, world_size: int, value_bytes: Mapping[Exchange, int] = _FLOAT32_BYTES, *, on_cpu: bool
) -> tuple[Exchange, str]:
    """Return the exchange of a row_wise table that sends fewer bytes in forward and backward.

    A single rank sends none. On a CPU it has ``unique_rows`` if there are at least ``_FEWEST_BAGS`` bags, and no more
    distinct rows are expected than bags: never more where bags hold one id. Otherwise it has ``after``. (On CUDA, where
    the host would have to wait, nothing was measured.)

    With several ranks both candidates send d-dimensional vectors forward and their gradients backward. Per bag the
    reduce-scatter sends R-1 partial sums. The all-to-all of unique rows sends each distinct id (8 bytes) and its vector
    once, between the requesting rank and the owner rank.

    Args:
        table: sizes of the table and its batch.
        world_size: R.
        value_bytes: for each exchange, the bytes of a value in forward plus its gradient in backward.
        on_cpu: whether the ranks compute on a CPU.

    Returns:
        The exchange, and the reason in a few words.
    """
    bags = table.local_batch_size * table.num_features
    if world_size == 1 and on_cpu and bags >= _FEWEST_BAGS and table.distinct_ids() <= bags:
        return "unique_rows", "one rank: a row that a batch has several times is looked up once"
    if world_size == 1:
        return "after", "one rank: nothing crosses the network"
    others = world_size - 1
    ids = bags * table.pooling_factor
    vector = {exchange: size * table.embedding_dim for exchange, size in value_bytes.items()}
    scatter = bags * others * vector["reduce_scatter"] + 8 * ids * others / world_size
    unique = table.distinct_ids() * others / world_size * (vector["unique_rows"] + 8)
    text = f"up to {unique / bags:,.0f} bytes a bag as unique rows, {scatter / bags:,.0f} reduce-scattered"
    return ("unique_rows" if unique <= scatter else "reduce_scatter"), text
