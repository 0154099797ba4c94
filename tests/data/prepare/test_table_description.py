"""Tests of mlet_dist.data.prepare.table_description, and of data sets prepared with descriptions."""

import csv
import io
import json
import math
import random
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlet_dist.data.hashing import hash_texts
from mlet_dist.data.prepare import chunks, raw_blocks
from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.raw_formats import LabelColumn, SparseColumn, TableSpec, TextFormat
from mlet_dist.data.prepare.splits import SplitRule
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import DatasetSchema, SparseFeature
from mlet_dist.errors import UserError

Write = Callable[..., Path]

MOVIELENS = Path(__file__).parents[3] / "configs/tables/movielens.yaml"
PLAIN = {"format": "csv", "label": {"column": "y"}, "sparse": [{"column": "x"}]}


def make(out: Path, description: dict[str, Any], *raw: Path) -> DatasetSchema:
    path = out.parent / f"{out.name}.yaml"
    path.write_text(yaml.safe_dump(description, sort_keys=False))
    schema = prepare(load_table(path), raw, out)
    assert schema is not None
    assert check(out) == schema
    return schema


def read(out: Path, split: str) -> list[dict[str, Any]]:
    return [row for part in DatasetSchema.load(out).parts[split] for row in pq.read_table(out / part.path).to_pylist()]


def read_all(out: Path) -> list[dict[str, Any]]:
    return [row for split in ("train", "valid", "test") for row in read(out, split)]


def test_movielens_example() -> None:
    assert load_table(MOVIELENS) == TableSpec(
        source="table",
        text=TextFormat(",", '"', True, None),
        label=LabelColumn("rating", 4),
        dense=(),
        sparse=(
            SparseColumn("user", "userId", cast="integer", min_count=2),
            SparseColumn("movie", "movieId", "hash", num_embeddings=20000, cast="integer"),
            SparseColumn("genres", "genres", multi_valued=True, separator="|"),
        ),
        split=SplitRule(
            "time", {"train": Fraction(8, 10), "valid": Fraction(1, 10), "test": Fraction(1, 10)}, column="timestamp"
        ),
    )


def test_movielens_example_row_for_row(tmp_path: Path, write_raw: Write) -> None:
    """Ratings sorted by user are split by time; ids, lists and labels are recomputed with csv and Counter."""
    rng = random.Random(1)
    genres = ["Drama", "Comedy", "Film-Noir", "Sci-Fi", "(no genres listed)"]
    films = ["|".join(rng.sample(genres, rng.choice([0, 1, 1, 2, 3]))) for _ in range(40)]
    lines = ["timestamp,userId,movieId,rating,genres,title"]
    for _ in range(1000):
        film = rng.randrange(40)
        rating = rng.randrange(1, 11) / 2
        lines.append(f'{rng.randrange(10**9)},{rng.randrange(60) ** 2},{film},{rating},{films[film]},"A, ""b"" {film}"')
    lines[1:] = sorted(lines[1:], key=lambda line: int(line.split(",")[1]))
    path = write_raw("\r\n".join(lines).encode("utf-8-sig"), "ratings.csv")
    out = tmp_path / "out"
    prepare(load_table(MOVIELENS), [path], out)
    schema = check(out)

    rows = list(csv.DictReader(io.StringIO("\n".join(lines))))
    times = sorted(int(row["timestamp"]) for row in rows)
    splits: dict[str, list[dict[str, str]]] = {"train": [], "valid": [], "test": []}
    for row in rows:
        time = int(row["timestamp"])
        splits["train" if time < times[800] else "valid" if time < times[900] else "test"].append(row)
    ids: dict[str, dict[str, int]] = {}
    for column, least in (("userId", 2), ("genres", 1)):
        counts = Counter(v for row in splits["train"] for v in row[column].split("|") if v)
        ordered = sorted((-count, value) for value, count in counts.items() if count >= least)
        ids[column] = {value: i for i, (_, value) in enumerate(ordered, start=1)}
    for split, expected in splits.items():
        assert read(out, split) == [
            {
                "label": int(float(row["rating"]) >= 4),
                "user": ids["userId"].get(row["userId"], 0),
                "movie": int(hash_texts(pa.array([row["movieId"]]), "movie")[0]) % 20000,
                "genres": [ids["genres"].get(v, 0) for v in row["genres"].split("|") if v],
            }
            for row in expected
        ]
    values = sum(len(row["genres"].split("|")) for row in splits["train"] if row["genres"])
    assert schema.sparse == (
        SparseFeature("user", 1 + len(ids["userId"])),
        SparseFeature("movie", 20000),
        SparseFeature("genres", 1 + len(ids["genres"]), multi_valued=True, pooling_factor=values / 800),
    )
    assert schema.dense == ()


def test_quoted_separators_and_quotes(tmp_path: Path, write_raw: Write) -> None:
    fields = ["a,b", 'say ""x""', "", "plain", '""', ",", 'é","']
    text = "x,y\n" + "".join(f'"{field}",{i % 2}\n' for i, field in enumerate(10 * fields) if field != 'é","')
    make(tmp_path / "out", PLAIN, write_raw(text.encode(), "a.csv"))
    rows = list(csv.reader(io.StringIO(text)))[1:]
    vocabulary = pq.read_table(tmp_path / "out/vocabulary/x.parquet")["value"].to_pylist()
    assert [vocabulary[row["x"] - 1] for row in read_all(tmp_path / "out")] == [row[0] for row in rows]
    assert [row["label"] for row in read_all(tmp_path / "out")] == [int(row[1]) for row in rows]


BAD_QUOTES = {
    '"open,1': "a quote that is not closed on its line; a line end within quotes is not supported",
    'a"b,1': "a quote that is not closed on its line; a line end within quotes is not supported",
    'a"b"c,1': "a quote that does not enclose a whole field",
    '"a"b,1': "a quote that does not enclose a whole field",
    '"a,1"': "1 fields instead of 2",
    "a,1,2": "3 fields instead of 2",
}


@pytest.mark.parametrize("bad", BAD_QUOTES)
def test_misplaced_quotes_affect_their_own_line_only(tmp_path: Path, write_raw: Write, bad: str) -> None:
    lines = ["x,y", *20 * ["a,1", '"b,c",0'], bad, *20 * ['"b,c",0', "a,1"]]
    schema = make(tmp_path / "out", PLAIN, write_raw("\n".join(lines).encode(), "a.csv"))
    assert schema.malformed == 1
    assert f'"line": 42, "reason": "{BAD_QUOTES[bad]}"' in (tmp_path / "out/quarantine.jsonl").read_text()
    assert [row["label"] for row in read_all(tmp_path / "out")] == 20 * [1, 0] + 20 * [0, 1]


def test_the_order_of_columns_may_differ_between_files(tmp_path: Path, write_raw: Write) -> None:
    files = [write_raw(b"x,y\n" + 10 * b"a,1\n", "a.csv"), write_raw(b"z,y,z,x\n" + 10 * b"0,0,1,b\n", "b.csv.gz")]
    make(tmp_path / "out", PLAIN | {"split": {"by": "random"}}, *files)
    rows = read_all(tmp_path / "out")
    assert {(row["label"], row["x"]) for row in rows} == {(1, 1), (0, 2)} or {
        (row["label"], row["x"]) for row in rows
    } == {(1, 2), (0, 1)}


def test_no_header(tmp_path: Path, write_raw: Write) -> None:
    lines = 10 * ["0\ta\t", "1\tb\t"]
    description = PLAIN | {"delimiter": "\t", "header": False, "columns": ["y", "x", "rest"]}
    make(tmp_path / "out", description, write_raw("\n".join(lines).encode(), "a.tsv"))
    assert [row["label"] for row in read_all(tmp_path / "out")] == 10 * [0, 1]


DENSE_TEXTS = ["0", "-3", "2.5", "", "1e3", ".5", "7.", "-0.25E-2", "3.4e38", "00012"]


def number(text: str, missing: float = 0.0) -> float:
    return float(text) if text else missing


def test_dense_columns(tmp_path: Path, write_raw: Write) -> None:
    texts = DENSE_TEXTS * 10
    path = write_raw(("y,x,a\n" + "".join(f"{i % 2},v,{t}\n" for i, t in enumerate(texts))).encode(), "a.csv")
    dense = [
        {"column": "a", "name": "log"},
        {"column": "a", "name": "raw", "transform": "raw", "missing": -1},
        {"column": "a", "name": "standard", "transform": "standardise", "missing": "mean"},
        {"column": "a", "name": "filled", "transform": "standardise", "missing": 5},
    ]
    schema = make(tmp_path / "out", PLAIN | {"dense": dense}, path)
    assert schema.dense == ("log", "raw", "standard", "filled")
    train = texts[:80]
    known = np.array([float(t) for t in train if t])
    filled = np.array([number(t, 5) for t in train])
    for row, text in zip(read_all(tmp_path / "out"), texts, strict=True):
        assert row["log"] == pytest.approx(math.log1p(max(number(text), 0)), rel=1e-6)
        assert row["raw"] == pytest.approx(number(text, -1), rel=1e-6)
        assert row["standard"] == pytest.approx((number(text, known.mean()) - known.mean()) / known.std(), rel=1e-5)
        assert row["filled"] == pytest.approx((number(text, 5) - filled.mean()) / filled.std(), rel=1e-5)


BAD_NUMBERS = {
    "inf": "a is 'inf' instead of a number from -3.403e+38 to 3.403e+38",
    "-Infinity": "a is '-Infinity' instead of a number from",
    "1e39": "a is '1e39' instead of a number from -3.403e+38 to 3.403e+38",
    "1e999": "a is '1e999' instead of a number from",
    "1,5": "4 fields instead of 3",
    "0x1f": "a is '0x1f' instead of a number from",
    "1 7": "a is '1 7' instead of a number from",
    "1_000": "a is '1_000' instead of a number from",
    "٣": "a is '٣' instead of a number from",
}


@pytest.mark.parametrize("bad", BAD_NUMBERS)
def test_wrong_numbers_are_quarantined(tmp_path: Path, write_raw: Write, bad: str) -> None:
    lines = ["y,x,a", *10 * ["0,v,1", "1,v,1"], f"1,v,{bad}", *20 * ["0,v,2"]]
    description = PLAIN | {"dense": [{"column": "a", "transform": "raw"}]}
    schema = make(tmp_path / "out", description, write_raw("\n".join(lines).encode(), "a.csv"))
    assert schema.malformed == 1
    found = json.loads((tmp_path / "out/quarantine.jsonl").read_text(encoding="utf-8"))
    assert found["line"] == 22
    assert found["reason"].startswith(BAD_NUMBERS[bad])
    assert [row["a"] for row in read_all(tmp_path / "out")] == 20 * [1.0] + 20 * [2.0]


def test_number_that_is_too_far_from_the_mean(tmp_path: Path, write_raw: Write) -> None:
    lines = ["y,x,a", *20 * ["0,v,1", "0,v,1.0001"], "1,v,3e38", *5 * ["0,v,1"]]
    description = PLAIN | {"dense": [{"column": "a", "transform": "standardise"}]}
    with pytest.raises(UserError, match=r"dense feature a: 3e\+38 is too many deviations \(.*\) from the training"):
        make(tmp_path / "out", description, write_raw("\n".join(lines).encode(), "a.csv"))


def test_one_number_again_and_again_has_no_deviation(tmp_path: Path, write_raw: Write) -> None:
    """The computed mean of 24 times 0.1 is not 0.1; the tiny deviation must not become a divisor."""
    raw = write_raw(("y,x,a\n" + "".join(f"{i % 2},v,{0.1 if i < 27 else 0.2}\n" for i in range(30))).encode(), "t.csv")
    make(tmp_path / "out", {**PLAIN, "dense": [{"column": "a", "transform": "standardise"}]}, raw)
    assert [row["a"] for row in read_all(tmp_path / "out")] == [*27 * [0.0], *3 * [pytest.approx(0.1)]]


def test_missing_may_be_refused(tmp_path: Path, write_raw: Write) -> None:
    lines = ["y,x,a", *10 * ["0,v,1", "1,v,1"], "1,v,", *20 * ["0,v,2"]]
    description = PLAIN | {"dense": [{"column": "a", "missing": "refuse", "integer": True}]}
    schema = make(tmp_path / "out", description, write_raw("\n".join(lines).encode(), "a.csv"))
    assert schema.malformed == 1
    assert "a is '' instead of an integer" in (tmp_path / "out/quarantine.jsonl").read_text()


def test_weighted_lists_of_text(tmp_path: Path, write_raw: Write) -> None:
    good = ["a b,1 0.5", "b,2", ",", "c a b,-1 0 1e-3"]
    bad = {
        "a b,1": "w has 1 weights for 2 values of x",
        "a,nan": "w is 'nan' instead of a list of numbers",
        "a,": "w has 0 we",
    }
    lines = ["y,x,w", *(f"{index % 2},{pair}" for index, pair in enumerate(10 * good)), *(f"0,{pair}" for pair in bad)]
    description = PLAIN | {"sparse": [{"column": "x", "separator": " ", "weights": "w"}]}
    schema = make(tmp_path / "out", description, write_raw("\n".join(lines).encode(), "a.csv"))
    assert schema.malformed == 3
    for line, reason in zip((tmp_path / "out/quarantine.jsonl").read_text().splitlines(), bad.values(), strict=True):
        assert reason in line
    assert schema.sparse == (SparseFeature("x", 4, True, True, 1.5),)
    vocabulary = pq.read_table(tmp_path / "out/vocabulary/x.parquet")["value"].to_pylist()
    assert vocabulary == ["b", "a", "c"]
    for row, pair in zip(read_all(tmp_path / "out"), 10 * good, strict=True):
        values, weights = (each.split() for each in pair.split(","))
        assert [vocabulary[id - 1] for id in row["x"]] == values
        assert row["x.weight"] == pytest.approx([float(w) for w in weights])


def parquet(path: Path, columns: dict[str, pa.Array]) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=7)
    return path


def test_parquet(tmp_path: Path, write_raw: Write) -> None:
    """A Parquet file has integers, texts, dictionaries, lists, weights, booleans, times and nulls."""
    rows = 40
    columns = {
        "y": pa.array([bool(i % 3) for i in range(rows)]),
        "number": pa.array([None if i % 5 == 0 else i for i in range(rows)], pa.int64()),
        "text": pa.array([None if i % 4 == 0 else f"v{i % 4}" for i in range(rows)]).dictionary_encode(),
        "list": pa.array([None if i % 6 == 0 else list(range(i % 4)) for i in range(rows)], pa.list_(pa.int16())),
        "weight": pa.array([[] if i % 6 == 0 else [i / 2] * (i % 4) for i in range(rows)], pa.list_(pa.float64())),
        "price": pa.array([None if i % 7 == 0 else i / 4 for i in range(rows)], pa.float64()),
        "when": pa.array([datetime(2024, 1, 1 + (i * 7) % 20) for i in range(rows)], pa.timestamp("ms")),
    }
    path = parquet(write_raw(b"", "a.parquet"), columns)
    description = {
        "format": "parquet",
        "label": {"column": "y"},
        "dense": [{"column": "price", "transform": "raw", "missing": -1}],
        "sparse": [
            {"column": "number"},
            {"column": "text"},
            {"column": "list", "multi_valued": True, "weights": "weight"},
        ],
        "split": {"by": "time", "column": "when", "shares": {"train": 0.5, "valid": 0.25, "test": 0.25}},
    }
    out = tmp_path / "out"
    schema = make(out, description, path)
    names = {n: pq.read_table(out / f"vocabulary/{n}.parquet")["value"].to_pylist() for n in ("number", "text", "list")}
    expected = sorted(pa.table(columns).to_pylist(), key=lambda row: row["when"])
    cuts = [expected[20]["when"], expected[30]["when"]]
    for split, inside in (
        ("train", lambda when: when < cuts[0]),
        ("valid", lambda when: cuts[0] <= when < cuts[1]),
        ("test", lambda when: when >= cuts[1]),
    ):
        wanted = [row for row in pa.table(columns).to_pylist() if inside(row["when"])]
        found = read(out, split)
        assert len(found) == len(wanted) == schema.rows[split]
        for row, source in zip(found, wanted, strict=True):
            assert row["label"] == source["y"]
            assert row["price"] == (-1 if source["price"] is None else source["price"])
            for name in ("number", "text"):
                value = "" if source[name] is None else str(source[name])
                assert row[name] == (names[name].index(value) + 1 if value in names[name] else 0)
            values = [str(value) for value in source["list"] or []]
            assert row["list"] == [names["list"].index(v) + 1 if v in names["list"] else 0 for v in values]
            assert row["list.weight"] == pytest.approx(source["weight"])


def test_wrong_rows_of_a_parquet_file(tmp_path: Path, write_raw: Write) -> None:
    columns = {
        "y": pa.array(["0", "1"] * 20 + ["x", "1", "1", None]),
        "x": pa.array(["a"] * 44),
        "a": pa.array([1.0] * 40 + [1.0, math.nan, math.inf, 1.0]),
    }
    path = parquet(write_raw(b"", "a.parquet"), columns)
    schema = make(tmp_path / "out", {**PLAIN, "format": "parquet", "dense": [{"column": "a"}]}, path)
    assert schema.malformed == 3
    lines = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert [(line["line"], line["reason"].split(" instead")[0]) for line in lines] == [
        (41, "y is 'x'"),
        (43, "a is inf"),
        (44, "y is None"),
    ]


def test_column_of_an_unsupported_type(tmp_path: Path, write_raw: Write) -> None:
    path = parquet(write_raw(b"", "a.parquet"), {"y": pa.array([0, 1] * 20), "x": pa.array([{"k": 1}] * 40)})
    reason = (
        r"40 of 40 lines are malformed, .* x is {'k': 1}, of type struct<k: int64>, instead of a text, a whole number"
    )
    with pytest.raises(UserError, match=reason):
        make(tmp_path / "out", PLAIN | {"format": "parquet"}, path)


def test_times_as_iso_texts_and_starts(tmp_path: Path, write_raw: Write) -> None:
    times = [f"2024-03-{1 + (i * 13) % 30:02}" for i in range(60)]
    path = write_raw(("y,x,t\n" + "".join(f"{int(t[-1]) % 2},{t},{t}\n" for t in times)).encode(), "a.csv")
    first = [int(datetime.fromisoformat(f"2024-03-{day}T00:00:00+00:00").timestamp() * 10**6) for day in (21, 28)]
    split = {"by": "time", "column": "t", "starts": {"test": first[0], "valid": first[1]}}
    schema = make(tmp_path / "out", PLAIN | {"split": split}, path)
    days = [int(t[-2:]) for t in times]
    assert schema.rows == {
        "train": sum(d < 21 for d in days),
        "test": sum(21 <= d < 28 for d in days),
        "valid": sum(d >= 28 for d in days),
    }


def test_times_with_a_zone_are_times(tmp_path: Path, write_raw: Write) -> None:
    """01:00 in Berlin is before 00:30 in London; a time without a zone is in UTC."""
    times = ["2024-01-01T01:00:00+01:00", "2024-01-01T00:20:00", "2024-01-01T00:30:00Z"]
    starts = [int(datetime.fromisoformat(f"2024-01-01T00:{m}:00+00:00").timestamp() * 10**6) for m in (20, 30)]
    raw = write_raw(("y,x,t\n" + "".join(f"{i % 2},{i % 3},{times[i % 3]}\n" for i in range(30))).encode(), "t.csv")
    split = {"by": "time", "column": "t", "starts": dict(zip(("valid", "test"), starts, strict=True))}
    assert make(tmp_path / "out", {**PLAIN, "split": split}, raw).rows == {"train": 10, "valid": 10, "test": 10}
    assert [row["x"] for row in read_all(tmp_path / "out")] == [*10 * [1], *20 * [0]]


def test_parquet_files_with_times_of_different_units(tmp_path: Path, write_raw: Write) -> None:
    """Different versions of pandas write different units; the second file has the earlier times."""
    files = []
    for year, unit in ((2020, "ms"), (2019, "ns")):
        path = write_raw(b"", f"{unit}.parquet")
        times = pa.array([datetime(year, 1, 1 + i) for i in range(20)], pa.timestamp(unit))
        files.append(parquet(path, {"y": pa.array([0, 1] * 10), "x": pa.array([unit] * 20), "t": times}))
    make(tmp_path / "out", {**PLAIN, "format": "parquet", "split": {"by": "time", "column": "t"}}, *files)
    values = ["", *pq.read_table(tmp_path / "out/vocabulary/x.parquet")["value"].to_pylist()]
    assert [values[row["x"]] for row in read(tmp_path / "out", "train")] == [*12 * ["ms"], *20 * ["ns"]]


def test_numbers_and_dates_in_one_time_column(
    tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kinds are in one block, two blocks or two files; the time of a malformed row does not count."""
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 200)
    numbers, dates = (write_raw(_with_times(*each), name) for each, name in (((30, 0), "n.csv"), ((0, 30), "d.csv")))
    both, one_block = write_raw(_with_times(30, 30), "b.csv"), write_raw(_with_times(2, 1), "o.csv")
    description = PLAIN | {"split": {"by": "time", "column": "t"}}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(description))
    spec = load_table(tmp_path / "t.yaml")
    message = "{}: t must hold times of one kind in all files, but holds {} ({}: line {}) and {} ({}: line {})"
    kinds = "whole numbers", "dates or times"
    for path, line in ((both, 33), (one_block, 5)):
        with pytest.raises(UserError) as caught:
            prepare(spec, [path], tmp_path / "out")
        assert str(caught.value) == message.format(path, kinds[0], path, 3, kinds[1], path, line)
    for raw, (one, other) in (((numbers, dates), kinds), ((dates, numbers), kinds[::-1])):
        prepare(spec, raw, tmp_path / "out", only="read")
        with pytest.raises(UserError) as caught:
            prepare(spec, raw, tmp_path / "out", only="count")
        assert message.format(raw[0], one, raw[0], 3, other, raw[1], 3) in str(caught.value)
    more = write_raw(dates.read_bytes(), "e.csv")
    assert make(tmp_path / "good", description, dates, more).malformed == 2


def _with_times(numbers: int, dates: int) -> bytes:
    """Return lines with these times after a header and a malformed line with a time of the other kind."""
    times = [*(str(i) for i in range(numbers)), *(f"2024-01-{i + 1:02}" for i in range(dates))]
    return "\n".join(
        ["y,x,t", f"bad,v,{'7' if not numbers else '2024-01-01'}", *(f"{i % 2},v,{t}" for i, t in enumerate(times))]
    ).encode()


def test_missing_time_of_a_parquet_file_is_quarantined(tmp_path: Path, write_raw: Write) -> None:
    times = pa.array([None, *(f"2024-01-{i + 1:02}" for i in range(19))])
    path = parquet(write_raw(b"", "t.parquet"), {"y": pa.array([0, 1] * 10), "x": pa.array(["v"] * 20), "t": times})
    description = {**PLAIN, "format": "parquet", "split": {"by": "time", "column": "t"}}
    assert make(tmp_path / "out", description, path).malformed == 1


def test_unused_columns_of_equal_names(tmp_path: Path, write_raw: Write) -> None:
    raw = write_raw(("y,a,a,a 1\n" + "".join(f"{i % 2},p,q,v{i}\n" for i in range(30))).encode(), "t.csv")
    make(tmp_path / "out", {**PLAIN, "sparse": [{"column": "a 1"}]}, raw)
    values = pq.read_table(tmp_path / "out/vocabulary/a 1.parquet")["value"].to_pylist()
    assert sorted(values) == sorted(f"v{i}" for i in range(24))


def test_the_longest_name(tmp_path: Path, write_raw: Write) -> None:
    path = write_raw(("y,x\n" + "".join(f"{i % 2},v{i % 9}\n" for i in range(60))).encode(), "a.csv")
    schema = make(tmp_path / "out", PLAIN | {"sparse": [{"column": "x", "name": 100 * "é"}]}, path)
    assert schema.num_embeddings == {100 * "é": 10}


def test_hashed_features_need_no_vocabulary(tmp_path: Path, write_raw: Write) -> None:
    path = write_raw(("y,x\n" + "".join(f"{i % 2},v{i % 9}\n" for i in range(60))).encode(), "a.csv")
    hashed = PLAIN | {"sparse": [{"column": "x", "encoding": "hash", "num_embeddings": 5}]}
    schema = make(tmp_path / "a", hashed, path)
    assert schema.num_embeddings == {"x": 5}
    expected = hash_texts(pa.array([f"v{i % 9}" for i in range(60)]), "x") % 5
    assert [row["x"] for row in read_all(tmp_path / "a")] == expected.tolist()
    assert list((tmp_path / "a/vocabulary").iterdir()) == []
    other = make(tmp_path / "b", PLAIN | {"sparse": [{"column": "x", "encoding": "hash", "num_embeddings": 6}]}, path)
    assert other.vocabulary_id != schema.vocabulary_id


NAMES = "printable text of 1 to 200 bytes without dots and slashes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "json"}, "format is 'json'; it must be csv or jsonl or parquet"),
        ({"label": None}, "label is None; it must be a section of `key: value` lines"),
        ({"label": {}}, "key 'label.column' is missing"),
        ({"labels": 1}, "labels is not a valid key here"),
        (
            {"delimiter": ""},
            "delimiter is ''; it must be 1 to 8 characters without line ends (\"\\t\" in double quotes",
        ),
        ({"delimiter": "\r\n"}, "delimiter is '\\r\\n'; it must be 1 to 8 characters without line ends"),
        ({"delimiter": '"'}, "quote is '\"'; it must be another character than the delimiter"),
        ({"delimiter": '|"|'}, "quote is '\"'; it must be another character than the delimiter"),
        ({"format": "jsonl", "delimiter": ","}, "delimiter is not a valid key here"),
        ({"format": "parquet", "encoding": "latin-1"}, "encoding is not a valid key here"),
        ({"header": False}, "key 'columns' is missing"),
        ({"header": False, "columns": ["y", "x", "x"]}, "columns must name 'x' once, since the description uses it"),
        ({"sparse": []}, "sparse is []; it must be a list of one entry or more"),
        ({"sparse": [{"column": "items"}]}, f"sparse[0].name is 'items'; it must be {NAMES} that"),
        ({"sparse": [{"column": "a.b"}]}, f"sparse[0].name is 'a.b'; it must be {NAMES} that"),
        ({"sparse": [{"column": 300 * "x"}]}, f"sparse[0].name is '{79 * 'x'}; it must be {NAMES} that"),
        ({"dense": [{"column": "d", "name": 101 * "é"}]}, f"dense[0].name is '{79 * 'é'}; it must be {NAMES}; choose"),
        ({"dense": [{"column": "a\tb"}]}, f"dense[0].name is 'a\\tb'; it must be {NAMES}; choose another"),
        (
            {"sparse": [{"column": "x"}, {"column": "x"}]},
            "two features are named 'x' (label and sample_weight are taken); change one `name`",
        ),
        ({"sparse": [{"column": "y", "name": "label"}]}, "two features are named 'label'"),
        ({"sparse": [{"column": "x", "encoding": "hash"}]}, "key 'sparse[0].num_embeddings' is missing"),
        ({"sparse": [{"column": "x", "num_embeddings": 5}]}, "sparse[0].num_embeddings is not a valid key here"),
        ({"sparse": [{"column": "x", "weights": "w"}]}, "sparse[0].weights is not a valid key here"),
        ({"sparse": [{"column": "x", "min_count": 0}]}, "sparse[0].min_count is 0; it must be at least 1 and at most"),
        ({"dense": [{"column": "x", "transform": "log"}]}, "dense[0].transform is 'log'; it must be log1p or standard"),
        ({"dense": [{"column": "x", "missing": "mean"}]}, "dense[0].missing is 'mean'; it must be a number or refuse"),
        (
            {"dense": [{"column": "x", "missing": math.nan}]},
            "dense[0].missing is nan; it must be a number in the range of float32",
        ),
        (
            {"dense": [{"column": "x", "missing": 1e39}]},
            "dense[0].missing is 1e+39; it must be a number in the range of float32",
        ),
        ({"split": {"by": "day"}}, "split.by is 'day'; it must be rows or time or random or file"),
        ({"split": {"by": "time"}}, "key 'split.column' is missing"),
        ({"split": {"by": "rows", "seed": 3}}, "split.seed is not a valid key here"),
        (
            {"split": {"by": "rows", "shares": {"train": 0.5, "test": 0.4}}},
            "it must be shares of the splits, such as",
        ),
        (
            {"split": {"by": "rows", "shares": {"valid": 0.5, "test": 0.5}}},
            "split.shares is ['test', 'valid']; it must be shares of train and of valid, test or both",
        ),
        (
            {"split": {"by": "file", "shares": {"train": 0.5, "test": 0.5}}},
            "it must be shares of valid, test or both; all files but the last",
        ),
        (
            {"split": {"by": "file", "files": {}}},
            "split.files is {}; it must be names or patterns of raw files by split",
        ),
        ({"split": {"by": "file", "files": {"dev": "a"}}}, "split.files is {'dev': 'a'}; it must be names or patterns"),
        ({"split": {"by": "file", "files": {"test": []}}}, "split.files is {'test': []}; it must be names or patterns"),
        ({"split": {"by": "rows", "files": {"test": "a"}}}, "split.files is not a valid key here"),
        (
            {"split": {"by": "file", "files": {"test": "a"}, "shares": {"test": 1}}},
            "split.shares is not a valid key here",
        ),
        ({"split": {"by": "time", "column": "t", "starts": {"train": 1}}}, "it must be the first times of valid, test"),
        (
            {"split": {"by": "time", "column": "t", "starts": {"valid": 1, "test": 1}}},
            "it must be different times, as the column writes them",
        ),
        ({"max_malformed": 2}, "max_malformed is 2; it must be a share from 0 to 1"),
    ],
)
def test_wrong_description(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "table.yaml"
    path.write_text(yaml.safe_dump(PLAIN | change))
    with pytest.raises(UserError) as caught:
        load_table(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("content", [b"a: [", b"a: 1\na: 2", b"\xff", b"- 1", b""])
def test_description_that_is_not_yaml(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "table.yaml"
    path.write_bytes(content)
    with pytest.raises(
        UserError, match=f"{path}: (not valid YAML|the file is|the description of the table is not UTF-8)"
    ):
        load_table(path)
    with pytest.raises(UserError, match="nowhere: cannot read the description of the table"):
        load_table(tmp_path / "nowhere")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25)
@given(
    rows=st.lists(
        st.tuples(
            st.sampled_from(["0", "1"]),
            st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=5),
            st.lists(st.text(st.sampled_from('ab"é,'), min_size=1, max_size=3), max_size=3),
        ),
        min_size=10,
        max_size=30,
    ),
    bad=st.integers(0, 10),
    block=st.integers(300, 3000),
)
def test_any_table_round_trips(
    rows: list[tuple[str, str, list[str]]], bad: int, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids stand for the values that the csv module wrote, with malformed lines between and blocks of any size."""
    rows = [("0", *rows[0][1:]), ("1", *rows[1][1:]), *rows[2:]]  # both classes in the training split
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir()
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["y", "x", "l"])
    for index, (label, value, values) in enumerate(rows):
        writer.writerow([label, value, "|".join(values)])
        if index == 4:
            text.write(bad * ("malformed" + 90 * " " + "\n"))  # complete blocks of them
    (folder / "a.csv").write_text(text.getvalue(), encoding="utf-8", newline="")
    sparse = [{"column": "x"}, {"column": "l", "separator": "|"}]
    with monkeypatch.context() as patch:
        patch.setattr(raw_blocks, "BLOCK_BYTES", block)
        patch.setattr(chunks, "GROUP_ROWS", 7)
        schema = make(folder / "out", PLAIN | {"sparse": sparse}, folder / "a.csv")
    assert schema.malformed == bad
    names = {n: pq.read_table(folder / f"out/vocabulary/{n}.parquet")["value"].to_pylist() for n in ("x", "l")}
    found = read_all(folder / "out")
    train = rows[: len(rows) * 8 // 10]
    known = {"x": {value for _, value, _ in train}, "l": {each for _, _, values in train for each in values}}
    assert {name: set(values) for name, values in names.items()} == known
    for row, (label, value, values) in zip(found, rows, strict=True):
        assert row["label"] == int(label)
        assert [names["x"][row["x"] - 1] if row["x"] else None] == [value if value in known["x"] else None]
        decoded = [names["l"][id - 1] if id else None for id in row["l"]]
        assert decoded == [each if each in known["l"] else None for each in values]
