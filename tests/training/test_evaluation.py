import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import distributed as dist
from torch.nn import functional

from mlet_dist.training.binary_metrics import BinaryMetrics
from tests.helpers.ranks import RankPool

CPU = torch.device("cpu")
# Steps of 1/8 from -29 to 29: ties are exact, and what differs lies in different bins.
rows = st.lists(
    st.tuples(st.integers(-232, 232).map(lambda step: step / 8), st.integers(0, 1)), min_size=1, max_size=80
)


def metrics_of(logits: list[float], labels: list[float], chunks: int = 1) -> dict[str, float]:
    metrics = BinaryMetrics(CPU)
    pairs = zip(torch.tensor(logits).chunk(chunks), torch.tensor(labels).chunk(chunks), strict=True)
    for each_logits, each_labels in pairs:
        metrics.update(each_logits, each_labels)
    return metrics.compute()


def pairwise_auc(logits: list[float], labels: list[float]) -> float:
    """Return the share of pairs of a positive and a negative that are in the right order; ties count half."""
    positive = [logit for logit, label in zip(logits, labels, strict=True) if label]
    negative = [logit for logit, label in zip(logits, labels, strict=True) if not label]
    wins = sum((p > n) + (p == n) / 2 for p in positive for n in negative)
    return wins / (len(positive) * len(negative)) if positive and negative else math.nan


def float64_logloss(logits: list[float], labels: list[float]) -> float:
    x, y = np.array(logits, dtype=np.float64), np.array(labels, dtype=np.float64)
    return float(np.mean(np.logaddexp(0, x) - x * y))


@given(rows=rows, chunks=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_auc_and_logloss_equal_the_definitions(rows: list[tuple[float, int]], chunks: int) -> None:
    logits, labels = [row[0] for row in rows], [float(row[1]) for row in rows]
    found = metrics_of(logits, labels, chunks)
    assert found["auc"] == pytest.approx(pairwise_auc(logits, labels), rel=1e-12, nan_ok=True)
    assert found["logloss"] == pytest.approx(float64_logloss(logits, labels), rel=1e-12)
    assert found["rows"] == len(rows)
    assert found["positive_rate"] == pytest.approx(sum(labels) / len(rows))


def test_auc_by_hand() -> None:
    assert metrics_of([0.1, 0.4, 0.35, 0.8], [0, 0, 1, 1])["auc"] == 0.75
    assert metrics_of([1, 1, 1, 2], [0, 1, 1, 1])["auc"] == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert metrics_of([3, 2, 1], [0, 0, 1])["auc"] == 0
    found = metrics_of([0.0, math.log(3)], [1, 0])
    assert found["logloss"] == pytest.approx((math.log(2) + math.log(4)) / 2, rel=1e-6)
    assert found["positive_rate"] == 0.5


def test_close_logits_are_distinguished() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = (torch.rand(1000, generator=draw) < 0.3).float()
    logits = torch.randn(1000, generator=draw) + labels
    found = metrics_of(logits.tolist(), labels.tolist())
    assert found["auc"] == pytest.approx(pairwise_auc(logits.tolist(), labels.tolist()), abs=2e-5)
    assert 0.7 < found["auc"] < 0.8


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class_has_no_auc_but_a_logloss(label: float) -> None:
    found = metrics_of([0.0, 2.0], [label, label])
    assert math.isnan(found["auc"])
    assert found["logloss"] == pytest.approx(float64_logloss([0.0, 2.0], [label, label]))
    assert found["positive_rate"] == label


def test_metrics_of_no_rows_are_nan() -> None:
    found = BinaryMetrics(CPU).compute()
    assert found["rows"] == 0
    assert all(math.isnan(found[name]) for name in ("auc", "logloss", "positive_rate"))


def test_extreme_logits_count_at_the_edges() -> None:
    found = metrics_of([1000.0, -1000.0, 30.0, -30.0, 0.0], [1, 0, 1, 0, 0])
    assert found["auc"] == 1
    assert found["logloss"] == pytest.approx(math.log(2) / 5, rel=1e-9)
    wrong = metrics_of([1000.0, -1000.0], [0, 1])
    assert (wrong["auc"], wrong["logloss"]) == (0, 1000)
    assert metrics_of([1000.0, 30.0], [1, 0])["auc"] == 0.5  # beyond ±30 all is one bin


def test_nan_logits_show_in_the_loss() -> None:
    found = metrics_of([math.nan, 1.0, -1.0], [1, 1, 0])
    assert math.isnan(found["logloss"])
    assert 0 <= found["auc"] <= 1
    assert found["rows"] == 3
    assert math.isnan(metrics_of([math.inf, math.nan], [1, 0])["logloss"])


def test_rows_can_be_added_after_computing() -> None:
    metrics = BinaryMetrics(CPU)
    metrics.update(torch.tensor([1.0, -1.0]), torch.tensor([1, 0]))
    assert metrics.compute() == metrics.compute()
    metrics.update(torch.tensor([2.0]), torch.tensor([0]))
    assert metrics.compute()["auc"] == 0.5
    assert metrics.compute()["rows"] == 3


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("size", [97, 40_000])
def test_when_rows_are_counted_changes_no_bit(size: int, weighted: bool) -> None:
    draw = torch.Generator().manual_seed(size)
    together, few = BinaryMetrics(CPU, weighted=weighted), BinaryMetrics(CPU, weighted=weighted)
    loss = torch.zeros((), dtype=torch.float64)
    for number in range(400 if size < 100 else 3):
        logits, labels = torch.randn(size, generator=draw) * 5, (torch.rand(size, generator=draw) < 0.3).float()
        weights = torch.rand(size, generator=draw) if weighted else None
        for metrics in (together, few):
            metrics.update(logits, labels, weights)
        if size >= 100 or number % 7 < 2:  # after one batch and after six
            few.compute()
        factors = None if weights is None else weights.double()
        loss += functional.binary_cross_entropy_with_logits(logits.double(), labels.double(), factors, reduction="sum")
    found, expected = together.state_dict(), few.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert float(found["loss"]) == float(loss)
    assert together.compute() == few.compute()
    restored = BinaryMetrics(CPU, weighted=weighted)
    restored.update(torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1.0]) if weighted else None)
    restored.load_state_dict(found)
    assert restored.compute() == together.compute()


def test_half_precision_logits_and_integer_labels_are_accepted() -> None:
    metrics = BinaryMetrics(CPU)
    metrics.update(torch.tensor([1.5, -0.5], dtype=torch.bfloat16), torch.tensor([0, 1], dtype=torch.int8))
    assert metrics.compute()["logloss"] == pytest.approx(float64_logloss([1.5, -0.5], [0, 1]), rel=1e-12)


def _global_rows() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(5)
    labels = (torch.rand(601, generator=draw) < 0.25).float()
    return (torch.randn(601, generator=draw) + labels) * 4, labels


def _metrics_of_a_share(empty_rank: int) -> list[dict[str, float]]:
    """Compute metrics twice, from different rows on every rank and none on ``empty_rank``."""
    logits, labels = _global_rows()
    active = [rank for rank in range(dist.get_world_size()) if rank != empty_rank]
    metrics = BinaryMetrics(CPU)
    if dist.get_rank() in active:
        share = slice(active.index(dist.get_rank()), None, len(active))
        metrics.update(logits[share], labels[share])
    return [metrics.compute(), metrics.compute()]


@pytest.mark.multirank
@pytest.mark.parametrize(("world_size", "empty_rank"), [(1, -1), (2, -1), (3, -1), (3, 1)])
def test_metrics_over_ranks_equal_those_of_one_process(
    ranks: Callable[[int], RankPool], world_size: int, empty_rank: int
) -> None:
    logits, labels = _global_rows()
    alone = metrics_of(logits.tolist(), labels.tolist())
    assert alone["auc"] == pytest.approx(pairwise_auc(logits.tolist(), labels.tolist()), abs=2e-5)
    for by_rank in ranks(world_size).run(_metrics_of_a_share, empty_rank):
        for found in by_rank:
            assert {name: found[name] for name in ("auc", "rows", "positive_rate")} == {
                name: alone[name] for name in ("auc", "rows", "positive_rate")
            }
            assert found["logloss"] == pytest.approx(alone["logloss"], rel=1e-12)


@given(rows=rows, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_a_row_of_weight_n_counts_as_n_rows(rows: list[tuple[float, int]], seed: int) -> None:
    """Weights that are whole numbers, 0 among them, against metrics without weights of rows that are repeated."""
    repeats = np.random.default_rng(seed).integers(0, 4, len(rows))
    logits, labels = [row[0] for row in rows], [float(row[1]) for row in rows]
    metrics = BinaryMetrics(CPU, weighted=True)
    for part in np.array_split(np.arange(len(rows)), 3):
        columns = (torch.tensor([values[i] for i in part]) for values in (logits, labels, repeats.astype(np.float32)))
        metrics.update(*columns)
    found = metrics.compute()
    expected = metrics_of(np.repeat(logits, repeats).tolist(), np.repeat(labels, repeats).tolist())
    assert found["rows"] == len(rows)
    assert found["weight"] == repeats.sum() == expected["rows"]
    for name in ("auc", "logloss", "positive_rate"):
        assert found[name] == pytest.approx(expected[name], rel=1e-9, nan_ok=True)


def test_weighted_metrics_by_hand() -> None:
    metrics = BinaryMetrics(CPU, weighted=True)
    metrics.update(torch.tensor([0.0, math.log(3), -1.0]), torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.5, 1.5, 0]))
    found = metrics.compute()
    assert found["logloss"] == pytest.approx((0.5 * math.log(2) + 1.5 * math.log(4)) / 2, rel=1e-6)
    assert (found["auc"], found["positive_rate"], found["rows"], found["weight"]) == (0, 0.25, 3, 2)
