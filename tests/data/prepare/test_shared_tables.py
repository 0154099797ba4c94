"""Tests of features that share an embedding table, and with it a vocabulary."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from tests.helpers.tables import PLAIN, prepare_table

Write = Callable[..., Path]

ITEM = {"column": "item"}
HISTORY = {"column": "history", "separator": "|", "table": "item"}
ROWS = [(f"i{n % 7}", "|".join(f"i{(n * k) % 11}" for k in range(1, n % 4 + 1))) for n in range(100)]


def make(tmp_path: Path, write_raw: Write, *sparse: dict[str, Any]) -> tuple[Path, DatasetSchema]:
    lines = ["y,item,history", *(f"{n % 2},{item},{history}" for n, (item, history) in enumerate(ROWS))]
    path = write_raw("".join(f"{line}\n" for line in lines).encode(), "a.csv")
    prepare_table(tmp_path / "data", PLAIN | {"sparse": list(sparse)}, [path])
    return tmp_path / "data", DatasetSchema.load(tmp_path / "data")


def columns(data: Path, schema: DatasetSchema) -> list[dict[str, Any]]:
    return [
        row for parts in schema.parts.values() for part in parts for row in pq.read_table(data / part.path).to_pylist()
    ]


def test_features_of_one_table_share_the_ids_of_its_vocabulary(tmp_path: Path, write_raw: Write) -> None:
    data, schema = make(tmp_path, write_raw, ITEM, HISTORY)
    assert check(data) == schema
    assert [(each.name, each.table_name) for each in schema.sparse] == [("item", "item"), ("history", "item")]
    counts = Counter(value for item, history in ROWS[:80] for value in [item, *filter(None, history.split("|"))])
    ordered = sorted(counts.items(), key=lambda each: (-each[1], each[0]))
    vocabulary = pq.read_table(data / "vocabulary/item.parquet").to_pylist()
    assert [(row["value"], row["count"]) for row in vocabulary] == ordered
    assert not (data / "vocabulary/history.parquet").exists()
    assert schema.table_sizes == {"item": 1 + len(ordered)}
    ids = {value: 1 + place for place, (value, _) in enumerate(ordered)}
    for row, (item, history) in zip(columns(data, schema), ROWS, strict=True):
        assert row["item"] == ids.get(item, 0)
        assert row["history"] == [ids.get(value, 0) for value in filter(None, history.split("|"))]


def test_hashed_features_of_one_table_share_its_salt(tmp_path: Path, write_raw: Write) -> None:
    hashed = {"encoding": "hash", "num_embeddings": 50}
    data, schema = make(
        tmp_path,
        write_raw,
        ITEM | hashed,
        HISTORY | hashed | {"table": "things"},
    )
    apart = columns(data, schema)
    (tmp_path / "again").mkdir()
    data, schema = make(tmp_path / "again", write_raw, ITEM | hashed, HISTORY | hashed)
    together = columns(data, schema)
    assert check(data) == schema
    assert [row["item"] for row in together] == [row["item"] for row in apart]
    assert [row["history"] for row in together] != [row["history"] for row in apart]
    of_value = {}
    for row, (item, history) in zip(together, ROWS, strict=True):
        for value, found in zip([item, *filter(None, history.split("|"))], [row["item"], *row["history"]], strict=True):
            assert of_value.setdefault(value, found) == found


def test_the_first_row_is_untrained_only_if_no_feature_of_the_table_looks_it_up(
    tmp_path: Path, write_raw: Write
) -> None:
    _, schema = make(tmp_path, write_raw, ITEM, HISTORY)
    assert schema.untrained_first_rows == ("item",)
    (tmp_path / "rare").mkdir()
    rare = {"min_count": 12}  # below it are values of the history alone
    _, schema = make(tmp_path / "rare", write_raw, ITEM | rare, HISTORY | rare)
    counts = schema.id_counts["train"]
    assert (counts["item"].out_of_vocabulary, counts["history"].out_of_vocabulary > 0) == (0, True)
    assert schema.untrained_first_rows == ()


@pytest.mark.parametrize(
    ("key", "one", "two"), [("min_count", 1, 2), ("max_num_embeddings", None, 5), ("cast", None, "'integer'")]
)
def test_features_of_one_table_must_have_the_same_ids(
    tmp_path: Path, write_raw: Write, key: str, one: object, two: object
) -> None:
    other = HISTORY | {key: two if isinstance(two, int) else "integer"}
    message = f"features 'item' and 'history' share the table 'item', but {key} is {one} of one and {two} of the other"
    with pytest.raises(UserError, match=message):
        make(tmp_path, write_raw, ITEM, other)
