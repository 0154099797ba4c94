"""The number of lookups of each row in the training split."""

import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from mlet_dist.data.row_counts import count_ids
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from tests.helpers.tables import PLAIN, prepare_table


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("counts"), random.Random(2)
    lines = ["y,a,b,c,h"]
    for _ in range(500):
        items = "|".join(str(rng.randrange(12)) for _ in range(rng.randrange(4)))
        lines.append(f"{rng.randrange(2)},{int(rng.expovariate(0.2))},{items},{rng.randrange(9)},{rng.randrange(99)}")
    (folder / "a.csv").write_text("\n".join(lines) + "\n")
    sparse = [
        {"column": "a", "min_count": 3},
        {"column": "b", "separator": "|"},
        {"column": "c", "table": "b"},
        {"column": "h", "encoding": "hash", "num_embeddings": 20},
    ]
    prepare_table(folder / "data", PLAIN | {"sparse": sparse}, [folder / "a.csv"])
    return folder / "data"


def counted(data: Path, features: list[str], rows: int) -> list[int]:
    """Count the ids of features one by one."""
    found = [0] * rows
    for part in DatasetSchema.load(data).parts["train"]:
        for row in pq.read_table(data / part.path, columns=features).to_pylist():
            for value in row.values():
                for each in value if isinstance(value, list) else [value]:
                    found[each] += 1
    return found


def test_counts_are_those_of_the_training_rows(data: Path) -> None:
    schema = DatasetSchema.load(data)
    for table, features in {"a": ["a"], "b": ["b", "c"], "h": ["h"]}.items():
        expected = counted(data, features, schema.table_sizes[table])
        assert count_ids(data, schema, table).tolist() == expected, table
        assert count_ids(data, schema, table, ["a", "b", "c", "h"]).tolist() == expected, table


def test_features_that_are_left_out_are_not_counted(data: Path) -> None:
    schema = DatasetSchema.load(data)
    assert count_ids(data, schema, "b", ["c"]).tolist() == counted(data, ["c"], schema.table_sizes["b"])


def test_without_vocabularies_the_rows_are_counted(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    shutil.rmtree(copy / "vocabulary")
    schema = DatasetSchema.load(data)
    for table in ("a", "b"):
        assert np.array_equal(count_ids(copy, schema, table), count_ids(data, schema, table))


def test_a_missing_file_is_named(data: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)
    (copy / DatasetSchema.load(copy).parts["train"][0].path).unlink()
    with pytest.raises(UserError, match=r"train/part-00000\.parquet: missing"):
        count_ids(copy, DatasetSchema.load(copy), "h")
