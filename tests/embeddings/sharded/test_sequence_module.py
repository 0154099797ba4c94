"""The sharded collection of sequences against the dense float64 reference, on 1, 2 and 3 ranks."""

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torchrec import EmbeddingConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from benchmarks.traffic import count_traffic
from mlet_dist.embeddings import (
    MultiLayerEmbeddingCollection,
    MultiLayerEmbeddingCollectionSharder,
    MultiLayerEmbeddingConfig,
)
from tests.helpers.dense_reference import Bags, DenseReference, toy_loss
from tests.helpers.pairwise import pairwise
from tests.helpers.ranks import RankFailed, RankPool
from tests.helpers.sharded_module import (
    OPTIMIZERS,
    dense_tables,
    full_weights,
    make_positive,
    optimizer_of,
    shard,
    to_kjt,
    unsharded_weights,
)

pytestmark = pytest.mark.multirank

Ranks = Callable[[int], RankPool]
RATES = {"rows": 0.05, "projections": 0.02}
SEED, STEPS, GLOBAL_BATCH = 11, 3, 12
SIZES = {"history": 101, "item": 101, "brand": 40, "tiny": 2, "twice": 60}


def _tables() -> list[EmbeddingConfig]:
    def table(name: str, n: int, k: int | None, features: list[str]) -> MultiLayerEmbeddingConfig:
        return MultiLayerEmbeddingConfig(
            name=name, num_embeddings=n, embedding_dim=4, hidden_dim=k, feature_names=features
        )

    return [
        table("products", 101, 16, ["history", "item"]),
        EmbeddingConfig(name="brands", num_embeddings=40, embedding_dim=4, feature_names=["brand"]),
        table("two_rows", 2, 8, ["tiny"]),  # replicated on 3 ranks
        table("wide", 60, 16, ["twice"]),
        table("narrow", 60, 4, ["twice"]),
    ]


def _module(**more: Any) -> MultiLayerEmbeddingCollection:
    return make_positive(MultiLayerEmbeddingCollection(_tables(), seed=SEED, **more))


def _bags(seed: int, rows: int = GLOBAL_BATCH) -> Bags:
    """Draw sequences of 0 to 6 ids with repeats, with a factor for each; some are empty."""
    draw = random.Random(seed)
    bags = {
        name: [[(draw.randrange(n), draw.uniform(0.5, 2.0)) for _ in range(draw.randint(0, 6))] for _ in range(rows)]
        for name, n in SIZES.items()
    }
    bags["item"] = [[(draw.randrange(101), 1.0)] for _ in range(rows)]
    if rows:
        bags["history"][0] = []
        bags["history"][-1] = [(7, 1.0), (7, 0.5), (3, 2.0), (7, 1.0)]
    return bags


def _weighed(found: Any, bags: Bags) -> dict[str, torch.Tensor]:
    """Return sums of the sequences ``(B, d)`` by key, in which each position has the factor of its id."""
    sums = {}
    for key in ("brand", "history", "item", "tiny", "twice@narrow", "twice@wide"):
        sequence = found[key]
        assert isinstance(sequence, JaggedTensor)
        of_feature = bags[key.split("@")[0]]
        assert sequence.lengths().tolist() == [len(bag) for bag in of_feature]
        factors = torch.tensor([factor for bag in of_feature for _, factor in bag]).view(-1, 1)
        row = torch.repeat_interleave(torch.arange(len(of_feature)), sequence.lengths())
        zero = sequence.values().new_zeros(len(of_feature), 4)
        sums[key] = zero.index_add(0, row, sequence.values() * factors)
    return sums


def _share(bags: Bags, first: int, last: int) -> Bags:
    return {name: rows[first:last] for name, rows in bags.items()}


def _shares(step: int, world_size: int, empty_rank: int | None) -> list[Bags]:
    """Return the batch of each rank; ``empty_rank`` has no row in one step and only empty sequences in another."""
    size = GLOBAL_BATCH // world_size
    bags = _bags(step)
    shares = [_share(bags, rank * size, (rank + 1) * size) for rank in range(world_size)]
    if empty_rank is not None and step == 0:
        shares[empty_rank] = _share(bags, 0, 0)
    if empty_rank is not None and step == 1:
        shares[empty_rank] = {name: [[] for _ in rows] for name, rows in shares[empty_rank].items()}
    return shares


def _mean_loss(sums: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the sum of the rows' losses over the rows of a rank's full batch, so that it may have none."""
    rows = next(iter(sums.values())).shape[0]
    share = GLOBAL_BATCH // dist.get_world_size()
    return toy_loss(sums) * rows / share if rows else sum(each.sum() for each in sums.values())


def _train(optimizer: str, empty_rank: int | None, weighted: bool) -> dict[str, Any]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    model = shard(_module(), optimizer)
    initial = full_weights(model)
    stepper = optimizer_of(model, optimizer, RATES)
    outputs = []
    for step in range(STEPS):
        stepper.zero_grad()
        bags = _shares(step, world_size, empty_rank)[rank]
        sums = _weighed(model(to_kjt(bags, 0, GLOBAL_BATCH, weighted)), bags)
        _mean_loss(sums).backward()
        stepper.step()
        outputs.append({name: each.detach() for name, each in sums.items()})
    plan = next(iter(model.plan.plan.values()))
    return {
        "initial": initial,
        "outputs": outputs,
        "weights": full_weights(model),
        "sharding": {name: sharding.sharding_type for name, sharding in plan.items()},
        "state": sorted(model.state_dict()),
        "optimizer": sorted(model.fused_optimizer.params),
    }


@pytest.mark.parametrize(
    ("world_size", "optimizer", "has_empty_rank", "weighted"),
    pairwise([1, 2, 3], OPTIMIZERS, [False, True], [False, True]),
)
def test_outputs_and_weights_equal_the_dense_reference(
    ranks: Ranks, world_size: int, optimizer: str, has_empty_rank: bool, weighted: bool
) -> None:
    empty_rank = world_size - 1 if has_empty_rank else None
    by_rank = ranks(world_size).run(_train, optimizer, empty_rank, weighted)
    module = _module()
    reference = DenseReference(dense_tables(module), optimizer, RATES)
    for name, tensor in unsharded_weights(module).items():
        assert torch.equal(by_rank[0]["initial"][name], tensor), name
    for step in range(STEPS):
        shares = _shares(step, world_size, empty_rank)
        together = {name: [row for share in shares for row in share[name]] for name in SIZES}
        missing = GLOBAL_BATCH - len(together["item"])  # empty sequences change neither the sum of losses nor a weight
        expected = reference.step({name: rows + missing * [[]] for name, rows in together.items()})
        for name, values in expected.items():
            found = torch.cat([result["outputs"][step][name] for result in by_rank])
            torch.testing.assert_close(found.double(), values[: GLOBAL_BATCH - missing], rtol=2e-5, atol=2e-6)
    for table in reference.tables:
        for result in by_rank:
            found = result["weights"][f"embeddings.{table.name}.weight"]
            torch.testing.assert_close(found.double(), table.rows.detach(), rtol=2e-5, atol=2e-6)
            if table.projection is not None:
                found = result["weights"][f"projections.{table.name}.weight"]
                torch.testing.assert_close(found.double(), table.projection.detach(), rtol=2e-5, atol=2e-6)
    names = [f"0.embeddings.{table.name}.weight" for table in reference.tables]
    projections = [f"0.projections.{each.name}.weight" for each in reference.tables if each.projection is not None]
    replicated = {"two_rows"} if world_size == 3 else set()
    for result in by_rank:
        assert result["state"] == sorted(names + projections)
        assert {name for name, kind in result["sharding"].items() if kind == "data_parallel"} == replicated
        fused = [] if optimizer == "adam" else [name for name in names if name.split(".")[2] not in replicated]
        assert result["optimizer"] == sorted(fused)


def _bytes_of_a_step() -> tuple[list[tuple[str, torch.dtype, int]], int, int]:
    """Return the collectives of a step, the distinct ids that other ranks own, and all ids of the batch."""
    tables = [
        MultiLayerEmbeddingConfig(
            name=f"t{index}",
            num_embeddings=1000,
            embedding_dim=8,
            hidden_dim=64,
            feature_names=[f"f{index}", f"g{index}"],
        )
        for index in range(3)
    ]
    model = shard(MultiLayerEmbeddingCollection(tables, device=torch.device("meta")))
    draw = torch.Generator().manual_seed(dist.get_rank())
    lengths = torch.randint(0, 8, (6 * 5,), generator=draw)
    ids = torch.randint(0, 30, (int(lengths.sum()),), generator=draw)
    batch = KeyedJaggedTensor([f"{kind}{index}" for index in range(3) for kind in "fg"], ids, lengths=lengths)
    parts, away = batch.to_dict(), 0
    model(batch)["f0"].values()  # the first forward pass includes lazy initialization
    with count_traffic() as sent:
        found = model(batch)
        torch.cat([found[name].values() for name in parts]).sum().backward()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    for index, table in enumerate(model.module[0]._row_tables):
        distinct = torch.cat([parts[f"f{index}"].values(), parts[f"g{index}"].values()]).unique()
        block = -(-1000 // world_size)
        away += int(((table.row_order.stored_rows(distinct) // block + index) % world_size != rank).sum())
    return sent.calls, away, ids.numel()


@pytest.mark.parametrize("world_size", [2, 3])
def test_vectors_of_d_columns_are_sent_once_for_each_distinct_id_in_four_collectives(
    ranks: Ranks, world_size: int
) -> None:
    by_rank = ranks(world_size).run(_bytes_of_a_step)
    for calls, _, _ in by_rank:
        kinds = [(name, dtype) for name, dtype, _ in calls]
        assert kinds == 2 * [("all_to_all_single", torch.int64)] + 2 * [("all_to_all_single", torch.float32)] + [
            ("all_reduce", torch.float32)  # of the gradients of W2
        ]
    distinct = sum(away for _, away, _ in by_rank)
    vectors, gradients = (sum(calls[index][2] for calls, _, _ in by_rank) for index in (2, 3))
    assert vectors == gradients == distinct * 8 * 4
    assert distinct < sum(ids for *_, ids in by_rank) / 2


@torch.fx.wrap
def _loss_of(sequences: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dense = [sequences[key].to_padded_dense(6) for key in ("brand", "history", "item", "tiny", "twice@narrow")]
    found = torch.cat(dense, dim=2)
    return (found.sum(dim=(1, 2)) ** 2).mean(), found.detach()


class _Tensors(torch.nn.Module):
    """A model that maps a batch to a loss and outputs, as TorchRec's pipelines require."""

    def __init__(self, embeddings: torch.nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _loss_of(self.embeddings(features))


def _train_with(how: str) -> dict[str, torch.Tensor]:
    rank, share = dist.get_rank(), GLOBAL_BATCH // dist.get_world_size()
    batches = [to_kjt(_bags(step), rank * share, (rank + 1) * share) for step in range(STEPS)]
    model = shard(_module(), "adagrad", around=_Tensors)
    optimizer = optimizer_of(model, "adagrad", RATES)
    factors = model.module.embeddings.defer_gradients() if how == "deferred" else {}
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    iterator = iter(batches)
    for batch in batches:
        if how == "pipelined":
            pipeline.progress(iterator)
            continue
        optimizer.zero_grad()
        model(batch)[0].backward()
        for parameter, factor in factors.items():
            parameter.grad *= factor
            dist.all_reduce(parameter.grad)
        optimizer.step()
    return full_weights(model)


def test_pipelined_training_and_deferred_gradients_equal_plain_training(ranks: Ranks) -> None:
    plain, pipelined, deferred = (ranks(3).run(_train_with, each)[1] for each in ("plain", "pipelined", "deferred"))
    assert len(plain) == 5 + 4
    for name, tensor in plain.items():
        assert torch.equal(pipelined[name], tensor), name
        # DDP divides the gradients of replicated rows, where the caller multiplies by a factor.
        torch.testing.assert_close(deferred[name], tensor, rtol=2e-5, atol=1e-7)


def _collapsed_and_indices() -> tuple[list[torch.Tensor], list[torch.Tensor], list[bool]]:
    """Return the vectors of the served and of the trained collection, which have the same weights."""
    served = _module(need_indices=True).collapse()
    model = shard(_module(need_indices=True))
    state = {name.removeprefix("0."): each for name, each in model.state_dict().items()}
    other = shard(MultiLayerEmbeddingCollection(_tables(), torch.device("meta"), need_indices=True))
    other.load_state_dict(model.state_dict())
    batch = to_kjt(_bags(dist.get_rank()), 0, GLOBAL_BATCH)
    expected, found, loaded = served(batch), model(batch), other(batch)
    assert sorted(state) == sorted(_module().state_dict())
    same = [torch.equal(found[key].values(), loaded[key].values()) for key in expected]
    same += [torch.equal(found[key].weights(), expected[key].weights()) for key in expected]
    return (
        [expected[key].values().detach() for key in expected],
        [found[key].values().detach() for key in expected],
        same,
    )


def test_the_collapsed_collection_and_a_loaded_one_return_the_same_vectors(ranks: Ranks) -> None:
    for expected, found, same in ranks(3).run(_collapsed_and_indices):
        assert same == 12 * [True]
        for one, other in zip(expected, found, strict=True):
            assert len(one)
            torch.testing.assert_close(other, one, rtol=1e-5, atol=2e-6)


def _refused(what: str) -> None:
    bags = _bags(0)
    model: DistributedModelParallel = shard(_module())
    batch = to_kjt(bags, 0, GLOBAL_BATCH)
    if dist.get_rank() == dist.get_world_size() - 1:
        if what == "an id":
            batch.values()[len([each for row in bags["history"] for each in row])] = 101  # of the candidate
        if what == "missing":
            batch = to_kjt({name: rows for name, rows in bags.items() if name != "brand"}, 0, GLOBAL_BATCH)
    if what == "varying":
        keys = batch.keys()
        batch = KeyedJaggedTensor(
            keys,
            batch.values(),
            lengths=batch.lengths(),
            stride_per_key_per_rank=torch.full((len(keys), 1), GLOBAL_BATCH),
            inverse_indices=(keys, torch.arange(GLOBAL_BATCH).repeat(len(keys), 1)),
        )
    try:
        model(batch)["history"].values()
    except ValueError as error:
        model(to_kjt(bags, 0, GLOBAL_BATCH))["history"].values()  # the process group stays usable
        raise ValueError(f"refused: {error}") from None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("an id", "refused: table 'products': feature 'item': id 101 is outside"),
        ("missing", "refused: table 'brands': feature 'brand' is missing"),
        ("varying", "the batch size varies by feature, which exchange 'unique_rows' does not support\n"),
    ],
)
def test_an_invalid_batch_is_refused_on_all_ranks(ranks: Ranks, what: str, message: str) -> None:
    with pytest.raises(RankFailed) as failed:
        ranks(2).run(_refused, what)
    assert str(failed.value).count("ValueError: refused: ") == 2
    assert message in str(failed.value)


def test_other_exchanges_are_refused() -> None:
    (table, *_) = MultiLayerEmbeddingCollection(_tables(), torch.device("meta")).row_tables()
    sharder = MultiLayerEmbeddingCollectionSharder(exchange="reduce_scatter")
    with pytest.raises(ValueError, match=r"table 'products' is not pooled, .* use 'auto' or 'unique_rows'"):
        sharder.requested_exchange(table)
    assert MultiLayerEmbeddingCollectionSharder().requested_exchange(table) == "unique_rows"
