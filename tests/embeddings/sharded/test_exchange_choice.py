"""Bytes sent by each exchange, and the automatic choice of an exchange."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward

from benchmarks.traffic import Traffic, count_traffic
from mlet_dist.embeddings import (
    MultiLayerEmbeddingBagCollection,
    MultiLayerEmbeddingBagCollectionSharder,
    MultiLayerEmbeddingBagConfig,
)
from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.embeddings.sharded.collectives import CommPrecision, exchange_codecs
from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES, Exchange, TableTraffic, cheapest_exchange
from tests.helpers.ranks import RankPool
from tests.helpers.sharded_module import planner

Ranks = Callable[[int], RankPool]
TABLES, ROWS, D, K, LOCAL_BATCH = 26, 1000, 16, 64, 128
FP32: tuple[CommPrecision, CommPrecision] = ("fp32", "fp32")


class _RowWise(EmbeddingBagCollectionSharder):
    def sharding_types(self, compute_device_type: str) -> list[str]:
        return ["row_wise"]


def _build(
    exchange: str | None, pooling_factor: float = 1.0, precision: tuple[CommPrecision, CommPrecision] = FP32
) -> DistributedModelParallel:
    """Build a sharded collection; with exchange None it is TorchRec's own, of d columns."""
    names = [f"t{index}" for index in range(TABLES)]
    common: dict[str, Any] = {"num_embeddings": ROWS, "embedding_dim": D}
    meta = torch.device("meta")
    sharder: EmbeddingBagCollectionSharder
    if exchange is None:
        tables = [EmbeddingBagConfig(name=name, feature_names=[name], **common) for name in names]
        embeddings, sharder = EmbeddingBagCollection(tables, device=meta), _RowWise()
    else:
        layers = [MultiLayerEmbeddingBagConfig(name=n, feature_names=[n], hidden_dim=K, **common) for n in names]
        embeddings = MultiLayerEmbeddingBagCollection(layers, device=meta)
        factors = {name: pooling_factor for name in names}
        sharder = MultiLayerEmbeddingBagCollectionSharder(
            exchange=exchange,
            pooling_factors=factors,
            local_batch_size=LOCAL_BATCH,
            qcomm_codecs_registry=exchange_codecs(*precision),
        )
    apply_optimizer_in_backward(torch.optim.SGD, embeddings.embedding_bags.parameters(), {"lr": 0.1})
    model = torch.nn.Sequential(embeddings)
    plan = planner(embeddings).collective_plan(model, [sharder], dist.group.WORLD)
    return DistributedModelParallel(model, device=torch.device("cpu"), plan=plan, sharders=[sharder])


def _batch(ids_a_bag: int) -> KeyedJaggedTensor:
    """Draw Zipf-like ids, different ones on each rank."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    bags = TABLES * LOCAL_BATCH
    values = (ROWS ** torch.rand(bags * ids_a_bag, generator=generator)).long().clamp(0, ROWS - 1)
    lengths = torch.full((bags,), ids_a_bag)
    return KeyedJaggedTensor([f"t{index}" for index in range(TABLES)], values, lengths=lengths)


def _vector_bytes(
    exchange: str | None, ids_a_bag: int = 1, precision: tuple[CommPrecision, CommPrecision] = FP32
) -> tuple[int, int, int]:
    """Return the bytes of vectors sent, the bytes of gradients sent, and the distinct ids owned by other ranks."""
    model, batch = _build(exchange, ids_a_bag, precision), _batch(ids_a_bag)
    model(batch).values()  # the first forward pass includes lazy initialization
    with count_traffic() as forward:
        output = model(batch).values()
    with count_traffic() as backward:
        output.sum().backward()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    block = -(-ROWS // world_size)
    per_table = [ids.unique() for ids in batch.values().view(TABLES, -1)]
    stored = [RowOrder((ROWS,)).stored_rows(ids) for ids in per_table]
    requested = sum(int(((rows // block + table) % world_size != rank).sum()) for table, rows in enumerate(stored))
    return forward.vector_bytes, backward.vector_bytes, requested


@pytest.mark.multirank
@pytest.mark.parametrize("world_size", [2, 4])
def test_mlet_sends_what_a_single_layer_sends_or_less(ranks: Ranks, world_size: int) -> None:
    pool = ranks(world_size)
    single, after, scattered, unique = (
        pool.run(_vector_bytes, exchange) for exchange in (None, "after", "reduce_scatter", "unique_rows")
    )
    matrix = LOCAL_BATCH * (world_size - 1) * TABLES * D * 4
    for rank in range(world_size):
        assert single[rank][:2] == (matrix, matrix)
        assert scattered[rank][:2] == (matrix, matrix)
        assert after[rank][:2] == (matrix * K // D, matrix * K // D)
        sent = sum(unique[rank][:2])
        assert 0 < sent <= 2 * matrix
    # Each distinct row is sent once to the rank that requested it, and its gradient is sent back once.
    requested = sum(each[2] for each in unique) * D * 4
    assert sum(each[0] for each in unique) == requested
    assert sum(each[1] for each in unique) == requested


@pytest.mark.multirank
@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("world_size", [2, 4])
def test_quantised_communication_sends_half_the_bytes(ranks: Ranks, world_size: int, exchange: str) -> None:
    pool = ranks(world_size)
    full = pool.run(_vector_bytes, exchange)
    for precision, (forward, backward) in {
        ("fp16", "bf16"): (2, 2),
        ("bf16", "fp16"): (2, 2),
        ("fp16", "fp32"): (2, 1),
        ("fp32", "bf16"): (1, 2),
    }.items():
        found = pool.run(_vector_bytes, exchange, 1, precision)
        assert [each[:2] for each in found] == [(each[0] // forward, each[1] // backward) for each in full]
        assert all(each[0] > 0 and each[1] > 0 for each in found)


@pytest.mark.multirank
@pytest.mark.parametrize("ids_a_bag", [1, 50])
def test_auto_is_the_cheaper_of_the_two(ranks: Ranks, ids_a_bag: int) -> None:
    sent = {
        exchange: sum(sum(each[:2]) for each in ranks(4).run(_vector_bytes, exchange, ids_a_bag))
        for exchange in ("auto", "reduce_scatter", "unique_rows")
    }
    assert sent["auto"] == min(sent["reduce_scatter"], sent["unique_rows"])
    assert sent["reduce_scatter"] != sent["unique_rows"]


def test_cheapest_exchange_by_hand() -> None:
    def choose(
        pooling_factor: float, world_size: int, rows: int = 10**6, features: int = 1, on_cpu: bool = False
    ) -> str:
        table = TableTraffic(rows, 16, pooling_factor, features, 512)
        return cheapest_exchange(table, world_size, on_cpu=on_cpu)[0]

    assert choose(1, 1) == "after"
    assert choose(1, 1, on_cpu=True) == "unique_rows"
    assert choose(1, 1, features=2, on_cpu=True) == "unique_rows"
    assert choose(50, 1, on_cpu=True) == "after"  # 25,279 distinct rows against the sums of 512 bags
    assert choose(50, 1, rows=500, on_cpu=True) == "unique_rows"
    assert cheapest_exchange(TableTraffic(10**6, 16, 1.0, 1, 128), 1, on_cpu=True)[0] == "after"
    assert choose(1, 2) == "unique_rows"
    assert choose(50, 2) == "reduce_scatter"
    assert choose(50, 1024) == "unique_rows"  # 1,023 copies of a bag against 50 ids
    assert choose(50, 2, rows=100) == "unique_rows"  # at most 100 distinct rows, whatever the bags hold
    chosen, reason = cheapest_exchange(TableTraffic(10**6, 16, 1.0, 1, 512), 2, on_cpu=False)
    # Unique rows: two vectors of 16 float32 and an id, half of which stay on the local rank. Reduce-scatter: two
    # vectors to one other rank, and half an id.
    assert (chosen, reason) == ("unique_rows", "up to 68 bytes a bag as unique rows, 132 reduce-scattered")


def test_cheapest_exchange_uses_the_bytes_of_a_value_on_the_network() -> None:
    table = TableTraffic(10**6, 4, 5.0, 1, 512)
    # With half the bytes per value, ids take as many bytes as before.
    assert cheapest_exchange(table, 4, on_cpu=False)[0] == "reduce_scatter"
    assert cheapest_exchange(table, 8, on_cpu=False)[0] == "unique_rows"
    half: dict[Exchange, int] = {"after": 4, "reduce_scatter": 4, "unique_rows": 4}
    assert cheapest_exchange(TableTraffic(10**6, 16, 1.0, 1, 512), 2, half, on_cpu=False) == (
        "unique_rows",
        "up to 36 bytes a bag as unique rows, 68 reduce-scattered",
    )
    half["unique_rows"] = 16
    assert cheapest_exchange(TableTraffic(10**6, 16, 1.0, 1, 512), 2, half, on_cpu=False)[0] == "reduce_scatter"


def test_an_unknown_exchange_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'fastest'.*auto, after, reduce_scatter, unique_rows"):
        MultiLayerEmbeddingBagCollectionSharder(exchange="fastest")  # type: ignore[arg-type]


def test_count_traffic_counts_bytes_sent_to_other_ranks(ranks: Ranks) -> None:
    found = ranks(2).run(_known_traffic)
    for traffic in found:
        assert traffic.calls == [
            ("all_to_all_single", torch.float32, 2 * 3 * 4),
            ("all_to_all_single", torch.int64, 8),
            ("reduce_scatter", torch.float32, 5 * 4),
            ("all_gather", torch.float32, 5 * 4),
            ("all_reduce", torch.float32, 7 * 4),
            ("all_reduce", torch.int64, 8),
        ]
        assert (traffic.vector_bytes, traffic.index_bytes, traffic.weight_bytes) == (24 + 20 + 20, 8 + 8, 28)


def _known_traffic() -> Traffic:
    rank = dist.get_rank()
    send = [1, 2] if rank == 0 else [2, 1]
    receive = [1, 2] if rank == 0 else [2, 1]
    with count_traffic() as traffic:
        dist.all_to_all_single(torch.empty(3, 3), torch.ones(3, 3), receive, send)
        dist.all_to_all_single(torch.empty(2, dtype=torch.int64), torch.ones(2, dtype=torch.int64))
        dist.reduce_scatter_tensor(torch.empty(5), torch.ones(10))
        dist.all_gather_into_tensor(torch.empty(10), torch.ones(5))
        dist.all_reduce(torch.ones(7))
        dist.all_reduce(torch.ones(1, dtype=torch.int64))
    return traffic
