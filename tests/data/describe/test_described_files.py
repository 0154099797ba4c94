"""Tests that data sets can be prepared from files of every kind with the descriptions that `mlet describe` writes."""

import csv
import gzip
import io
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlet_dist.data.describe import describe
from mlet_dist.data.describe.head import guess_encoding
from mlet_dist.errors import UserError
from tests.helpers.described_tables import LABEL, ROWS, described, drawn, features, round_trip, spread, table

Write = Callable[..., Path]


def delimited(delimiter: str, *columns: list[object], header: tuple[str, ...] = ()) -> bytes:
    rows = [header] if header else []
    rows += [tuple(map(str, row)) for row in zip(*columns, strict=True)]
    return "".join(delimiter.join(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|", "\x01", "::", "||", " "])
@pytest.mark.parametrize("header", [(), ("click", "user", "views")], ids=["no header", "header"])
def test_delimiters_and_headers(tmp_path: Path, write_raw: Write, delimiter: str, header: tuple[str, ...]) -> None:
    columns = LABEL, [f"u{i}" for i in spread(0, 30)], [f"{i}.5" for i in spread(0, 90)]
    schema, found = round_trip(write_raw(delimited(delimiter, *columns, header=header), "a.txt"), tmp_path)
    names = header or ("c1", "c2", "c3")
    assert (found["delimiter"], found["header"]) == (delimiter, bool(header))
    assert found.get("columns") == (None if header else list(names))
    assert found["label"] == {"column": names[0]}
    assert ([each.name for each in schema.sparse], schema.dense) == ([names[1]], (names[2],))
    assert (sum(schema.rows.values()), schema.malformed) == (ROWS, 0)


@pytest.mark.parametrize(
    ("encode", "encoding"),
    [
        (lambda text: text.encode(), None),
        (lambda text: text.encode("utf-8-sig"), None),
        (lambda text: text.encode("utf-16"), None),  # with a byte order mark
        (lambda text: text.encode("utf-16-le"), "utf-16-le"),
        (lambda text: text.encode("cp1252"), "cp1252"),
        (lambda text: text.replace("\n", "\r\n").encode(), None),
        (lambda text: gzip.compress(text.encode()), None),
    ],
    ids=["utf-8", "mark", "utf-16", "utf-16-le", "cp1252", "crlf", "gzip"],
)
def test_encodings(tmp_path: Path, write_raw: Write, encode: Callable[[str], bytes], encoding: str | None) -> None:
    text = table(stadt=drawn("Köln", "Paris", "Rom"), preis=[f"{i}.5" for i in spread(0, 50)], click=LABEL).decode()
    schema, found = round_trip(write_raw(encode(text), "a.csv"), tmp_path)
    assert found.get("encoding") == encoding
    values = pq.read_table(tmp_path / "out/vocabulary/stadt.parquet")["value"].to_pylist()
    assert sorted(values) == ["Köln", "Paris", "Rom"]
    assert (sum(schema.rows.values()), schema.malformed) == (ROWS, 0)


def test_damaged_utf8_stays_utf8() -> None:
    assert guess_encoding("é,1\nü,0\n".encode() + b"\xff,1\n") is None
    assert guess_encoding(b"\xe9,1\n\x81,0\n") == "latin-1"  # 0x81 is nothing in cp1252


def test_names_that_yaml_or_the_description_would_misread(tmp_path: Path, write_raw: Write) -> None:
    names = ["no", "1e3", "~", "C1: x", "#c", "[a]", "007", "null", "a..b", "x1", "x2", "x3", "*z", "type", "_p"]
    names += ["label", "a.b", "'q'", "é"]
    columns = {name: drawn(*"abcd", seed=i) for i, name in enumerate(names)}
    schema, found = round_trip(write_raw(table(y=LABEL, **columns), "a.csv"), tmp_path)
    assert found["label"] == {"column": "y"}
    assert len(schema.sparse) == len(names)
    assert {feature["column"] for feature in found["sparse"] if "column" in feature} >= {"*z", "a..b", "type", "label"}


def test_directories_and_hive_style_columns(tmp_path: Path) -> None:
    for day in (1, 2, 3, 4):
        part = tmp_path / f"logs/dt=2020-07-0{day}/part-0.csv"
        part.parent.mkdir(parents=True)
        part.write_bytes(table(user=drawn(*"abc", seed=day), click=LABEL))
    (tmp_path / "logs/_SUCCESS").touch()
    for raw in (tmp_path / "logs", tmp_path / "logs/*/*.csv", f"file://{tmp_path}/logs"):
        out = tmp_path / f"out{len(str(raw))}"
        out.mkdir()
        schema, found = round_trip(raw, out)
        assert found["split"]["starts"] == {"valid": "2020-07-03", "test": "2020-07-04"}
        assert schema.rows == {"train": 2 * ROWS, "valid": ROWS, "test": ROWS}
    (tmp_path / "ads/site=a").mkdir(parents=True)
    (tmp_path / "ads/site=b").mkdir()
    for site in "ab":
        (tmp_path / f"ads/site={site}/0.csv").write_bytes(table(user=drawn(*"abc", seed=3), click=LABEL))
    (tmp_path / "ads/0.csv").touch()  # without rows
    assert list(features(described(tmp_path / "ads"), "sparse")) == ["user", "site"]


@pytest.mark.parametrize("rows", [3, 4, 5, 8, 9, 10, 11, 25])
def test_small_files(tmp_path: Path, write_raw: Write, rows: int) -> None:
    raw = write_raw(table(user=drawn(*"abc", rows=rows), click=[i % 2 for i in range(rows)]), "a.csv")
    schema, _ = round_trip(raw, tmp_path)
    assert sum(schema.rows.values()) == rows


def test_files_without_a_column_of_categories(tmp_path: Path, write_raw: Write) -> None:
    raw = write_raw(table(a=[i / 7 for i in spread(0, 99)], b=[i / 7 for i in spread(0, 9)], click=LABEL), "a.csv")
    schema, _ = round_trip(raw, tmp_path)
    assert ([each.name for each in schema.sparse], schema.dense) == (["b"], ("a",))
    assert "# b" in describe(str(raw)).text
    assert "this is a stand-in" in describe(str(raw)).text
    numbers = pa.table({"click": pa.array(LABEL), "time": pa.array(spread(0, 10**9), pa.timestamp("s"))})
    pq.write_table(numbers, tmp_path / "b.parquet")
    (tmp_path / "b").mkdir()
    assert [each.name for each in round_trip(tmp_path / "b.parquet", tmp_path / "b")[0].sparse] == ["time"]


def test_the_head_is_bounded(tmp_path: Path, write_raw: Write) -> None:
    users = [f"u{i}" for i in spread(0, 9, rows=30_000)]
    raw = write_raw(table(user=users, click=drawn(0, 1, rows=30_000)), "a.csv")
    assert describe(str(raw)).rows == 10_000
    assert "# from the first 10,000 rows.\n" in describe(str(raw)).text
    wide = write_raw(table(user=["u" * 10**6, "v"] * 12, click=[0, 1] * 12), "b.csv")
    assert describe(str(wide)).rows == 16  # of 8 MiB
    pq.write_table(pa.table({"user": users, "click": drawn(0, 1, rows=30_000)}), tmp_path / "c.parquet")
    assert describe(str(tmp_path / "c.parquet")).rows == 10_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "contains no rows to describe"),
        (b"\n\n", "contains no rows to describe"),
        (b"user,click\n", "contains no rows to describe"),
        (b"alone\nb\n", "the lines have no common delimiter"),
        (b"a,b\n1\n2,3,4\n", "the lines have no common delimiter"),
        (b'[{"a": 1},\n{"a": 2}]\n', "its lines are not JSON objects; write one object on each line"),
        (b'{\n"a": 1}\n', "its lines are not JSON objects"),
        (b"\x1f\x8b\x08\x00damaged", "truncated or corrupt"),
        (b"PAR1damaged", "not a complete Parquet file"),
    ],
)
def test_what_cannot_be_described(write_raw: Write, content: bytes, message: str) -> None:
    raw = write_raw(content, "a.txt")
    with pytest.raises(UserError) as error:
        describe(str(raw))
    assert str(error.value).startswith(f"{raw}: ")
    assert message in str(error.value)


def test_a_label_alone(tmp_path: Path) -> None:
    pq.write_table(pa.table({"click": LABEL, "place": [{"x": 1}] * ROWS}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="has no column to make a sparse feature of, besides label and time"):
        describe(str(tmp_path / "a.parquet"))


line_ends = "\0\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=line_ends), max_size=8)
values = st.one_of(
    st.lists(texts, min_size=1, max_size=6),
    st.just(["", "NULL", "nan", "7", "7.0", "007"]),
    st.lists(st.integers(-5, 2**63 - 1), min_size=1, max_size=30),
    st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=2, max_size=30),
    st.just(["a|b", "b", "c|a|a"]),
    st.just(["[1, 2]", "[]", "[3]"]),
    st.just(["2020-07-05 05:27:48.378", "2020-07-06", "2020-07-07"]),
    st.sampled_from([["True", "False"], ["x"], [""], ["a:1;b:2", "b:0.5"]]),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    columns=st.lists(values, min_size=1, max_size=5),
    rows=st.sampled_from([12, 40, 130]),
    form=st.sampled_from(["csv", "tsv", "jsonl", "parquet"]),
    seed=st.integers(0, 99),
)
def test_any_table(columns: list[list[Any]], rows: int, form: str, seed: int) -> None:
    """No row of a table is malformed, whatever its values are, and no split is empty."""
    rng = random.Random(seed)
    content: dict[str, list[Any]] = {"click": [i % 2 for i in range(rows)]}
    content |= {f"v{i}": [rng.choice(each) for _ in range(rows)] for i, each in enumerate(columns)}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"a.{form}"
        if form == "parquet":
            pq.write_table(pa.table(content), path)
        elif form == "jsonl":
            lines = [dict(zip(content, row, strict=True)) for row in zip(*content.values(), strict=True)]
            path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        else:
            text = io.StringIO()
            writer = csv.writer(text, delimiter="," if form == "csv" else "\t", lineterminator="\n")
            writer.writerows([list(content), *zip(*content.values(), strict=True)])
            path.write_bytes(text.getvalue().encode())
        schema, found = round_trip(path, Path(directory))
        assert found["label"] == {"column": "click"}
        assert (sum(schema.rows.values()), schema.malformed) == (rows, 0)
