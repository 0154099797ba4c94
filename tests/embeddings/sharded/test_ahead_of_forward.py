"""The half of the input dist that pipelines start ahead of a forward pass: it waits neither for a device nor for ranks.

FakeTensorMode stands for CUDA: it refuses every operator whose result has a size or value that the host would have to
read from the device.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchrec import KeyedJaggedTensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from benchmarks.step_counters import StepOperations, count_step_operations
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.input_check import smallest_tables
from mlet_dist.embeddings.sharded import unique_rows
from mlet_dist.embeddings.sharded.batch_agreement import BatchChecker
from mlet_dist.embeddings.sharded.occurrences import Occurrences, sorted_distinct
from mlet_dist.embeddings.sharded.pooled import ServedFeature
from mlet_dist.embeddings.sharded.row_index import RangeIndex
from mlet_dist.embeddings.sharded.unique_rows import UniqueRowsInputDist
from mlet_dist.embeddings.table_config import Segment
from tests.helpers.ranks import RankPool
from tests.helpers.sharded_module import shard

Ranks = Callable[[int], RankPool]
DIMS, ROWS, STEPS = (4, 8, 8), 50, 4


def _tables(ranged: bool) -> list[MultiLayerEmbeddingBagConfig]:
    return [
        MultiLayerEmbeddingBagConfig(
            name=f"t{index}",
            num_embeddings=ROWS,
            embedding_dim=dim,
            hidden_dim=8,
            feature_names=[f"f{index}"],
            row_ranges=[(20, 8, 0.5), (30, 0, 0.5)] if ranged and index == 1 else None,
        )
        for index, dim in enumerate(DIMS)
    ]


def _batch(step: int, longest: int, weighted: bool) -> KeyedJaggedTensor:
    draw = random.Random(step)
    lengths = [1 if longest == 1 else draw.randint(0, longest) for _ in range(6 * len(DIMS))]
    values = torch.tensor([draw.randrange(ROWS) for _ in range(sum(lengths))], dtype=torch.int64)
    per_key = [sum(lengths[6 * index : 6 * index + 6]) for index in range(len(DIMS))]
    return KeyedJaggedTensor(
        keys=[f"f{index}" for index in range(len(DIMS))],
        values=values,
        lengths=torch.tensor(lengths),
        weights=torch.ones(len(values)) if weighted else None,
        stride=6,
        length_per_key=per_key,
        offset_per_key=[sum(per_key[:index]) for index in range(len(DIMS) + 1)],
    )


class _Watched(TrainPipelineSparseDist):
    """A pipeline that notes the operations and the waiting for collectives in ``start_sparse_data_dist``."""

    def __init__(self, *args: Any, **named: Any) -> None:
        self.started: list[StepOperations] = []
        super().__init__(*args, **named)

    def start_sparse_data_dist(self, batch: Any, context: Any) -> None:
        def wait(*_: Any) -> bool:
            raise AssertionError("a collective was waited for")

        if context.index == 0:  # ahead of nothing
            super().start_sparse_data_dist(batch, context)
        elif batch is not None:
            with mock.patch.object(dist.Work, "wait", wait), count_step_operations() as counts:
                super().start_sparse_data_dist(batch, context)
            self.started.append(counts)


@torch.fx.wrap
def _loss(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return values.sum(), values.detach()


class _Model(torch.nn.Module):
    def __init__(self, embeddings: torch.nn.Module) -> None:
        super().__init__()
        self.embeddings = embeddings

    def forward(self, features: KeyedJaggedTensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _loss(self.embeddings(features).values())


def _start(longest: int, weighted: bool, ranged: bool, exchange: str) -> list[tuple[list[Any], list[Any]]]:
    embeddings = MultiLayerEmbeddingBagCollection(_tables(ranged), is_weighted=weighted)
    model = shard(embeddings, exchange=exchange, around=_Model)
    optimizer = torch.optim.SGD(model.module.embeddings.projections.parameters(), lr=0.01)
    pipeline = _Watched(model, optimizer, torch.device("cpu"))
    batches = iter([_batch(step, longest, weighted) for step in range(STEPS)])
    for _ in range(STEPS):
        pipeline.progress(batches)
    assert len(pipeline.started) == STEPS - 1
    return [
        (
            [(call.name, call.place) for call in each.synchronisation_calls],
            [call.name for call in each.collective_calls],
        )
        for each in pipeline.started
    ]


@pytest.mark.multirank
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(
    ("longest", "weighted", "ranged"), [(1, False, False), (3, True, False), (3, False, True), (0, False, False)]
)
def test_nothing_waits_ahead_of_a_forward_pass(
    ranks: Ranks, world_size: int, longest: int, weighted: bool, ranged: bool
) -> None:
    for started in ranks(world_size).run(_start, longest, weighted, ranged, "unique_rows"):
        for synchronisations, collectives in started:
            assert synchronisations == []
            assert collectives == ["alltoall_base_"] * (world_size > 1)


@pytest.mark.multirank
def test_the_agreement_of_other_exchanges_is_not_waited_for_either(ranks: Ranks) -> None:
    for started in ranks(2).run(_start, 1, False, False, "after"):
        for synchronisations, collectives in started:
            # TorchRec itself reads numbers of ids that it has just copied to the device.
            assert {place.split(":")[0] for _, place in synchronisations} <= {"jagged_tensor.py", "dist_data.py"}
            assert collectives == ["allreduce_", "alltoall_base_"]


def _get(tensor: torch.Tensor, key: Any) -> torch.Tensor:
    """Index as ``tensor[key]`` does, which a torch without CUDA refuses for fake CUDA tensors."""
    if isinstance(key, torch.Tensor):
        found: torch.Tensor = torch.ops.aten.index.Tensor(tensor, [key])
        return found
    assert isinstance(key, slice)
    part: torch.Tensor = torch.ops.aten.slice.Tensor(tensor, 0, key.start, key.stop)
    return part


def _set(tensor: torch.Tensor, key: Any, value: torch.Tensor) -> None:
    torch.ops.aten.copy_.default(_get(tensor, key), value)


@contextmanager
def _fake_cuda() -> Iterator[FakeTensorMode]:
    patches = {"pin_memory": lambda tensor: tensor, "__getitem__": _get, "__setitem__": _set}
    with FakeTensorMode() as mode, mock.patch.multiple(FakeTensor, **patches):
        yield mode


def _ids_on_fake_cuda(longest: int, ranged: bool) -> StepOperations:
    """Check a batch and start the exchange of its ids, on fake CUDA tensors and two ranks, one of which is fake."""
    group, device = dist.group.WORLD, torch.device("cuda", 0)
    tables, batch = _tables(ranged), _batch(1, longest, weighted=False)
    served = [ServedFeature(table.feature_names[0], table.feature_names[0], table.name, ROWS) for table in tables]
    segments = [
        (Segment(table.name, index, 0, rows, 0, tuple(table.feature_names)),)
        for table in tables
        for index, rows in ((None, ROWS) if table.row_ranges is None else (0, 20),)
    ]
    names = [table.name for table in tables]
    keys, lengths, counts_of_keys = batch.keys(), batch.lengths(), batch.length_per_key()
    values = batch.values()
    # Constants are made on the CPU and then faked, because a torch without CUDA cannot copy to it.
    checker = BatchChecker(
        smallest_tables(tables), False, group, torch.device("cpu"), ("t0", "x"), codes_exchanged=True
    )
    index = RangeIndex(names, segments, [ROWS] * len(tables), served, [[0, 1]] * len(tables), torch.device("cpu"))
    ids = UniqueRowsInputDist(group, index, list(DIMS), checker)
    with _fake_cuda() as mode:
        for part in (checker, index, ids):
            for name, value in vars(part).items():
                if isinstance(value, torch.Tensor):
                    setattr(part, name, mode.from_tensor(value).to(device))
        given = KeyedJaggedTensor(
            keys,
            mode.from_tensor(values).to(device),
            lengths=mode.from_tensor(lengths).to(device),
            stride=6,
            length_per_key=counts_of_keys,
            offset_per_key=batch.offset_per_key(),
        )
        assert given.values().device == device
        with count_step_operations() as counts:
            ids(checker.check(given)[0])
    return counts


@pytest.fixture
def fake_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("longest", [0, 1, 3])
@pytest.mark.parametrize("ranged", [False, True])
def test_nothing_is_read_from_a_cuda_device_ahead_of_a_forward_pass(
    fake_ranks: None, longest: int, ranged: bool
) -> None:
    counts = _ids_on_fake_cuda(longest, ranged)
    assert counts.synchronisation_calls == []
    assert [(call.name, call.device) for call in counts.collective_calls] == [("alltoall_base_", "cuda")]


def _unique(keys: torch.Tensor, limit: int) -> tuple[torch.Tensor, Occurrences]:
    distinct, position = torch.unique(keys, return_inverse=True)
    return distinct, Occurrences(position, None, None)


def _all_ones(keys: torch.Tensor, limit: int) -> tuple[torch.Tensor, Occurrences]:
    assert bool((keys == keys).all())
    return sorted_distinct(keys, limit)


@pytest.mark.parametrize("waiting", [_unique, _all_ones])
def test_these_tests_notice_what_waits(fake_ranks: None, waiting: Callable[..., Any]) -> None:
    with (
        mock.patch.object(unique_rows, "sorted_distinct", waiting),
        pytest.raises((DynamicOutputShapeException, DataDependentOutputException)),
    ):
        _ids_on_fake_cuda(3, ranged=False)
