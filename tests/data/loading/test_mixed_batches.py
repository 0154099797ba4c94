"""Tests of the loader on multi-valued and weighted features: shuffled, on several ranks, and resumed."""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig

from mlet_dist.data.loading import row_groups
from mlet_dist.data.loading.jagged_tensors import JaggedBuilder
from mlet_dist.data.loading.loader import Batch, DataLoader
from mlet_dist.data.loading.order import Shuffle
from mlet_dist.data.loading.rows import Rows
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from tests.helpers.data_set_parts import replace_part, write_schema
from tests.helpers.mixed_dataset import DENSE, GROUP_ROWS, SIZES, SPARSE, write_mixed

ROWS = 1003
T = TypeVar("T")
Record = dict[str, Any]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Record]]]:
    """Return the data set, which tests must not change, and the rows of its splits as plain Python."""
    path = tmp_path_factory.mktemp("mixed") / "data"
    tables = write_mixed(path, ROWS)
    return path, {split: records_of(table) for split, table in tables.items()}


def records_of(table: pa.Table) -> list[Record]:
    """Return what batches hold of a table, row by row: lists of ids, and a weight for each id."""
    records = table.to_pylist()
    for record in records:
        for name in SPARSE:
            ids = record[name] if isinstance(record[name], list) else [record[name]]
            weights = record.pop(f"{name}.weight", [1.0] * len(ids))
            record[name] = list(zip(ids, weights, strict=True))
    return records


def unpack(batch: Batch) -> list[Record]:
    """Return the records of a batch; padding is checked and left out."""
    assert batch.labels[batch.num_rows :].eq(0).all()
    assert batch.dense[batch.num_rows :].eq(0).all()
    records: list[Record] = [
        {"label": int(label), **dict(zip(DENSE, dense.tolist(), strict=True))}
        for label, dense in zip(batch.labels[: batch.num_rows], batch.dense, strict=False)
    ]
    for name, jagged in batch.sparse.to_dict().items():
        assert jagged.lengths()[batch.num_rows :].eq(0).all()
        pairs = list(zip(jagged.values().tolist(), jagged.weights().tolist(), strict=True))
        offsets = jagged.offsets().tolist()
        for record, start, stop in zip(records, offsets, offsets[1:], strict=False):
            record[name] = pairs[start:stop]
    return records


def load(path: Path, split: str = "train", start: int = 0, **changes: Any) -> list[list[Record]]:
    loader = make_loader(path, split, **changes)
    loader.load_state_dict(loader.state_dict(start))
    return [unpack(batch) for batch in loader]


def make_loader(path: Path, split: str = "train", **changes: Any) -> DataLoader:
    arguments: dict[str, Any] = {
        "batch_size": 24,
        "rank": 0,
        "world_size": 1,
        "dense_features": None,
        "sparse_features": None,
    }
    return DataLoader(path, split, **(arguments | changes))


def flat(lists: Iterable[list[T]]) -> list[T]:
    return list(chain.from_iterable(lists))


def global_batches(path: Path, world_size: int, **arguments: Any) -> list[list[Record]]:
    ranks = [load(path, rank=rank, world_size=world_size, **arguments) for rank in range(world_size)]
    return [flat(parts) for parts in zip(*ranks, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [24, 120, 996])
def test_file_order_on_any_number_of_ranks(
    mixed: tuple[Path, dict[str, list[Record]]], world_size: int, batch_size: int
) -> None:
    path, expected = mixed
    batches = global_batches(path, world_size, batch_size=batch_size)
    assert batches == [expected["train"][start : start + batch_size] for start in range(0, ROWS, batch_size)]


@pytest.mark.parametrize("buffer_rows", [1, 100, 10_000])
def test_shuffled_order_on_any_number_of_ranks(mixed: tuple[Path, dict[str, list[Record]]], buffer_rows: int) -> None:
    path, expected = mixed
    alone = global_batches(path, 1, shuffle=Shuffle(5, buffer_rows))
    assert [len(batch) for batch in alone] == [24] * (ROWS // 24) + [ROWS % 24]
    rows = [int(record["row"]) for batch in alone for record in batch]
    assert rows != sorted(rows) == list(range(ROWS))
    assert flat(alone) == [expected["train"][row] for row in rows]
    for world_size in (2, 3, 4):
        assert global_batches(path, world_size, shuffle=Shuffle(5, buffer_rows)) == alone


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_run_resumes_with_the_next_batch_on_other_ranks(
    mixed: tuple[Path, dict[str, list[Record]]], data: st.DataObject
) -> None:
    """A run is stopped after any batch of two epochs; batches that a pipeline had taken ahead are read again."""
    path, _ = mixed
    shuffle = data.draw(st.none() | st.builds(Shuffle, st.integers(0, 9), st.sampled_from([1, 200, 2000])))
    before, after = data.draw(st.sampled_from([1, 2, 3, 4])), data.draw(st.sampled_from([1, 2, 3, 4]))
    uninterrupted = make_loader(path, batch_size=120, shuffle=shuffle)
    expected = [unpack(batch) for _ in range(2) for batch in uninterrupted]
    consumed = data.draw(st.integers(0, len(expected)))
    stopped = make_loader(path, batch_size=120, shuffle=shuffle, rank=before - 1, world_size=before)
    iterator = iter(stopped)
    for _ in range(data.draw(st.integers(0, 3))):
        next(iterator)
    state = stopped.state_dict(consumed)
    iterator.close()  # type: ignore[attr-defined]
    ranks = []
    for rank in range(after):
        loader = make_loader(path, batch_size=120, shuffle=shuffle, rank=rank, world_size=after)
        assert loader.load_state_dict(state) == consumed
        ranks.append([unpack(batch) for _ in range(2 - consumed // len(loader)) for batch in loader])
    assert [flat(parts) for parts in zip(*ranks, strict=True)] == expected[consumed:]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 60, 400])
def test_evaluation_covers_every_row_once(
    mixed: tuple[Path, dict[str, list[Record]]], world_size: int, batch_size: int
) -> None:
    path, expected = mixed
    batches = global_batches(path, world_size, split="valid", batch_size=batch_size)
    assert flat(batches) == expected["valid"]


def test_ranks_decode_the_row_groups_of_a_window_once(
    mixed: tuple[Path, dict[str, list[Record]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except those on the borders of two ranks' parts (3 per window of 4 ranks) or of two windows."""
    path, _ = mixed
    decoded: list[int] = []
    decode = row_groups.SplitRows.decode

    def recording(self: row_groups.SplitRows, index: int) -> Rows:
        decoded.append(index)
        return decode(self, index)

    monkeypatch.setattr(row_groups.SplitRows, "decode", recording)
    global_batches(path, 4, batch_size=100, shuffle=Shuffle(0, 500))
    groups = -(-ROWS // GROUP_ROWS)
    assert set(decoded) <= set(range(groups + 3))  # each part ends with a smaller one
    assert groups <= len(decoded) <= groups + 3 + 2 * 3 + 1


def test_a_slice_of_a_table_keeps_its_own_lists(mixed: tuple[Path, dict[str, list[Record]]]) -> None:
    """The lists of a sliced Arrow array start in the middle of its values."""
    path, _ = mixed
    schema = DatasetSchema.load(path)
    parts = row_groups.SplitRows(path, schema, schema.parts["train"], DENSE, SPARSE, by_row=True)
    sliced = parts.convert(0, parts.read(0).slice(7, 20))
    builder = JaggedBuilder(SPARSE, 20, weighted=True)
    found, expected = builder.build(sliced), builder.build(parts.decode(0).slice(7, 27))
    assert torch.equal(found.values(), expected.values())
    assert torch.equal(found.weights(), expected.weights())
    assert torch.equal(found.lengths(), expected.lengths())


def test_features_in_the_requested_order_and_weights_only_with_a_weighted_one(
    mixed: tuple[Path, dict[str, list[Record]]],
) -> None:
    path, expected = mixed
    batch = next(iter(make_loader(path, sparse_features=["genres", "user", "item"], dense_features=["row"])))
    assert batch.sparse.keys() == ["genres", "user", "item"]
    assert batch.sparse.weights_or_none() is None
    assert batch.dense.shape == (24, 1)
    assert batch.sparse["genres"].values().tolist() == [
        id for record in expected["train"][:24] for id, _ in record["genres"]
    ]
    weighted = next(iter(make_loader(path, sparse_features=["tags"])))
    assert weighted.sparse.weights().dtype == torch.float32


def test_torchrec_pools_lists_by_their_weights(mixed: tuple[Path, dict[str, list[Record]]]) -> None:
    path, _ = mixed
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=4, num_embeddings=size, feature_names=[name])
        for name, size in SIZES.items()
    ]
    collection = EmbeddingBagCollection(tables=tables, is_weighted=True)
    batch = list(make_loader(path, shuffle=Shuffle(0, 600)))[-1]
    pooled = collection(batch.sparse)
    for name in SIZES:
        rows = collection.embedding_bags[name].weight
        assert pooled[name][batch.num_rows :].eq(0).all()  # padding of the incomplete batch
        for vector, record in zip(pooled[name][: batch.num_rows], unpack(batch), strict=True):
            ids, weights = zip(*record[name], strict=True) if record[name] else ((), ())
            wanted = torch.tensor(weights) @ rows[list(ids)] if ids else torch.zeros(4)
            torch.testing.assert_close(vector, wanted)


@pytest.mark.parametrize("key", ["seed", "shuffle_buffer", "batch_size", "rows", "batches"])
def test_a_state_of_another_order_is_refused(mixed: tuple[Path, dict[str, list[Record]]], key: str) -> None:
    path, _ = mixed
    loader = make_loader(path, shuffle=Shuffle(1, 100))
    state = loader.state_dict(3)
    with pytest.raises(UserError, match=rf"train: cannot resume where the run stopped: {key} was 17 and is \d+;"):
        loader.load_state_dict(state | {key: 17})


def test_a_state_of_a_version_that_left_the_incomplete_batch_out(mixed: tuple[Path, dict[str, list[Record]]]) -> None:
    """It fits where all batches are complete: 1,003 rows are 41 batches of 24 and 19 rows, or 17 of 59."""
    for batch_size, fits in ((24, False), (59, True)):
        loader = make_loader(mixed[0], batch_size=batch_size)
        state = {key: value for key, value in loader.state_dict(3).items() if key != "batches"}
        if fits:
            assert loader.load_state_dict(state) == 3
            continue
        with pytest.raises(UserError, match="cannot resume where the run stopped: batches was 41 and is 42;"):
            loader.load_state_dict(state)


def test_a_state_of_another_vocabulary_is_refused(mixed: tuple[Path, dict[str, list[Record]]]) -> None:
    loader = make_loader(mixed[0], shuffle=Shuffle(1, 100))
    state = loader.state_dict(3)
    with pytest.raises(
        UserError,
        match=r"stopped: vocabulary_id was other and is mixed; with another vocabulary_id .* ids$",
    ):
        loader.load_state_dict(state | {"vocabulary_id": "other"})
    del state["vocabulary_id"]
    with pytest.raises(UserError, match=r"stopped: vocabulary_id was not saved and is mixed;"):
        loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("key", "value"),
    [*(("epoch", each) for each in (-1, 1.0, "1", True, None)), *(("row", each) for each in (10**9, -1, 3, "0", None))],
)
def test_an_invalid_state_is_refused(mixed: tuple[Path, dict[str, list[Record]]], key: str, value: object) -> None:
    loader = make_loader(mixed[0], shuffle=Shuffle(1, 100))
    state = loader.state_dict(3)
    size = state["batch_size"]
    assert isinstance(size, int)
    last = (len(loader) - 1) * size
    expected = "0 or more" if key == "epoch" else f"a multiple of {size} from 0 to {last}"
    with pytest.raises(UserError) as caught:
        loader.load_state_dict(state | {key: value})
    assert str(caught.value).endswith(f"{key} is {value!r}; it must be a whole number, {expected}")
    assert loader.load_state_dict(state) == 3
    assert loader.load_state_dict(state | {"row": last}) == len(loader) - 1
    with pytest.raises(UserError, match=f"row is {last + size};"):
        loader.load_state_dict(state | {"row": last + size})


TRAIN = "train/part-00001.parquet"


@pytest.fixture
def broken(mixed: tuple[Path, dict[str, list[Record]]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(mixed[0], tmp_path / "broken"))


def change_list(data: Path, column: str, values: list[Any] | None) -> None:
    table = pq.read_table(data / TRAIN)
    lists = table[column].to_pylist()
    lists[100] = values
    index = table.column_names.index(column)
    changed = table.set_column(index, column, pa.array(lists, table[column].type))
    replace_part(data, TRAIN, changed, row_group_size=50)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("genres", [3, 12], r"column genres holds id 12, outside \[0, 12\): its table has num_embeddings 12"),
        ("genres", [-1], r"column genres holds id -1, outside \[0, 12\)"),
        ("genres", None, "column genres has 1 missing values; none are allowed"),
        ("genres", [1, None], "column genres has 1 missing values; none are allowed"),
        ("tags.weight", [0.5] * 9, r"a list of column tags\.weight has another length than the list of column tags"),
        ("tags", [1] * 9, r"a list of column tags\.weight has another length than the list of column tags"),
    ],
)
@pytest.mark.parametrize("shuffle", [None, Shuffle(0, 100)])
def test_wrong_list_names_the_file(
    broken: Path, column: str, values: list[Any] | None, message: str, shuffle: Shuffle | None
) -> None:
    change_list(broken, column, values)
    with pytest.raises(UserError, match=f"{broken / TRAIN}: {message}"):
        list(make_loader(broken, shuffle=shuffle))


def test_a_weight_that_is_not_finite_names_the_file(broken: Path) -> None:
    length = len(pq.read_table(broken / TRAIN)["tags"][100])
    change_list(broken, "tags", [1] * max(1, length))
    change_list(broken, "tags.weight", [float("nan")] * max(1, length))
    with pytest.raises(UserError, match=r"column tags\.weight holds nan; it must be a finite number"):
        list(make_loader(broken))


@pytest.mark.parametrize(
    ("column", "wrong", "message"),
    [
        ("genres", pa.int32(), "column genres is int32 instead of list<int32>"),
        ("user", pa.list_(pa.int32()), "column user is list<int32> instead of int32"),
        ("genres", pa.list_(pa.int64()), "column genres is list<int64> instead of list<int32>"),
        ("tags.weight", None, r"column tags\.weight is missing instead of list<float>"),
    ],
)
def test_wrong_column_type_names_the_file_at_once(
    broken: Path, column: str, wrong: pa.DataType | None, message: str
) -> None:
    table = pq.read_table(broken / TRAIN)
    index = table.column_names.index(column)
    if wrong is None:
        table = table.remove_column(index)
    else:
        value = [1] if pa.types.is_list(wrong) else 1
        table = table.set_column(index, column, pa.array([value] * table.num_rows, wrong))
    pq.write_table(table, broken / TRAIN)
    with pytest.raises(UserError, match=f"{broken / TRAIN}: {message}"):
        make_loader(broken)


def write_weighted(path: Path, weights: Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]) -> Path:
    """Add weights of rows to a copy of a mixed data set, as a function of the row's number."""
    write_mixed(path, ROWS)
    for part in path.glob("*/*.parquet"):
        table = pq.read_table(part)
        column = pa.array(weights(table["row"].to_numpy().astype(np.float64)), pa.float32())
        table = table.append_column("sample_weight", column)
        replace_part(path, str(part.relative_to(path)), table, row_group_size=GROUP_ROWS)
    write_schema(path, json.loads((path / "schema.json").read_text()) | {"sample_weight": True})
    return path


@pytest.mark.parametrize("shuffle", [None, Shuffle(0, 100)])
@pytest.mark.parametrize("world_size", [1, 4])
def test_weights_of_rows_stay_with_their_rows(tmp_path: Path, shuffle: Shuffle | None, world_size: int) -> None:
    path = write_weighted(tmp_path / "data", lambda row: row / 4)
    for rank in range(world_size):
        loader = make_loader(path, rank=rank, world_size=world_size, shuffle=shuffle)
        assert loader.weighted
        for batch in loader:
            assert batch.weights is not None
            assert torch.equal(batch.weights, batch.dense[:, 0] / 4)  # column `row`; padding has zeros in both
            *_, weights = batch.to(torch.device("cpu")).predicted(batch.dense[:, 1])
            assert weights is not None
            assert torch.equal(weights, batch.weights[: batch.num_rows])


def test_without_the_column_there_are_no_weights(mixed: tuple[Path, dict[str, list[Record]]]) -> None:
    loader = make_loader(mixed[0])
    assert not loader.weighted
    assert next(iter(loader)).weights is None


@pytest.mark.parametrize("wrong", [-0.5, math.nan, math.inf])
def test_a_wrong_weight_of_a_row_names_file_column_and_value(tmp_path: Path, wrong: float) -> None:
    path = write_weighted(tmp_path / "data", lambda row: np.where(row == 700, wrong, 1))
    message = f"column sample_weight holds {np.float32(wrong)}; a weight must be a finite number of at least 0"
    with pytest.raises(UserError, match=re.escape(message)):
        list(make_loader(path))
