"""How vectors cross the network under each sharding type, and which way is the cheapest for a table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torchrec.distributed.types import CommOp, ShardingType

Exchange = Literal["after", "reduce_scatter", "all_to_all", "unique_rows"]
"""Where W2 is applied: to what arrives, to sums before they leave a rank, or to distinct rows before they do."""

ExchangeChoice = Literal["auto", "after", "reduce_scatter", "unique_rows"]
EXCHANGES: tuple[Exchange, ...] = ("after", "reduce_scatter", "unique_rows")
"""Those of row_wise tables, which a user may ask for."""

EXCHANGES_OF: dict[str, tuple[Exchange, ...]] = {
    ShardingType.ROW_WISE.value: EXCHANGES,
    ShardingType.TABLE_ROW_WISE.value: ("after", "reduce_scatter"),
    ShardingType.TABLE_WISE.value: ("after", "all_to_all"),
}
"""What serves tables of each sharding type; data_parallel ones exchange nothing."""

COMM_OPS: dict[Exchange, CommOp] = {
    "after": CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER,
    "reduce_scatter": CommOp.POOLED_EMBEDDINGS_REDUCE_SCATTER,
    "all_to_all": CommOp.POOLED_EMBEDDINGS_ALL_TO_ALL,
    "unique_rows": CommOp.SEQUENCE_EMBEDDINGS_ALL_TO_ALL,
}
"""By which name TorchRec's ``qcomm_codecs_registry`` knows the collective of each exchange."""


@dataclass(frozen=True)
class TableTraffic:
    """What decides a table's exchange.

    Attributes:
        num_embeddings: n.
        embedding_dim: d, the width of a vector that is exchanged.
        pooling_factor: ids a bag, on average.
        num_features: features that the table serves.
        local_batch_size: bags a feature on one rank.
    """

    num_embeddings: int
    embedding_dim: int
    pooling_factor: float
    num_features: int
    local_batch_size: int

    def distinct_ids(self, ranks: int = 1) -> float:
        """How many of the ids of ``ranks`` batches differ: of m drawn evenly from n, n·(1 - (1 - 1/n)^m).

        Of ids drawn unevenly, fewer.
        """
        ids = ranks * self.local_batch_size * self.num_features * self.pooling_factor
        return self.num_embeddings * (1 - (1 - 1 / self.num_embeddings) ** ids)


_FLOAT32_BOTH_WAYS = {exchange: 8 for exchange in COMM_OPS}


def choose_exchange(
    table: TableTraffic, world_size: int, value_bytes: Mapping[Exchange, int] = _FLOAT32_BOTH_WAYS
) -> tuple[Exchange, str]:
    """The exchange that sends fewer bytes, forward and backward, and the reason in a few words.

    Both ways send vectors of d values twice. The reduce-scatter sends R-1 copies of the rank's bags. The unique-row
    all-to-all sends each distinct id once, as 8 bytes and as a vector, to the one rank that owns it.

    Args:
        table: what is exchanged.
        world_size: R.
        value_bytes: of a value forward and its gradient backward, on each exchange.
    """
    if world_size == 1:
        return "after", "one rank: nothing crosses the network"
    others = world_size - 1
    bags = table.local_batch_size * table.num_features
    ids = bags * table.pooling_factor
    vector = {exchange: size * table.embedding_dim for exchange, size in value_bytes.items()}
    scatter = bags * others * vector["reduce_scatter"] + 8 * ids * others / world_size
    unique = table.distinct_ids() * others / world_size * (vector["unique_rows"] + 8)
    text = f"up to {unique / bags:,.0f} bytes a bag as unique rows, {scatter / bags:,.0f} reduce-scattered"
    return ("unique_rows" if unique <= scatter else "reduce_scatter"), text
