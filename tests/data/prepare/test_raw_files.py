"""Tests of raw files as they come: parts without rows, files that are none, delimiters of several characters."""

import csv
import gzip
import io
import os
import socket
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlet_dist.data.prepare.parsing import parse_block
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.raw_blocks import Block
from mlet_dist.data.prepare.raw_files import inspect_file
from mlet_dist.data.prepare.raw_formats import LabelColumn, SparseColumn, TableSpec, TextFormat, criteo
from mlet_dist.data.prepare.splits import SplitRule
from mlet_dist.errors import UserError
from tests.helpers.raw_logs import make_raw_lines, raw_bytes
from tests.helpers.tables import PLAIN, prepare_table, values_of

ROWS = [{"y": i % 2, "x": f"v{i % 7}"} for i in range(60)]
CSV = ("y,x\n" + "".join(f"{row['y']},{row['x']}\n" for row in ROWS)).encode()
EMPTY_CSV = {
    "nothing": b"",
    "header": b"y,x\n",
    "header without a line end": b"y,x",
    "mark": b"\xef\xbb\xbf",
    "blank": b"\n\n\r\n",
    "header and blank": b"y,x\n\n\n",
    "gzip": gzip.compress(b""),
    "gzip header": gzip.compress(b"y,x\n"),
}


def _parquet(path: Path, table: pa.Table) -> Path:
    pq.write_table(table, path)
    return path


@pytest.mark.parametrize("content", EMPTY_CSV.values(), ids=EMPTY_CSV)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_csv_parts_without_rows(
    content: bytes, position: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They are passed over with a word, wherever they are; the rows of the others are the same."""
    parts = [CSV[: CSV.index(b"\n", 200) + 1], b"y,x\n" + CSV[CSV.index(b"\n", 200) + 1 :]]
    parts.insert(position, content)
    for index, part in enumerate(parts):
        (tmp_path / f"{index}.csv").write_bytes(part)
    prepare_table(tmp_path / "out", PLAIN, [tmp_path / f"{index}.csv" for index in range(3)])
    assert values_of(tmp_path / "out") == [row["x"] for row in ROWS]
    assert [record.getMessage() for record in caplog.records] == [
        f"no rows in {tmp_path / f'{position}.csv'}: passed over"
    ]


@pytest.mark.parametrize(
    "empty",
    [
        pa.Table.from_pylist(ROWS).slice(0, 0),
        pa.table({"y": pa.nulls(0), "x": pa.nulls(0)}),
        pa.table({}),
        None,
    ],
)
def test_parquet_parts_without_rows(empty: pa.Table | None, tmp_path: Path) -> None:
    if empty is None:
        (tmp_path / "0.parquet").write_bytes(b"")
    else:
        _parquet(tmp_path / "0.parquet", empty)
    _parquet(tmp_path / "1.parquet", pa.Table.from_pylist(ROWS))
    prepare_table(tmp_path / "out", PLAIN | {"format": "parquet"}, [tmp_path / "*.parquet"])
    assert values_of(tmp_path / "out") == [row["x"] for row in ROWS]


def test_no_file_has_rows(tmp_path: Path) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_bytes(b"y,x\n")
    with pytest.raises(UserError, match=r"a\.csv: neither this nor another of 2 files has rows; give files with rows$"):
        prepare_table(tmp_path / "out", PLAIN, [tmp_path / "a.csv", tmp_path / "b.csv"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "b.csv", "out.yaml"]


def test_headers_of_empty_parts_are_checked(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(CSV)
    (tmp_path / "b.csv").write_bytes(b"y,z\n")
    with pytest.raises(UserError, match=r"b\.csv: line 1: the header has no column 'x'; it has y, z"):
        prepare_table(tmp_path / "out", PLAIN, [tmp_path / "a.csv", tmp_path / "b.csv"])


def test_many_parts_without_rows_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for index in range(20):
        (tmp_path / f"{index}.csv").write_bytes(b"" if index else CSV)
    prepare_table(tmp_path / "out", PLAIN, [tmp_path / "*.csv"])
    [record] = caplog.records
    names = ", ".join(str(tmp_path / f"{index}.csv") for index in (1, 2, 3))
    assert record.getMessage() == f"no rows in {names}, … (19 files): passed over"


def test_times_and_files_with_parts_without_rows(tmp_path: Path) -> None:
    for index in range(3):
        (tmp_path / f"{index}.csv").write_text("y,x,t\n" + ("" if index == 1 else 10 * f"1,a,{index}\n0,a,{index}\n"))
    files = [tmp_path / f"{index}.csv" for index in range(3)]
    split = {"by": "time", "column": "t", "shares": {"train": 0.5, "test": 0.5}}
    assert prepare_table(tmp_path / "a", PLAIN | {"split": split}, files).rows == {"train": 20, "test": 20}
    assert prepare_table(tmp_path / "b", PLAIN | {"split": {"by": "file"}}, files).rows == {
        "train": 20,
        "valid": 10,
        "test": 10,
    }


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device"])
def test_files_that_never_end_are_refused_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listening:
        if kind == "a FIFO":
            os.mkfifo("logs")
        elif kind == "a socket":
            listening.bind("logs")
        else:
            Path("logs").symlink_to("/dev/zero")
        for form in ("csv", "parquet", "jsonl"):
            with pytest.raises(UserError, match=f"logs: is {kind}; raw data is read more than once, so write it to a"):
                prepare_table(tmp_path / "out", PLAIN | {"format": form}, ["logs"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "out.yaml"]


DELIMITERS = ["::", "||", "\x01", "§", " :: ", "ab", "\t\t", ";", "\x1f\x1e"]
FIELDS = st.text(st.sampled_from(':|ab "\x01\x1f\x1eé§;,'), max_size=5)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=6), delimiter=st.sampled_from(DELIMITERS))
def test_any_delimiter_without_quotes(rows: list[tuple[str, str]], delimiter: str) -> None:
    """Lines are cut as Python's split cuts them; those of another number of fields are malformed."""
    lines = [f"1{delimiter}{delimiter.join(row)}" for row in rows]
    expected = [line.split(delimiter) for line in lines]
    spec = _table(TextFormat(delimiter, None, False, ("y", "x", "z")))
    block = Block("a", 1, 0, 0, "".join(f"{line}\n" for line in lines).encode())
    table, info = parse_block(spec, ("y", "x", "z"), block)
    good = [fields for fields in expected if len(fields) == 3 and fields[0] == "1"]
    assert [table["sparse.x"].to_pylist(), table["sparse.z"].to_pylist()] == [[f[i] for f in good] for i in (1, 2)]
    assert info.malformed == len(lines) - len(good)


@settings(deadline=None, max_examples=200)
@given(rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=6), delimiter=st.sampled_from(DELIMITERS))
def test_any_delimiter_within_quotes(rows: list[tuple[str, str]], delimiter: str) -> None:
    quoted = [delimiter.join('"{}"'.format(field.replace('"', '""')) for field in ("1", *row)) for row in rows]
    spec = _table(TextFormat(delimiter, '"', False, ("y", "x", "z")))
    block = Block("a", 1, 0, 0, "".join(f"{line}\n" for line in quoted).encode())
    table, info = parse_block(spec, ("y", "x", "z"), block)
    assert info.malformed == 0
    assert [table["sparse.x"].to_pylist(), table["sparse.z"].to_pylist()] == [[row[i] for row in rows] for i in (0, 1)]


def _table(text: TextFormat) -> TableSpec:
    sparse = (SparseColumn("x", "x"), SparseColumn("z", "z"))
    return TableSpec("table", text, LabelColumn("y"), (), sparse, SplitRule("rows"))


def test_movielens_with_its_own_delimiter(tmp_path: Path) -> None:
    lines = [f"{i % 7}::{i * 31 % 11}::{i % 5 + 1}::97830{i:04}" for i in range(60)]
    (tmp_path / "ratings.dat").write_text("\n".join(lines) + "\n", encoding="latin-1")
    description: dict[str, Any] = {
        "format": "csv",
        "delimiter": "::",
        "header": False,
        "columns": ["user", "film", "rating", "time"],
        "label": {"column": "rating", "positive_from": 4},
        "sparse": [{"column": "user"}, {"column": "film"}],
    }
    schema = prepare_table(tmp_path / "out", description, [tmp_path / "ratings.dat"])
    assert schema.malformed == 0
    assert values_of(tmp_path / "out", "user") == [str(i % 7) for i in range(60)]


def test_a_header_with_a_delimiter_of_several_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('y::"a::b"::x\n1::2::3\n')
    found = inspect_file(str(path), TextFormat("::", '"', True, None), ("y", "a::b"))
    assert found.columns == ("y", "a::b", "x")


def test_a_line_end_within_quotes_says_so(tmp_path: Path) -> None:
    text = io.StringIO()
    csv.writer(text).writerows([["y", "x"], *([i % 2, "two\nlines"] for i in range(30))])
    (tmp_path / "a.csv").write_text(text.getvalue())
    with pytest.raises(UserError, match="a quote that is not closed on its line; a line end within quotes is not supp"):
        prepare_table(tmp_path / "out", PLAIN, [tmp_path / "a.csv"])


@pytest.mark.parametrize("kind", ["blank", "carriage returns"])
def test_blank_lines_are_not_read_one_by_one(kind: str, tmp_path: Path) -> None:
    """A gzip of 32 MiB of them is 30 kB; it took minutes."""
    line = b"\r\n" if kind == "carriage returns" else b"\n"
    path = tmp_path / "day.tsv.gz"
    path.write_bytes(gzip.compress(raw_bytes(make_raw_lines(50)) + line * ((32 << 20) // len(line)), 1))
    start = time.monotonic()
    prepare(criteo(), [path], tmp_path / "out", only="read")
    assert time.monotonic() - start < 60


def test_a_block_of_malformed_lines_takes_little_time(tmp_path: Path) -> None:
    block = Block("a", 1, 0, 0, b",\n" * (8 << 20))
    start = time.monotonic()
    table, info = parse_block(_table(TextFormat(",", '"', False, ("y", "x", "z"))), ("y", "x", "z"), block)
    assert time.monotonic() - start < 20
    assert (table.num_rows, info.malformed, len(info.examples)) == (0, 8 << 20, 5)
