"""Tests of data sets prepared from logs with the values, labels, lists and times that people have."""

import datetime
import logging
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mlet_dist.data.prepare import raw_blocks, raw_files
from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError

Write = Callable[..., Path]

CSV = {"format": "csv", "label": {"column": "y"}, "sparse": [{"column": "x"}]}


def make(out: Path, description: dict[str, Any], *raw: Path) -> DatasetSchema:
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(description, sort_keys=False))
    spec = load_table(path, lambda text: raw_files.inspect_file(str(raw[0]), text, ()).columns)
    schema = prepare(spec, raw, out)
    assert schema is not None
    assert check(out) == schema
    return schema


def table(out: Path) -> pa.Table:
    schema = DatasetSchema.load(out)
    return pa.concat_tables(
        [pq.read_table(out / part.path) for split in ("train", "valid", "test") for part in schema.parts[split]]
    )


def csv(*lines: str) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def vocabulary(out: Path, feature: str) -> list[str]:
    return pq.read_table(out / f"vocabulary/{feature}.parquet")["value"].to_pylist()


@pytest.mark.parametrize("values", [("1", "2"), ("0", "1", "2"), ("-1", "1"), ("1.0", "5.0"), ("3", "4", "5")])
def test_labels_of_other_numbers_are_an_error_that_names_them(
    tmp_path: Path, write_raw: Write, values: tuple[str, ...]
) -> None:
    rng = random.Random(3)
    rows = [f"{values[0] if rng.random() < 0.95 else rng.choice(values[1:])},u{i % 7}" for i in range(400)]
    path = write_raw(csv("y,x", *rows), "a.csv")
    with pytest.raises(
        UserError, match=r"the label column 'y' holds .* besides 0 and 1; say which labels are positive"
    ) as error:
        make(tmp_path / "out", CSV, path)
    assert not (tmp_path / "out").exists()
    top = values[-1]
    assert f"`positive_from: {top}`" in str(error.value)  # which does not make all labels 0, as 2 would for -1 and 1
    expected = [int(float(row.split(",")[0]) == float(top)) for row in rows]
    for label in (
        {"positive_from": float(top)},
        {"positive": [top]},
        {"positive": [top], "negative": list(values[:-1])},
    ):
        out = tmp_path / f"out{len(label)}{next(iter(label))}"
        assert make(out, CSV | {"label": {"column": "y"} | label}, path).malformed == 0
        assert table(out)["label"].to_pylist() == expected


def test_labels_as_words(tmp_path: Path, write_raw: Write) -> None:
    path = write_raw(csv("y,x", *["yes,a", "no,b", "no,c"] * 20, "maybe,d"), "a.csv")
    label = {"column": "y", "positive": ["yes"], "negative": ["no"]}
    assert make(tmp_path / "out", CSV | {"label": label}, path).malformed == 1
    assert table(tmp_path / "out")["label"].to_pylist() == [1, 0, 0] * 20


@pytest.mark.parametrize("spelling", ["NULL", "nan", "NA", "\\N", "", "None", "?"])
def test_rows_with_missing_numbers_are_kept(tmp_path: Path, write_raw: Write, spelling: str) -> None:
    rows = [f"{i % 2},{spelling if i % 3 else i},{spelling if i % 4 else i % 5}" for i in range(60)]
    description = CSV | {"dense": [{"column": "p", "transform": "raw"}], "sparse": [{"column": "x", "cast": "integer"}]}
    schema = make(tmp_path / "out", description, write_raw(csv("y,p,x", *rows), "a.csv"))
    assert (schema.malformed, sum(schema.rows.values())) == (0, 60)
    assert table(tmp_path / "out")["p"].to_pylist() == [0.0 if i % 3 else float(i) for i in range(60)]
    assert vocabulary(tmp_path / "out", "x")[0] == ""


def test_the_same_table_as_csv_and_parquet_has_the_same_ids(tmp_path: Path, write_raw: Write) -> None:
    rng = random.Random(5)
    n = 300
    day = datetime.date(2024, 2, 28)
    columns: dict[str, list[Any]] = {
        "y": [i % 2 for i in range(n)],
        "user": [rng.choice([1, 2, 3, 40, None]) for _ in range(n)],
        "flag": [rng.random() < 0.5 for _ in range(n)],
        "big": [rng.choice([2**62 + 1, 2**63 - 1, -(2**63)]) for _ in range(n)],
        "day": [day + datetime.timedelta(rng.randrange(3)) for _ in range(n)],
        "text": [rng.choice(["a", "é", "NA", None]) for _ in range(n)],
        "price": [rng.choice([0.5, 1.25, None]) for _ in range(n)],
        "tags": [rng.sample([1, 2, 30], rng.randrange(3)) for _ in range(n)],
    }
    kinds = {"user": pa.float64(), "text": pa.string_view(), "tags": pa.list_(pa.float64()), "big": pa.int64()}
    in_parquet = tmp_path / "a.parquet"
    pq.write_table(pa.table({name: pa.array(column, kinds.get(name)) for name, column in columns.items()}), in_parquet)

    def field(value: Any) -> str:
        return "" if value is None else f'"{value}"' if isinstance(value, list) else str(value)

    rows = [",".join(field(column[i]) for column in columns.values()) for i in range(n)]
    in_csv = write_raw(csv(",".join(columns), *rows), "a.csv")
    description = {
        "label": {"column": "y"},
        "dense": [{"column": "price", "transform": "raw"}],
        "sparse": [
            *({"column": name} for name in ("user", "flag", "big", "day", "text")),
            {"column": "tags", "multi_valued": True},
        ],
    }
    one = make(tmp_path / "csv", {"format": "csv"} | description, in_csv)
    two = make(tmp_path / "parquet", {"format": "parquet"} | description, in_parquet)
    assert table(tmp_path / "csv").equals(table(tmp_path / "parquet"))
    assert one.num_embeddings == two.num_embeddings == {"user": 6, "flag": 3, "big": 4, "day": 4, "text": 5, "tags": 4}
    for name in ("user", "big", "day", "text", "tags"):
        assert vocabulary(tmp_path / "csv", name) == vocabulary(tmp_path / "parquet", name)


def test_an_all_null_column_of_one_part_is_missing(tmp_path: Path) -> None:
    for part, users in enumerate([["a", "b"] * 20, [None] * 40]):
        columns = {"y": pa.array([0, 1] * 20), "x": pa.array(users), "d": pa.array([None] * 40)}
        pq.write_table(pa.table(columns), tmp_path / f"{part}.parquet")
    description = CSV | {"format": "parquet", "dense": [{"column": "d", "missing": 3, "transform": "raw"}]}
    schema = make(tmp_path / "out", description, tmp_path / "0.parquet", tmp_path / "1.parquet")
    assert (schema.malformed, sum(schema.rows.values())) == (0, 80)
    assert set(table(tmp_path / "out")["d"].to_pylist()) == {3.0}
    assert sorted(vocabulary(tmp_path / "out", "x")) == ["", "a", "b"]


def test_elements_left_out_and_unused_separators_are_reported(
    tmp_path: Path, write_raw: Write, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"{i % 2},3|{i % 5}|,1;2,a|b|c" for i in range(40)]
    sparse = [
        {"column": "tags", "separator": "|"},
        {"column": "wrong", "separator": "|"},
        {"column": "long", "separator": "|", "max_len": 2},
    ]
    with caplog.at_level(logging.WARNING):
        schema = make(tmp_path / "out", CSV | {"sparse": sparse}, write_raw(csv("y,tags,wrong,long", *rows), "a.csv"))
    assert schema.sparse[0].pooling_factor == 2
    assert "tags: left out 40 empty or missing elements of lists" in caplog.text
    assert "wrong: the separator '|' occurs in no row of column wrong" in caplog.text
    assert "long: left out 40 values of lists with more than max_len 2 values" in caplog.text
    assert vocabulary(tmp_path / "out", "wrong") == ["1;2"]


def test_a_vocabulary_has_a_largest_size(tmp_path: Path, write_raw: Write) -> None:
    values = [value for value, count in (("a", 40), ("b", 30), ("c", 20), ("d", 10)) for _ in range(count)]
    random.Random(1).shuffle(values)
    path = write_raw(csv("y,x", *(f"{i % 2},{value}" for i, value in enumerate(values))), "a.csv")
    split = {"by": "random"}
    full = make(tmp_path / "full", CSV | {"split": split}, path)
    capped = CSV | {"split": split, "sparse": [{"column": "x", "max_num_embeddings": 3}]}
    schema = make(tmp_path / "out", capped, path)
    assert (full.num_embeddings, schema.num_embeddings) == ({"x": 5}, {"x": 3})
    assert vocabulary(tmp_path / "out", "x") == vocabulary(tmp_path / "full", "x")[:2] == ["a", "b"]
    expected = [min(i, 3) % 3 for i in table(tmp_path / "full")["x"].to_pylist()]
    assert table(tmp_path / "out")["x"].to_pylist() == expected


def test_one_entry_describes_several_columns(tmp_path: Path, write_raw: Write) -> None:
    names = ["I1", "I2", "C1", "C2", "C3", "user_id", "user_city", "other"]
    rows = [",".join([str(i % 2), *(str((i * 7 + j) % 5) for j in range(8))]) for i in range(40)]
    path = write_raw(csv(",".join(["y", *names]), *rows), "a.csv")
    description = CSV | {
        "dense": [{"columns": ["I1", "I2"], "transform": "raw"}],
        "sparse": [
            {"column": "user_city", "name": "city", "encoding": "hash", "num_embeddings": 11},
            {"columns": ["C1..C3", "user_*"], "min_count": 2},
        ],
    }
    schema = make(tmp_path / "out", description, path)
    assert schema.dense == ("I1", "I2")
    # A column with an entry of its own is not described again.
    assert [feature.name for feature in schema.sparse] == ["city", "C1", "C2", "C3", "user_id"]
    for columns, message in (
        (["Q*"], "sparse.*columns is 'Q\\*'; it must be a column, range or pattern of columns; there are y, I1"),
        (["C9"], "the header has no column 'C9'"),
        ([], "columns is \\[\\]; it must be a list of columns"),
    ):
        with pytest.raises(UserError, match=message):
            make(tmp_path / "other", CSV | {"sparse": [{"columns": columns}]}, path)


def test_times_with_fractions_are_ordered_across_blocks(
    tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 1 << 10)
    # The first blocks hold whole numbers alone.
    times = [1_593_878_000 + i for i in range(200)] + [1_593_878_000.5 + i for i in range(200)]
    rows = [f"{i % 2},{time},v{time}" for i, time in enumerate(times)]
    path = write_raw(csv("y,t,x", *rows), "a.csv")
    split = {"by": "time", "column": "t"}
    make(tmp_path / "shares", CSV | {"split": split, "sparse": [{"column": "x"}]}, path)
    ordered = sorted(times)
    assert set(vocabulary(tmp_path / "shares", "x")) == {f"v{time}" for time in ordered[:320]}
    starts = {"valid": 1_593_878_100.25, "test": 1_593_878_150}
    make(tmp_path / "starts", CSV | {"split": split | {"starts": starts}, "sparse": [{"column": "x"}]}, path)
    assert set(vocabulary(tmp_path / "starts", "x")) == {f"v{t}" for t in times if t < starts["valid"]}
    assert DatasetSchema.load(tmp_path / "starts").rows["test"] == sum(t >= starts["test"] for t in times)


def test_starts_are_written_as_the_column_writes_times(tmp_path: Path, write_raw: Write) -> None:
    moments = [f"2024-03-{1 + i % 30:02} 12:00:00.123 UTC" for i in range(60)]
    path = write_raw(csv("y,t,x", *(f"{i % 2},{time},a" for i, time in enumerate(moments))), "a.csv")
    split = {"by": "time", "column": "t", "starts": {"valid": datetime.date(2024, 3, 21), "test": "2024-03-28T00:00Z"}}
    assert make(tmp_path / "out", CSV | {"split": split}, path).rows == {"train": 40, "valid": 14, "test": 6}
    numbers = write_raw(csv("y,t,x", *(f"{i % 2},{i},a" for i in range(60))), "b.csv")
    with pytest.raises(
        UserError, match=r"split.starts are dates or times, but t holds whole numbers \(.*b.csv: line 2\)"
    ):
        make(tmp_path / "other", CSV | {"split": split}, numbers)
    mixed = {"by": "time", "column": "t", "starts": {"valid": 5, "test": "2024-03-28"}}
    with pytest.raises(UserError, match=r"split.starts is .*; it must be different times, as the column writes them"):
        make(tmp_path / "other", CSV | {"split": mixed}, path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"min_cout": 2}, r"sparse\[0\].min_cout is not a valid key here \(did you mean 'min_count'\?\); known keys"),
        (
            {"max_len": 3},
            r"sparse\[0\].max_len is not a valid key here; it goes with lists: set separator or multi_val",
        ),
        ({"num_embeddings": 3}, "num_embeddings is not a valid key here.*; it goes with `encoding: hash`"),
        ({"encoding": "hash", "num_embeddings": 9, "min_count": 2}, "min_count is not .*; it goes with `encoding: voc"),
        ({"integer": True, "cast": "text"}, "cast is 'text'; it must be left out where integer is true"),
        ({"separator": "|", "multi_valued": False}, "multi_valued is False; it must be true, or left out"),
        ({"separator": "|", "weights": "w", "weight_separator": ":"}, "weights is 'w'; it must be left out where"),
        (
            {"separator": ":", "weight_separator": ":"},
            "weight_separator is ':'; it must be another text than separator",
        ),
        ({"missing_values": "NA"}, "missing_values is 'NA'; it must be a list of texts"),
        ({"missing_values": [None]}, "missing_values is .*; it must be a list of texts in quotes"),
        ({"columns": ["a"], "name": "b"}, "column is 'x'; it must be left out where `columns` lists the columns"),
    ],
)
def test_keys_that_do_not_go_together(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(CSV | {"sparse": [{"column": "x"} | keys]}))
    with pytest.raises(UserError, match=message):
        load_table(path)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ({"positive": [1], "positive_from": 2}, "positive_from is 2; it must be left out where label.positive lists"),
        ({"negative": [1]}, r"negative is \['1'\]; it must be given together with label.positive"),
        ({"positive": [1], "negative": ["1"]}, r"negative is \['1'\]; it must be other values than those of"),
        ({"positive": []}, r"positive is \[\]; it must be a list of one label or more"),
    ],
)
def test_label_keys_that_do_not_go_together(tmp_path: Path, label: dict[str, Any], message: str) -> None:
    path = tmp_path / "t.yaml"
    path.write_text(yaml.safe_dump(CSV | {"label": {"column": "y"} | label}))
    with pytest.raises(UserError, match=message):
        load_table(path)


def test_weights_of_rows(tmp_path: Path, write_raw: Write) -> None:
    weights = [str(i / 4) if i % 5 else "NULL" for i in range(60)]
    path = write_raw(csv("y,w,x", *(f"{i % 2},{weight},a" for i, weight in enumerate(weights)), "1,-1,a"), "a.csv")
    description = CSV | {"sample_weight": "w", "max_malformed": 0.5}
    schema = make(tmp_path / "out", description, path)
    assert (schema.sample_weight, schema.malformed) == (True, 12 + 1)
    found = table(tmp_path / "out")
    assert found.column_names == ["label", "sample_weight", "x"]
    assert found["sample_weight"].to_pylist() == [i / 4 for i in range(60) if i % 5]
    with pytest.raises(UserError, match="two features are named 'sample_weight'"):
        make(tmp_path / "other", description | {"sparse": [{"column": "x", "name": "sample_weight"}]}, path)
