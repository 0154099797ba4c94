"""Tests of mlet_dist.data.parquet_parts."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.data.parquet_parts import ROW_GROUP_ROWS, required, write_parquet

ROWS = ROW_GROUP_ROWS + 5
IDS = np.random.default_rng(0).integers(0, 2**31 - 1, ROWS, dtype=np.int32)
TABLE = pa.table(
    {
        "label": pa.array(IDS % 2, pa.int8()),
        "d": pa.array(IDS / 7, pa.float32()),
        "C1": pa.array(IDS),
        "l": pa.ListArray.from_arrays(pa.array(np.arange(ROWS + 1, dtype=np.int32)), pa.array(IDS)),
        "l.weight": pa.ListArray.from_arrays(pa.array(np.arange(ROWS + 1, dtype=np.int32)), pa.array(IDS / 9)),
        "value": pa.array(IDS % 100).cast(pa.string()),
    }
)


def test_columns_round_trip_and_ids_are_byte_stream_split(tmp_path: Path) -> None:
    write_parquet(TABLE, tmp_path / "a.parquet")
    with pq.ParquetFile(tmp_path / "a.parquet", page_checksum_verification=True) as file:
        assert file.read().equals(required(TABLE))
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [ROW_GROUP_ROWS, 5]
        group = file.metadata.row_group(0)
        columns = [group.column(i) for i in range(group.num_columns)]
        found = {column.path_in_schema: set(column.encodings) - {"RLE", "PLAIN"} for column in columns}
        assert {column.compression for column in columns} == {"LZ4"}
        assert [file.schema.column(i).max_definition_level for i in range(6)] == [0, 0, 0, 2, 2, 0]
    dictionary = {"RLE_DICTIONARY"}
    assert found.pop("C1") == {"BYTE_STREAM_SPLIT"}
    assert found == dict.fromkeys(("label", "d", "l.list.element", "l.weight.list.element", "value"), dictionary)


def test_nulls_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="null"):
        write_parquet(pa.table({"C1": pa.array([1, None], pa.int32())}), tmp_path / "a.parquet")


def test_the_footer_holds_the_checksum_of_the_bytes_before_it(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    sums = write_parquet(TABLE, path)
    content = path.read_bytes()
    footer = int.from_bytes(content[-8:-4], "little") + 8
    assert sums.bytes == len(content)
    assert sums.sha256 == hashlib.sha256(content).hexdigest()
    assert sums.pages_sha256 == hashlib.sha256(content[:-footer]).hexdigest()
    assert pq.read_metadata(path).metadata[b"mlet_dist.pages_sha256"].decode() == sums.pages_sha256
