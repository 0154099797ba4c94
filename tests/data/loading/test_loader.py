"""Tests of mlet_dist.data.loading.loader, row_groups and jagged_tensors on single-valued features."""

import dataclasses
import gc
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from mlet_dist.data.loading import row_groups
from mlet_dist.data.loading.loader import BATCHES_AHEAD, Batch, DataLoader
from mlet_dist.data.loading.order import Shuffle
from mlet_dist.data.loading.prefetch import THREAD_NAME
from mlet_dist.data.loading.rows import Rows
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from tests.helpers.data_set_parts import replace_part, write_part, write_schema


def make_loader(path: Path, split: str = "train", **changes: Any) -> DataLoader:
    arguments: dict[str, Any] = {
        "batch_size": 1200,
        "rank": 0,
        "world_size": 1,
        "dense_features": None,
        "sparse_features": None,
    }
    start = changes.pop("start", 0)
    loader = DataLoader(path, split, **(arguments | changes))
    loader.load_state_dict(loader.state_dict(start))
    return loader


def read_split(path: Path, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(path / part.path) for part in DatasetSchema.load(path).parts[split]])


def as_rows(batch: Batch) -> torch.Tensor:
    """Return the batch as a table (num_rows, 1 + num_dense + T) float64, read from its jagged tensors."""
    columns = []
    for name in batch.sparse.keys():  # noqa: SIM118  (a KeyedJaggedTensor is no mapping)
        jagged = batch.sparse[name]
        lengths = jagged.lengths()
        assert lengths[: batch.num_rows].eq(1).all()
        assert lengths[batch.num_rows :].eq(0).all()
        columns.append(jagged.values())
    sparse = torch.stack(columns, dim=1)
    return torch.cat([batch.labels[: batch.num_rows, None], batch.dense[: batch.num_rows], sparse], dim=1).double()


def expected_rows(path: Path, split: str) -> torch.Tensor:
    table = read_split(path, split)
    return torch.from_numpy(np.stack([column.to_numpy().astype(np.float64) for column in table.columns], axis=1))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(("batch_size", "start"), [(12, 2700), (1200, 0), (1200, 7), (24_000, 0)])
def test_global_batches_do_not_depend_on_the_world_size(
    dataset: Path, world_size: int, batch_size: int, start: int
) -> None:
    expected = expected_rows(dataset, "train")
    ranks = [
        list(make_loader(dataset, batch_size=batch_size, rank=rank, world_size=world_size, start=start))
        for rank in range(world_size)
    ]
    assert {len(batches) for batches in ranks} == {-(-36_002 // batch_size) - start}
    for index, shares in enumerate(zip(*ranks, strict=True), start=start):
        left = min(batch_size, 36_002 - index * batch_size)
        assert {share.global_rows for share in shares} == {left} == {sum(share.num_rows for share in shares)}
        rows = torch.cat([as_rows(share) for share in shares])
        assert torch.equal(rows, expected[index * batch_size : (index + 1) * batch_size])


def test_batch_shapes_and_types(dataset: Path) -> None:
    batch = next(iter(make_loader(dataset, world_size=2)))
    assert (batch.dense.shape, batch.dense.dtype) == ((600, 13), torch.float32)
    assert (batch.labels.shape, batch.labels.dtype) == ((600,), torch.float32)
    assert batch.sparse.keys() == [f"C{i}" for i in range(1, 27)]
    assert batch.sparse.stride() == 600
    assert batch.sparse.values().dtype == torch.int64
    assert batch.sparse.values().is_contiguous()
    assert batch.sparse.length_per_key() == [600] * 26


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1200, 1), (1200, 4), (60, 3), (4500, 2), (6000, 4)])
def test_evaluation_covers_every_row_once(dataset: Path, split: str, batch_size: int, world_size: int) -> None:
    expected = expected_rows(dataset, split)
    loaders = [
        make_loader(dataset, split, batch_size=batch_size, rank=r, world_size=world_size) for r in range(world_size)
    ]
    ranks = [list(loader) for loader in loaders]
    count = -(-len(expected) // batch_size)
    assert [len(batches) for batches in ranks] == [len(loader) for loader in loaders] == [count] * world_size
    rows = torch.cat([as_rows(share) for shares in zip(*ranks, strict=True) for share in shares])
    assert torch.equal(rows, expected)
    for batches in ranks:
        for index, batch in enumerate(batches):
            assert batch.num_rows == batch_size // world_size or index == count - 1
            assert batch.labels.shape == (batch_size // world_size,)
            assert batch.sparse.stride() == batch_size // world_size
            assert batch.dense[batch.num_rows :].eq(0).all()
            assert batch.labels[batch.num_rows :].eq(0).all()


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("rows", [1, 700, 2401])
def test_the_first_rows_alone_as_if_there_were_no_others(dataset: Path, rows: int, world_size: int) -> None:
    expected = as_rows(next(iter(make_loader(dataset, batch_size=6000))))[:rows]
    found: list[list[torch.Tensor]] = []
    for rank in range(world_size):
        loader = make_loader(dataset, batch_size=600, rank=rank, world_size=world_size, first_rows=rows)
        assert (loader.rows, len(loader)) == (rows, -(-rows // 600))
        found.append([as_rows(batch) for batch in loader])
    assert torch.equal(torch.cat([part for batch in zip(*found, strict=True) for part in batch]), expected)


def test_a_rank_s_share_may_be_padding_alone(dataset: Path) -> None:
    """test has 4,501 rows: of its second batch of 4,500, rank 0 has one row and rank 1 has none."""
    shares = [list(make_loader(dataset, "test", batch_size=4500, rank=r, world_size=2))[1] for r in range(2)]
    assert [share.num_rows for share in shares] == [1, 0]
    assert shares[1].sparse.values().numel() == 0
    assert shares[1].sparse.lengths().eq(0).all()
    assert shares[1].sparse.stride() == 2250


def test_torchrec_pools_padding_to_zero(dataset: Path) -> None:
    """TorchRec looks up each row's own embedding, and pools the bags of padding rows to zeros."""
    sizes = DatasetSchema.load(dataset).num_embeddings
    ebc = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(name=f"t_{name}", embedding_dim=2, num_embeddings=size, feature_names=[name])
            for name, size in sizes.items()
        ]
    )
    batch = list(make_loader(dataset, "test", batch_size=1000))[-1]
    pooled = ebc(batch.sparse)["C7"]
    ids = torch.from_numpy(read_split(dataset, "test")["C7"].to_numpy()[4000:].copy()).long()
    assert batch.num_rows == 501
    assert torch.equal(pooled[:501], ebc.embedding_bags["t_C7"].weight[ids])
    assert pooled[501:].eq(0).all()


def test_chosen_features_in_the_requested_order(dataset: Path) -> None:
    batch = next(iter(make_loader(dataset, dense_features=["I9", "I2"], sparse_features=["C20", "C3"])))
    table = read_split(dataset, "train").slice(0, 1200)
    assert batch.sparse.keys() == ["C20", "C3"]
    expected = np.stack([table[n].to_numpy().astype(np.float64) for n in ("label", "I9", "I2", "C20", "C3")], axis=1)
    assert torch.equal(as_rows(batch), torch.from_numpy(expected))


def test_each_iteration_starts_at_the_first_batch(dataset: Path) -> None:
    loader = make_loader(dataset, "valid", batch_size=100)
    first, second = list(loader), list(loader)
    assert len(first) == len(second) == len(loader) == 45
    assert all(torch.equal(as_rows(a), as_rows(b)) for a, b in zip(first, second, strict=True))


def test_resuming_skips_without_decoding(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = record_decoding(monkeypatch)
    everything = list(make_loader(dataset))
    assert decoded == [0, 1, 2]
    decoded.clear()
    rest = list(make_loader(dataset, start=29))
    assert decoded == [2]
    assert len(rest) == 2
    assert all(torch.equal(as_rows(a), as_rows(b)) for a, b in zip(rest, everything[29:], strict=True))


def test_a_rank_decodes_only_its_row_groups(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = record_decoding(monkeypatch)
    for rank, groups in ((0, [0, 1, 2]), (1, [1, 2])):  # rank 0 also has the two rows of the incomplete batch
        list(make_loader(dataset, batch_size=36_000, rank=rank, world_size=2))
        assert decoded == groups
        decoded.clear()


def record_decoding(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    decoded: list[int] = []
    decode = row_groups.SplitRows.decode

    def recording(self: row_groups.SplitRows, index: int) -> Rows:
        decoded.append(int(index))
        return decode(self, index)

    monkeypatch.setattr(row_groups.SplitRows, "decode", recording)
    return decoded


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@pytest.mark.parametrize("taken", [1, 3, 10])
def test_abandoned_iterator_leaves_no_thread(dataset: Path, taken: int) -> None:
    iterator = iter(make_loader(dataset, batch_size=100))
    for _ in range(taken):
        next(iterator)
    assert len(loader_threads()) >= 2  # one decodes, one assembles batches
    del iterator
    gc.collect()
    assert loader_threads() == []


def test_a_consumer_that_fails_leaves_no_thread(dataset: Path) -> None:
    def consume() -> None:
        for _ in make_loader(dataset, batch_size=100, shuffle=Shuffle(0, 20_000)):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()
    gc.collect()
    assert loader_threads() == []


def test_reading_ahead_is_bounded(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    enough = threading.Event()
    make = DataLoader._batch

    def recording(self: DataLoader, rows: Rows, global_rows: int) -> Batch:
        made.append(rows)
        if len(made) == BATCHES_AHEAD + 2:
            enough.set()
        return make(self, rows, global_rows)

    monkeypatch.setattr(DataLoader, "_batch", recording)
    iterator = iter(make_loader(dataset, batch_size=100))
    next(iterator)
    assert enough.wait(30)  # the batch taken, a full queue, and the batch that waits for room in it
    time.sleep(0.2)  # an unbounded queue would keep filling
    assert len(made) == BATCHES_AHEAD + 2
    next(iterator)
    del iterator


def test_to_keeps_everything(dataset: Path) -> None:
    batch = list(make_loader(dataset, "test"))[-1]
    copy = batch.to(torch.device("meta"))
    assert (copy.dense.device.type, copy.labels.device.type, copy.sparse.device().type) == ("meta", "meta", "meta")
    assert (copy.num_rows, copy.global_rows, copy.sparse.stride()) == (901, 901, 1200)
    assert copy.sparse.keys() == batch.sparse.keys()
    assert torch.equal(as_rows(batch.to(torch.device("cpu"), non_blocking=True)), as_rows(batch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_copy_on_a_side_stream(dataset: Path) -> None:
    batch = next(iter(make_loader(dataset)))
    pinned = batch.pin_memory()
    assert pinned.dense.is_pinned()
    assert pinned.sparse.values().is_pinned()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        copy = pinned.to(torch.device("cuda"), non_blocking=True)
    torch.cuda.current_stream().wait_stream(stream)
    copy.record_stream(torch.cuda.current_stream())
    assert torch.equal(as_rows(copy.to(torch.device("cpu"))), as_rows(batch))


@pytest.mark.parametrize(
    ("split", "changes", "message"),
    [
        ("dev", {}, "split 'dev' does not exist; the splits are train, valid, test"),
        ("train", {"batch_size": 10, "world_size": 4}, "batch_size 10 is not a positive multiple of the world size 4"),
        ("train", {"batch_size": 0}, "batch_size 0 is not a positive multiple"),
        ("train", {"dense_features": ["I1", "I14"]}, "no dense feature 'I14'; it has I1, I2"),
        ("train", {"sparse_features": ["I1"]}, "no sparse feature 'I1'; it has C1, C2"),
    ],
)
def test_wrong_argument(dataset: Path, split: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_loader(dataset, split, **changes)


def test_a_split_that_the_data_set_lacks(dataset: Path, tmp_path: Path) -> None:
    schema = DatasetSchema.load(dataset)
    dataclasses.replace(schema, parts={"train": schema.parts["train"]}).save(tmp_path)
    with pytest.raises(UserError, match=f"{tmp_path}: has no test split; its splits are train"):
        make_loader(tmp_path, "test")


def test_missing_data_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data set"):
        make_loader(tmp_path / "nowhere")


@pytest.fixture
def broken(dataset: Path, tmp_path: Path) -> Path:
    """Return a copy of the data set that a test may damage."""
    return Path(shutil.copytree(dataset, tmp_path / "broken"))


def change_value(data: Path, column: str, row: int, value: float | None) -> None:
    table = pq.read_table(data / TRAIN)
    values = table[column].to_pylist()
    values[row] = value
    index = table.column_names.index(column)
    changed = table.set_column(index, column, pa.array(values, table[column].type))
    replace_part(data, TRAIN, changed, row_group_size=16_384)


TRAIN = "train/part-00000.parquet"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("C3", 500, r"column C3 holds id 500, outside \[0, 500\): its table has num_embeddings 500"),
        ("C20", -1, r"column C20 holds id -1, outside \[0, 4\): its table has num_embeddings 4"),
        ("label", 2, "column label holds 2; a label must be 0 or 1"),
        ("label", -1, "column label holds -1; a label must be 0 or 1"),
        ("C3", None, "column C3 has 1 missing values"),
        ("I4", None, "column I4 has 1 missing values"),
        ("I4", float("inf"), "column I4 holds inf; it must be a finite number"),
        ("I13", float("-inf"), "column I13 holds -inf; it must be"),
        ("I1", float("nan"), "column I1 holds nan; it must be"),
    ],
)
def test_wrong_value_surfaces_in_the_consumer(broken: Path, column: str, value: float | None, message: str) -> None:
    change_value(broken, column, 20_000, value)
    iterator = iter(make_loader(broken))
    next(iterator)  # the first row group is valid
    with pytest.raises(UserError, match=f"{broken / TRAIN}: {message}"):
        list(iterator)
    assert loader_threads() == []


def test_largest_id_is_valid(broken: Path) -> None:
    change_value(broken, "C3", 20_000, 499)
    assert len(list(make_loader(broken))) == 31


def test_column_that_was_not_requested_is_not_read(broken: Path) -> None:
    change_value(broken, "C3", 20_000, 500)
    assert len(list(make_loader(broken, sparse_features=["C1"]))) == 31


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5000])


def lose_a_row(path: Path) -> None:
    pq.write_table(pq.read_table(path).slice(1), path)


def lose_a_column(path: Path) -> None:
    pq.write_table(pq.read_table(path).drop_columns(["C5"]), path)


def widen_a_column(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.set_column(14, "C1", table["C1"].cast(pa.int64())), path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"missing, though .*schema\.json names it"),
        (truncate, "not a complete Parquet file"),
        (lambda path: path.write_bytes(b""), "not a complete Parquet file"),
        (lose_a_row, r"has 36001 rows, but schema\.json has 36002"),
        (lose_a_column, "column C5 is missing instead of int32"),
        (widen_a_column, "column C1 is int64 instead of int32"),
    ],
)
def test_damaged_part_is_an_error_at_once(broken: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(broken / TRAIN)
    with pytest.raises(UserError, match=f"{broken / TRAIN}: {message}"):
        make_loader(broken)


@pytest.mark.parametrize("position", [0.1, 0.5, 0.8])
def test_flipped_bits_are_detected(broken: Path, position: float) -> None:
    content = bytearray((broken / TRAIN).read_bytes())
    content[int(len(content) * position)] ^= 0x10
    (broken / TRAIN).write_bytes(content)
    with pytest.raises(UserError, match=f"{broken / TRAIN}: row group [012] cannot be read"):
        list(make_loader(broken))


def test_part_that_goes_missing_later(broken: Path) -> None:
    loader = make_loader(broken)
    (broken / TRAIN).unlink()
    with pytest.raises(UserError, match=r"part-00000\.parquet: missing, though"):
        list(loader)


def test_several_parts_are_one_sequence(broken: Path) -> None:
    """The same rows in three parts of odd sizes make the same batches."""
    expected = list(make_loader(broken, batch_size=3600))
    table = pq.read_table(broken / TRAIN)
    schema = json.loads((broken / "schema.json").read_text())
    schema["parts"]["train"] = []
    for index, (start, stop) in enumerate([(0, 5001), (5001, 5002), (5002, 36_002)]):
        path = f"train/part-{index:05}.parquet"
        schema["parts"]["train"].append(write_part(broken, path, table.slice(start, stop - start), row_group_size=4096))
    write_schema(broken, schema)
    batches = list(make_loader(broken, batch_size=3600))
    assert len(batches) == len(expected) == 11
    assert all(torch.equal(as_rows(a), as_rows(b)) for a, b in zip(batches, expected, strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_together_open_each_part_once_at_the_start(
    broken: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pq.read_table(broken / TRAIN)
    schema = json.loads((broken / "schema.json").read_text())
    names = [f"train/part-{index:05}.parquet" for index in range(6)]
    schema["parts"]["train"] = [
        write_part(broken, name, table.slice(6000 * index, 6000), row_group_size=1000)
        for index, name in enumerate(names)
    ]
    schema["rows"]["train"] = 36_000
    write_schema(broken, schema)
    opened: list[str] = []
    read_footer = row_groups.SplitRows._read_footer

    def recording(self: row_groups.SplitRows, file: Path) -> object:
        opened.append(str(file.relative_to(broken)))
        return read_footer(self, file)

    monkeypatch.setattr(row_groups.SplitRows, "_read_footer", recording)
    loaders = [make_loader(broken, batch_size=8400, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(opened) == names
    opened.clear()
    (broken / names[5]).unlink()
    wrong = [rank for rank in range(world_size) if 5 % world_size == rank]
    for rank in range(world_size):
        if rank in wrong:
            with pytest.raises(UserError, match=r"part-00005\.parquet: missing, though"):
                make_loader(broken, batch_size=8400, rank=rank, world_size=world_size)
        else:
            make_loader(broken, batch_size=8400, rank=rank, world_size=world_size)
    failed = 0
    for loader in loaders:  # those ranks that have rows of the part find it when they read them
        try:
            list(loader)
        except UserError as error:
            assert f"{broken / names[5]}: missing, though" in str(error)  # noqa: PT017
            failed += 1
    assert failed >= min(world_size, 5)


@pytest.mark.parametrize(("batch_size", "rank", "warnings"), [(4500, 0, 1), (4500, 1, 0), (6000, 0, 1), (4000, 0, 0)])
def test_shuffling_without_effect_logs_a_warning(
    dataset: Path, batch_size: int, rank: int, warnings: int, caplog: pytest.LogCaptureFixture
) -> None:
    """4,500 rows of one row group make one batch, or of 4,000 and of 500, which a buffer of one row shuffles."""
    changes = {"batch_size": batch_size, "rank": rank, "world_size": 2, "shuffle": Shuffle(0, 1)}
    loader = make_loader(dataset, "valid", **changes)
    message = f"{dataset}: valid: its 4500 rows are one row group and make one batch, the same in each epoch; "
    assert caplog.messages == warnings * [message + "shuffle has no effect"]
    first, second = ([as_rows(batch) for batch in loader] for _ in range(2))
    assert torch.equal(torch.cat(first), torch.cat(second)) == (batch_size >= 4500)
