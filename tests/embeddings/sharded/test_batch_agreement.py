"""An error in one rank's batch raises a ValueError on every rank, without a hang, and training can continue."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from mlet_dist.embeddings import (
    MultiLayerEmbeddingBagCollection,
)
from mlet_dist.embeddings.sharded.exchange_choice import EXCHANGES, ExchangeChoice
from tests.helpers.dense_reference import DenseReference
from tests.helpers.ranks import RankPool
from tests.helpers.refused_batches import (
    PROJECTIONS_RATE,
    ROWS_RATE,
    SHARE,
    Bags,
    build,
    make_bags,
    positive_module,
    row_losses,
    tables_of_every_kind,
    to_kjt,
    train,
    weights_of,
)
from tests.helpers.sharded_module import dense_tables

Ranks = Callable[..., RankPool]


def _varying(bags: Bags) -> KeyedJaggedTensor:
    """Return the same bags, where the last two rows of f0 share one bag."""
    bags = bags | {"f0": [bags["f0"][0], bags["f0"][1], bags["f0"][1]]}
    kept = bags | {"f0": bags["f0"][:2]}
    even = to_kjt(kept)
    return KeyedJaggedTensor(
        keys=even.keys(),
        values=even.values(),
        lengths=even.lengths(),
        stride_per_key_per_rank=torch.tensor([[len(rows)] for rows in kept.values()]),
        inverse_indices=(even.keys(), torch.tensor([[0, 1, 1] if key == "f0" else [0, 1, 2] for key in kept])),
    )


def _bad_batch(error: str, step: int, rank: int, weighted: bool) -> KeyedJaggedTensor:
    bags = make_bags(step, rank)
    feature, ids = {
        "negative": ("f0", [3, -1]),
        "too large": ("f0", [100]),
        "the smaller table": ("f1", [70]),
        "replicated": ("f2", [1]),
    }.get(error, ("f0", bags["f0"][1]))
    bags[feature][1] = ids
    if error == "missing":
        del bags["f1"]
    if error == "varying":
        return _varying(bags)
    batch = to_kjt(bags, weighted != (error == "weights"))
    if error == "lengths":
        batch = KeyedJaggedTensor(
            batch.keys(), batch.values()[:-1], batch.weights()[:-1] if weighted else None, batch.lengths()
        )
    if error == "a length below 0":
        lengths, first = batch.lengths().clone(), 3 * batch.keys().index("f0")
        lengths[first : first + 3] = torch.tensor([lengths[first : first + 3].sum() + 1, -1, 0])
        batch = KeyedJaggedTensor(batch.keys(), batch.values(), batch.weights_or_none(), lengths)
    return batch


ERRORS = {
    "negative": (
        "table 't0': feature 'f0': id -1 is outside [0, 100)",
        "table 't0': feature 'f0': an id is outside [0, 100)",
    ),
    "too large": (
        "table 't0': feature 'f0': id 100 is outside [0, 100)",
        "table 't0': feature 'f0': an id is outside [0, 100)",
    ),
    "the smaller table": (
        "table 'small': feature 'f1': id 70 is outside [0, 60)",
        "table 'small': feature 'f1': an id is outside [0, 60)",
    ),
    "replicated": (
        "table 'tiny': feature 'f2': id 1 is outside [0, 1)",
        "table 'tiny': feature 'f2': an id is outside [0, 1)",
    ),
    "missing": (
        "table 'small': feature 'f1' is missing from the batch, which has ",
        "table 'small': feature 'f1' is missing from the batch",
    ),
    "weights": ("the batch has weights, but the collection is not weighted",) * 2,
    "no weights": ("the batch has no weights, but the collection is weighted",) * 2,
    "varying": ("the batch size varies by feature, which ",) * 2,
    "lengths": ("the batch has lengths of", "the batch's ids, lengths and weights are inconsistent"),
    "a length below 0": (
        "the batch has negative lengths",
        "the batch's ids, lengths and weights are inconsistent",
    ),
}
"""By error, the message on the rank with the invalid batch, and that on the others after "rank r: "."""


_OF_UNWEIGHTED = [each for each in ERRORS if each != "no weights"]


def _same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return set(first) == set(second) and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def _train_between_errors(
    exchange: ExchangeChoice,
    errors: list[str],
    bad_ranks: list[int],
    weighted: bool,
    types: dict[str, str] | None = None,
) -> tuple[list[str], bool]:
    """Return the message of each error on this rank, and whether the weights equal those of training without errors."""
    rank = dist.get_rank()
    model, optimizer = build(exchange, weighted, sharding_types=types or {})
    messages, good = [], [to_kjt(make_bags(step, rank), weighted) for step in range(len(errors))]
    for step, error in enumerate(errors):
        bad = rank in bad_ranks
        batch = _bad_batch(error, step, rank, weighted) if bad else to_kjt(make_bags(step, rank), weighted)
        with pytest.raises(ValueError, match="table") as raised:
            model(batch)
        messages.append(str(raised.value))
        train(model, optimizer, good[step : step + 1])
    undisturbed, its_optimizer = build(exchange, weighted, sharding_types=types or {})
    train(undisturbed, its_optimizer, good)
    return messages, _same(weights_of(model), weights_of(undisturbed))


def _assert_messages(by_rank: list[tuple[list[str], bool]], errors: list[str], bad_ranks: list[int]) -> None:
    for rank, (messages, same) in enumerate(by_rank):
        assert same
        for error, message in zip(errors, messages, strict=True):
            own, others = ERRORS[error]
            if rank in bad_ranks:
                assert message.startswith("table ")
                assert own in message
            else:
                assert message.startswith(f"rank {bad_ranks[-1]}: table ")
                assert others in message


@pytest.mark.multirank
@pytest.mark.parametrize("bad_rank", [0, 1])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_every_error_is_raised_on_every_rank_and_training_continues(
    ranks: Ranks, exchange: ExchangeChoice, bad_rank: int
) -> None:
    errors = (
        _OF_UNWEIGHTED[3 * bad_rank :] + _OF_UNWEIGHTED[: 3 * bad_rank]
    )  # so that the first batch has a different error for each bad rank
    _assert_messages(ranks(2).run(_train_between_errors, exchange, errors, [bad_rank], False), errors, [bad_rank])


@pytest.mark.multirank
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_weighted_collection_requires_weights_on_every_rank(ranks: Ranks, exchange: ExchangeChoice) -> None:
    messages = ranks(2).run(_train_between_errors, exchange, ["weights", "negative"], [1], True)
    # In a weighted collection the error "weights" removes them.
    assert messages[1][0][0] == "table 't0': the batch has no weights, but the collection is weighted"
    assert messages[0][0][0] == f"rank 1: {messages[1][0][0]}"
    assert messages[0][0][1] == "rank 1: table 't0': feature 'f0': an id is outside [0, 100)"
    assert all(same for _, same in messages)


@pytest.mark.multirank
@pytest.mark.parametrize(("world_size", "bad_ranks"), [(1, [0]), (4, [2]), (4, [0, 3])])
def test_other_numbers_of_ranks(ranks: Ranks, world_size: int, bad_ranks: list[int]) -> None:
    errors = ["too large", "missing"]
    found = ranks(world_size).run(_train_between_errors, "unique_rows", errors, bad_ranks, False)
    _assert_messages(found, errors, bad_ranks)


@pytest.mark.multirank
@pytest.mark.parametrize("nodes", [(2, 2), (4, 2)])
@pytest.mark.parametrize("exchange", ["auto", "after"])
def test_tables_of_every_sharding_type(ranks: Ranks, exchange: ExchangeChoice, nodes: tuple[int, int]) -> None:
    found = ranks(*nodes).run(_train_between_errors, exchange, _OF_UNWEIGHTED, [1], False, _MIXED)
    _assert_messages(found, _OF_UNWEIGHTED, [1])


_MIXED = {"t0": "table_wise", "large": "table_row_wise", "small": "table_wise", "tiny": "data_parallel"}


def _pipeline_into(exchange: ExchangeChoice, error: str, bad_rank: int, bad_step: int) -> tuple[int, str, bool]:
    """Return how many batches a pipeline trained, the message it raised, and whether its weights are right."""
    rank = dist.get_rank()
    batches = [to_kjt(make_bags(step, rank)) for step in range(4)]
    model, optimizer = build(exchange)
    pipeline = TrainPipelineSparseDist(model, optimizer, torch.device("cpu"))
    seen = list(batches)
    if rank == bad_rank:
        seen[bad_step] = _bad_batch(error, bad_step, rank, False)
    iterator, taken = iter(seen), 0
    try:
        while taken < len(batches):
            pipeline.progress(iterator)
            taken += 1
    except ValueError as raised:
        message = str(raised)
    pipeline.detach()
    train(model, optimizer, batches[bad_step:])
    undisturbed, its_optimizer = build(exchange)
    train(undisturbed, its_optimizer, batches)
    return taken, message, _same(weights_of(model), weights_of(undisturbed))


@pytest.mark.multirank
@pytest.mark.parametrize(("error", "bad_step"), [("missing", 2), ("the smaller table", 2), ("weights", 0)])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_torchrecs_pipeline_raises_on_every_rank(
    ranks: Ranks, exchange: ExchangeChoice, error: str, bad_step: int
) -> None:
    found = ranks(2).run(_pipeline_into, exchange, error, 1, bad_step)
    assert [taken for taken, _, _ in found] == [bad_step] * 2
    _assert_messages([([message], same) for _, message, same in found], [error], [1])


def _vary(bad_rank: int | None) -> tuple[list[torch.Tensor], list[str]]:
    rank = dist.get_rank()
    model, _ = build("after", without="tiny")
    messages, outputs = [], []

    def attempt(batch: KeyedJaggedTensor) -> None:
        try:
            loss, output = model(batch)
            loss.backward()
            outputs.append(output)
        except ValueError as raised:
            messages.append(str(raised))

    varying, plain = _varying(make_bags(0, rank)), to_kjt(make_bags(1, rank))
    attempt(plain if bad_rank == rank else varying)
    attempt(_bad_batch("missing", 1, rank, False) if rank == 1 else varying)
    attempt(plain if rank == 0 else varying)
    return outputs, messages


@pytest.mark.multirank
def test_the_batch_size_must_vary_by_feature_on_all_ranks_and_in_all_batches_or_in_none(ranks: Ranks) -> None:
    by_rank = ranks(2).run(_vary, None)
    for rank, (outputs, messages) in enumerate(by_rank):
        bags = make_bags(0, rank)
        bags["f0"][2] = bags["f0"][1]
        expected = positive_module(without="tiny")(to_kjt(bags)).to_dict()
        assert len(outputs) == 1
        assert _columns(outputs[0]) == _columns(torch.cat(list(expected.values()), dim=1))
        assert messages[0].startswith("rank 1: " * (1 - rank) + "table 'small': feature 'f1' is missing from the batch")
    mixed = "table 't0': the batch size does not vary by feature, unlike in the first batch"
    assert [messages[1] for _, messages in by_rank] == [mixed, f"rank 0: {mixed}"]
    on_one = [messages[0] for _, messages in ranks(2).run(_vary, 1)]
    assert on_one == ["table 't0': the batch size varies by feature on some ranks and not on others"] * 2


def _train_with_other_dtypes(exchange: ExchangeChoice, weighted: bool) -> bool:
    rank = dist.get_rank()
    good = [to_kjt(make_bags(step, rank), weighted) for step in range(3)]
    other = [
        KeyedJaggedTensor(
            batch.keys(),
            batch.values().to(ids),
            batch.weights().double() if weighted else None,
            batch.lengths().to(lengths),
        )
        for batch, (ids, lengths) in zip(
            good, [(torch.int32, torch.int64), (torch.int64, torch.int16), (torch.int32, torch.int8)], strict=True
        )
    ]
    found = []
    for batches in (good, other if rank else good):
        model, optimizer = build(exchange, weighted)
        train(model, optimizer, batches)
        found.append(weights_of(model))
    return _same(*found)


@pytest.mark.multirank
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_ranks_may_have_ids_lengths_and_weights_of_different_dtypes(
    ranks: Ranks, exchange: ExchangeChoice, weighted: bool
) -> None:
    assert ranks(2).run(_train_with_other_dtypes, exchange, weighted) == [True, True]


def _columns(values: torch.Tensor) -> list[list[float]]:
    """Return the columns in sorted order, because the sharded module orders them by its shardings."""
    return sorted(values.detach().double().T.round(decimals=4).tolist())


def _train_unequal(exchange: ExchangeChoice, last_rank: str, weighted: bool) -> dict[str, Any]:
    bags = _unequal(dist.get_rank(), dist.get_world_size(), last_rank)
    model, optimizer = build(exchange, weighted)
    outputs = train(model, optimizer, [to_kjt(each, weighted) for each in bags])
    return {"outputs": outputs, "weights": weights_of(model)}


def _unequal(rank: int, world_size: int, last_rank: str) -> list[Bags]:
    rows = [{"no ids": 3, "no rows": 0, "fewer rows": 1}[last_rank] if rank == world_size - 1 else 3] * 3
    bags = [make_bags(step, rank, count) for step, count in enumerate(rows)]
    if last_rank == "no ids" and rank == world_size - 1:
        bags[1] = {name: [[] for _ in of_feature] for name, of_feature in bags[1].items()}
    return bags


@pytest.mark.multirank
@pytest.mark.parametrize("last_rank", ["no ids", "no rows", "fewer rows"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_rank_with_a_smaller_batch_equals_the_dense_reference(
    ranks: Ranks, exchange: ExchangeChoice, weighted: bool, last_rank: str
) -> None:
    world_size = 2
    by_rank = ranks(world_size).run(_train_unequal, exchange, last_rank, weighted)
    tables = dense_tables(positive_module())
    reference = DenseReference(tables, "sgd", {})
    shares = [_unequal(rank, world_size, last_rank) for rank in range(world_size)]
    for step in range(3):
        losses = []
        for rank in range(world_size):
            outputs = reference.forward(_weighed(shares[rank][step], weighted)) if shares[rank][step]["f0"] else {}
            found = by_rank[rank]["outputs"][step].double()
            if not outputs:
                assert found.shape == (0, 20)
                continue
            losses.append(row_losses(outputs).sum())
            assert _columns(found) == _columns(torch.cat(list(outputs.values()), dim=1))
        (sum(losses) / world_size).backward()
        for table in tables:
            for weight, rate in ((table.rows, ROWS_RATE), (table.projection, PROJECTIONS_RATE)):
                if weight is not None and weight.grad is not None:  # None if all bags of the table are empty
                    with torch.no_grad():
                        weight -= rate * weight.grad
                    weight.grad = None
    for each in by_rank:
        for table in tables:
            rows = each["weights"][f"embedding_bags.{table.name}.weight"]
            torch.testing.assert_close(rows.double(), table.rows.detach(), rtol=2e-5, atol=2e-6)
            if table.projection is not None:
                projection = each["weights"][f"projections.{table.name}.weight"]
                torch.testing.assert_close(projection.double(), table.projection.detach(), rtol=2e-5, atol=2e-6)


def _weighed(bags: Bags, weighted: bool) -> dict[str, list[list[tuple[int, float]]]]:
    weights = iter((to_kjt(bags, True).weights() if weighted else torch.ones(1000)).tolist())
    return {name: [[(each, next(weights)) for each in ids] for ids in rows] for name, rows in bags.items()}


@pytest.mark.parametrize("weighted", [False, True])
def test_the_unsharded_module_raises_the_same_messages(weighted: bool) -> None:
    tables = [table for table in tables_of_every_kind() if table.name != "mean"]  # nn.EmbeddingBag has no weighted mean
    module = MultiLayerEmbeddingBagCollection(tables, is_weighted=weighted)
    expected = module(to_kjt(make_bags(0, 0), weighted))
    assert expected.values().shape == (SHARE, 16)
    for error in set(_OF_UNWEIGHTED) - {"varying"}:
        with pytest.raises(ValueError, match=r"^table ") as raised:
            module(_bad_batch(error, 0, 0, weighted))
        own = ERRORS["no weights" if weighted and error == "weights" else error][0]
        assert own in str(raised.value)
    del (bags := make_bags(0, 0))["f0"]
    with pytest.raises(ValueError, match=r"'f0' is missing from the batch, which has '\w+', '\w+', '\w+', '\w+'$"):
        module(to_kjt(bags, weighted))
