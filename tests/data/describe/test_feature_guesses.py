"""Tests of the features that `mlet describe` makes of columns."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.data.describe import describe
from tests.helpers.described_tables import LABEL, ROWS, described, drawn, features, round_trip, spread, table

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("name", "values", "section"),
    [
        ("price", [f"{i / 7:.2f}" for i in spread(1, 999)], "dense"),
        ("views", spread(0, 90), "dense"),
        ("x", [int(random.Random(i).paretovariate(0.7)) for i in range(ROWS)], "dense"),  # most are small, few large
        ("x", spread(-50, 50), "dense"),
        ("user_age", spread(18, 80), "dense"),
        ("age_level", drawn(1, 2, 3, 4, 5, 6), "sparse"),
        ("num_users", spread(1, 60), "dense"),
        ("userId", spread(1, 60), "sparse"),
        ("x", spread(100, 170), "sparse"),  # whole numbers, spread evenly: codes
        ("x", drawn(0, 1, 2), "sparse"),
        ("zip", [f"{i:05}" for i in spread(1, 99)], "sparse"),
        ("x", drawn("true", "false"), "sparse"),
        ("x", [2**60 + i for i in spread(1, 50)], "sparse"),
        ("item:float", spread(1, 9), "dense"),  # the types of RecBole's files
        ("price:token", spread(1, 9), "sparse"),
    ],
)
def test_numbers_are_quantities_or_codes(
    tmp_path: Path, write_raw: Write, name: str, values: Sequence[object], section: str
) -> None:
    raw = write_raw(table(label=LABEL, c=drawn(*"abc"), **{name: values}), "a.csv")
    _, found = round_trip(raw, tmp_path)
    assert list(features(found, section)) == ([name] if section == "dense" else ["c", name])


def test_keys_of_numbers(tmp_path: Path, write_raw: Write) -> None:
    columns = {
        "gain": [f"{i / 10}" for i in spread(-99, 99)],  # log1p would make 0 of half of them
        "views": [max(i, -1) for i in spread(-2, 500)],
        "cost": [*spread(1, 99, rows=ROWS - 40), *(["unk"] * 40)],
        "shop_id": [f"{i}.0" for i in spread(1, 9)],
    }
    _, found = round_trip(write_raw(table(label=LABEL, **columns), "a.csv"), tmp_path)
    assert features(found, "dense") == {
        "gain": {"transform": "standardise", "missing": "mean"},
        "views": {},
        "cost": {"missing_values": ["unk"]},
    }
    assert features(found, "sparse") == {"shop_id": {"cast": "integer"}}


def test_spellings_of_missing_values(tmp_path: Path, write_raw: Write) -> None:
    columns = {
        "a": drawn("x", "y", "NULL", ""),
        "b": drawn("x", "y", "nan"),
        "c": drawn("x", "y"),
        "n": ["?", 1.5] * 120,
    }
    schema, found = round_trip(write_raw(table(label=LABEL, **columns), "a.csv"), tmp_path)
    assert features(found, "sparse") == {name: {"missing_values": ["NULL", "nan"]} for name in "abc"}
    assert features(found, "dense") == {"n": {}}  # where ? is missing by default
    assert schema.malformed == 0
    hive = write_raw(table(label=LABEL, a=drawn("x", "y", "\\N")), "b.csv")
    assert features(described(hive), "sparse") == {"a": {}}  # the default


def test_columns_that_are_left_out_are_named_with_the_reason(write_raw: Write) -> None:
    columns = {
        "id": range(ROWS),
        "uid": [f"{i:x}" for i in range(10**6, 10**6 + ROWS)],
        "version": ["7"] * ROWS,
        "gap": [""] * ROWS,
        "seen_at": ["2020-07-05"] * 120 + ["2020-07-06"] * 120,
        "x": drawn(*"abc"),
    }
    text = describe(str(write_raw(table(label=LABEL, **columns, **{"": LABEL}), "a.csv"))).text
    assert "#   id       a value of its own in each row, such as 0, 1, 2\n" in text
    assert "#   uid      a value of its own in each row" in text
    assert "#   version  one value in all rows: 7\n" in text
    assert "#   gap      all values are missing\n" in text
    assert "#   seen_at  times, such as 2020-07-05, 2020-07-06\n" in text
    assert "#   ''       it has no name; rename it in the file to use it\n" in text


def test_columns_that_tell_the_label_are_left_out(write_raw: Write) -> None:
    columns = {"nonclk": [1 - label for label in LABEL], "copy": ["yes" if label else "" for label in LABEL]}
    columns["bought"] = [i % 2 if label else "" for i, label in enumerate(LABEL)]  # known after a click alone
    hint = [label if i % 9 else 1 - label for i, label in enumerate(LABEL)]
    raw = write_raw(table(clk=LABEL, x=drawn(*"abc"), hint=hint, **columns), "a.csv")
    assert list(features(described(raw), "sparse")) == ["x", "hint"]
    assert "#   nonclk  it tells the label: each of its values goes with one label only\n" in describe(str(raw)).text


def lists(separator: str, seed: int = 0, values: str = "abcdefg") -> list[str]:
    rng = random.Random(seed)
    return [separator.join(rng.choice(values) for _ in range(rng.randrange(1, 5))) for _ in range(ROWS)]


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        (lists("|"), {"separator": "|"}),
        (lists("^"), {"separator": "^"}),
        (lists(";"), {"separator": ";"}),
        (lists(" ", values="123456789"), {"separator": " "}),
        ([" ".join(f"{v}{len(v)}-0" for v in each.split("|")) for each in lists("|")], {"separator": " "}),
        (lists("\x02"), {"separator": "\x02"}),
        ([f'"{each}"' for each in lists(",")], {"separator": ","}),
        ([f'"[{each}]"' for each in lists(", ", values="123")], {"separator": ","}),
        ([f"[{each}]" for each in lists(" ", values="123")], {"separator": " "}),  # numpy
        (["|".join(f"{v}:{len(v) / 2}" for v in each.split("|")) for each in lists("|")], None),
    ],
)
def test_lists(tmp_path: Path, write_raw: Write, values: list[str], keys: dict[str, Any] | None) -> None:
    schema, found = round_trip(write_raw(table(label=LABEL, x=values), "a.csv"), tmp_path)
    assert features(found, "sparse") == {"x": keys or {"separator": "|", "weight_separator": ":"}}
    assert schema.sparse[0].multi_valued
    assert schema.sparse[0].pooling_factor > 1.5
    assert schema.sparse[0].weighted is (keys is None)


@pytest.mark.parametrize(
    "values",
    [
        drawn("New York", "San Francisco", "Rome"),
        [f"a{i}-b{j}" for i, j in zip(spread(1, 9), spread(1, 9, 2), strict=True)],
        [f"/shop/{i}/item/{j}" for i, j in zip(spread(1, 9), spread(1, 9, 2), strict=True)],
        [f"{i}|x{j}" for i, j in zip(spread(1, 9), spread(1, 9, 2), strict=True)],  # a key of two parts
        drawn("Mozilla/5.0 (X11; Linux; rv:1)", "Opera/9 (Mac; rv:2)", "curl"),
        drawn("12:30", "14:45", "09:00"),
        drawn("R&B", "Pop", "Drum&Bass"),
    ],
)
def test_texts_that_are_no_lists(tmp_path: Path, write_raw: Write, values: list[str]) -> None:
    schema, found = round_trip(write_raw(table(label=LABEL, x=values), "a.csv"), tmp_path)
    assert features(found, "sparse") == {"x": {}}
    assert not schema.sparse[0].multi_valued


def test_weights_of_lists(tmp_path: Path, write_raw: Write) -> None:
    tags = lists("|")
    weights = ["|".join("0.5" for _ in each.split("|")) for each in tags]
    raw = write_raw(table(label=LABEL, tags=tags, tag_weights=weights, vector=weights), "a.csv")
    schema, found = round_trip(raw, tmp_path)
    assert features(found, "sparse") == {"tags": {"separator": "|", "weights": "tag_weights"}}
    assert schema.sparse[0].weighted
    text = describe(str(raw)).text
    assert "#   tag_weights  the weights of tags\n" in text
    assert "#   vector       lists of numbers with a fraction, such as a vector\n" in text


def test_columns_of_equal_keys_are_one_entry(write_raw: Write) -> None:
    columns = {f"C{i}": drawn(*"abcdef", seed=i) for i in range(1, 27)} | {
        f"I{i}": spread(0, 99, i) for i in (8, 9, 10)
    }
    raw = write_raw(table(label=LABEL, **columns), "a.csv")
    found = described(raw)
    assert found["sparse"] == [{"columns": ["C1..C26"], "min_count": 2}]
    assert found["dense"] == [{"columns": ["I8..I10"]}]
    assert "  # C26  6 distinct of 240 rows, such as " in describe(str(raw)).text


def test_types_of_parquet(tmp_path: Path) -> None:
    third = ROWS // 3
    columns = {
        "click": pa.array(LABEL, pa.int8()),
        "user": pa.array([1.0, 2.0, None] * third),
        "flag": pa.array(drawn(True, False)),
        "kind": pa.array(["a", "b", "c"] * third).dictionary_encode(),
        "short": pa.array([b"x", b"y", None] * third),
        "ratio": pa.array([i / 7 for i in spread(0, 99)], pa.float16()),
        "items": pa.array([[1, 2], [], None] * third),
        "seen": pa.array(spread(0, 10**6), pa.timestamp("ms")),
        "vector": pa.array([[0.5, 1.5]] * ROWS),
        "place": pa.array([{"x": 1}] * ROWS),
        "pairs": pa.array([[("a", 1)]] * ROWS, pa.map_(pa.string(), pa.int64())),
        "deep": pa.array([[[1]]] * ROWS),
        "bytes": pa.array([b"\xff", b"\xfe"] * (ROWS // 2)),
        "none": pa.nulls(ROWS),
        "infinite": pa.array([float("inf"), *map(float, spread(0, 99, rows=ROWS - 1))]),
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    schema, found = round_trip(tmp_path / "a.parquet", tmp_path)
    assert found["format"] == "parquet"
    assert features(found, "sparse") == {name: {} for name in ("user", "flag", "kind", "short")} | {
        "items": {"name": "items_2", "multi_valued": True}  # `items` is an attribute of torch modules
    }
    assert schema.dense == ("ratio", "infinite")
    assert schema.malformed == 1
    assert found["split"]["column"] == "seen"
    text = describe(str(tmp_path / "a.parquet")).text
    for name in ("vector", "place", "pairs", "deep", "bytes", "none"):
        assert f"\n#   {name} " in text


def test_json_lines(tmp_path: Path, write_raw: Write) -> None:
    rows = [
        {"user": f"u{i % 9}", "price": i / 7, "tags": ["a", "b"][: i % 3], "vector": [0.5, i / 3], "clk": i % 4 == 0}
        | ({"geo": {"lat": 1}} if i % 2 else {"note": None})
        for i in range(ROWS)
    ]
    raw = write_raw("".join(json.dumps(row) + "\n" for row in rows).encode(), "a.jsonl.gz")
    schema, found = round_trip(raw, tmp_path)
    assert found["format"] == "jsonl"
    assert found["label"] == {"column": "clk"}
    assert features(found, "sparse") == {"user": {}, "tags": {"multi_valued": True}}
    assert schema.dense == ("price",)
    assert schema.malformed == 0
