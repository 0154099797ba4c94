"""Data sets that are prepared like another one: ids and numbers mean the same, and new values come behind the old."""

import csv
import json
import math
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from mlet_dist import cli
from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.pipeline import PASSES, prepare
from mlet_dist.data.prepare.raw_formats import criteo
from mlet_dist.data.prepare.recorded_description import from_record, to_record
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from tests.helpers.raw_logs import make_raw_lines, raw_bytes

MIN_COUNT = 3
DESCRIPTION = f"""
format: csv
label: {{column: clk}}
dense:
  - {{column: price, transform: standardise, missing: mean}}
  - {{column: age}}
sparse:
  - {{column: user, min_count: {MIN_COUNT}}}
  - {{column: item, min_count: {MIN_COUNT}}}
  - {{column: seen, table: item, separator: "|", min_count: {MIN_COUNT}}}
  - {{column: place, encoding: hash, num_embeddings: 50}}
  - {{column: few, max_num_embeddings: 6, min_count: {MIN_COUNT}}}
"""
COLUMNS = ["clk", "price", "age", "user", "item", "seen", "place", "few"]
VOCABULARIES = {"user": ["user"], "item": ["item", "seen"], "few": ["few"]}


def rows_of(day: int, rows: int = 300) -> list[dict[str, str]]:
    rng = random.Random(day)
    found = []
    for _ in range(rows):
        item = "" if rng.random() < 0.1 else f"i{int(rng.expovariate(0.1)) + 5 * day}"
        seen = [f"i{rng.randrange(40) + 5 * day}" for _ in range(rng.randrange(4))]
        found.append(
            {
                "clk": str(rng.randrange(2)),
                "price": "" if rng.random() < 0.2 else str(rng.randrange(1000 * day) / 8),
                "age": str(rng.randrange(90)),
                "user": f"u{int(rng.expovariate(0.05)) + 20 * day}",
                "item": item,
                "seen": "|".join(seen),
                "place": f"p{rng.randrange(99)}",
                "few": f"f{rng.randrange(4) * day}",
            }
        )
    return found


def write_day(path: Path, day: int, rows: list[dict[str, str]] | None = None) -> Path:
    file = path / f"day{day}.csv"
    with file.open("w", newline="") as target:
        writer = csv.DictWriter(target, COLUMNS)
        writer.writeheader()
        writer.writerows(rows_of(day) if rows is None else rows)
    return file


def read(data: Path, split: str) -> dict[str, list[Any]]:
    schema = DatasetSchema.load(data)
    parts = [pq.read_table(data / part.path).to_pydict() for part in schema.parts[split]]
    return {name: [each for part in parts for each in part[name]] for name in parts[0]}


def vocabulary(data: Path, table: str) -> list[str]:
    found: list[str] = pq.read_table(data / "vocabulary" / f"{table}.parquet")["value"].to_pylist()
    return found


def made(tmp_path: Path) -> Path:
    """Return the data set of day 1."""
    description = tmp_path / "table.yaml"
    description.write_text(DESCRIPTION)
    prepare(load_table(description), [write_day(tmp_path, 1)], tmp_path / "d1")
    return tmp_path / "d1"


def grown(tmp_path: Path, day: int, before: Path, *, grows: bool = True) -> Path:
    like = LikeDataset.open(str(before), grows=grows)
    out = tmp_path / f"d{day}{'' if grows else ' alike'}"
    prepare(like.description, {"train": [write_day(tmp_path, day)]}, out, like=like)
    check(out)
    return out


def values(rows: list[dict[str, str]], feature: str) -> list[list[str]]:
    """Return the values of each row."""
    if feature == "seen":
        return [row["seen"].split("|") if row["seen"] else [] for row in rows]
    return [[row[feature]] for row in rows]


def test_no_id_changes_its_meaning_over_four_days(tmp_path: Path) -> None:
    """Each vocabulary is what a plain dictionary would be, and every row's ids lead back to its values."""
    data, known = made(tmp_path), {}
    for table in VOCABULARIES:
        known[table] = vocabulary(data, table)
    fingerprints = [DatasetSchema.load(data).vocabulary_id]
    grown_tables = 0
    for day in (2, 3, 4):
        rows = rows_of(day)
        data = grown(tmp_path, day, data)
        for table, features in VOCABULARIES.items():
            before = known[table]
            counted = Counter(value for name in features for of_row in values(rows, name) for value in of_row)
            new = [value for value, n in counted.items() if n >= MIN_COUNT and value not in before]
            new.sort(key=lambda value: (-counted[value], value.encode()))
            if table == "few":
                new = new[: max(0, 6 - 1 - len(before))]
            found = known[table] = vocabulary(data, table)
            assert found == before + new
            grown_tables += bool(new)
            counts = pq.read_table(data / "vocabulary" / f"{table}.parquet")["count"].to_pylist()
            assert counts == [counted[value] for value in found]
            ids = read(data, "train")
            for name in features:
                for of_row, id_of in zip(values(rows, name), ids[name], strict=True):
                    stored = id_of if name == "seen" else [id_of]
                    assert [found[i - 1] if i else None for i in stored] == [
                        value if value in found else None for value in of_row
                    ]
        schema = DatasetSchema.load(data)
        assert schema.extends == tuple(fingerprints)
        fingerprints.append(schema.vocabulary_id)
    assert grown_tables >= 6
    assert len(set(fingerprints)) == 4


def test_what_does_not_grow_has_the_rules_of_before(tmp_path: Path) -> None:
    first = made(tmp_path)
    second = grown(tmp_path, 2, first, grows=False)
    before, now = DatasetSchema.load(first), DatasetSchema.load(second)
    assert now.preprocessing == before.preprocessing
    assert (now.vocabulary_id, now.num_embeddings, now.extends) == (before.vocabulary_id, before.num_embeddings, ())
    raw = [row["price"] for row in rows_of(1)][:240]
    numbers = np.array([float(each) for each in raw if each])
    mean, deviation = numbers.mean(), numbers.std()
    rules = now.preprocessing.dense["price"]
    assert (rules["mean"], rules["deviation"]) == pytest.approx((mean, deviation), rel=1e-12)
    table = read(second, "train")
    for row, price, age in zip(rows_of(2), table["price"], table["age"], strict=True):
        of_price = (float(row["price"]) - rules["mean"]) / rules["deviation"] if row["price"] else 0.0
        assert price == np.float32(of_price)
        assert age == pytest.approx(math.log1p(float(row["age"])), rel=1e-6)
    hashes = {row["place"]: each for row, each in zip(rows_of(1), read(first, "train")["place"], strict=False)}
    for row, each in zip(rows_of(2), table["place"], strict=True):
        assert hashes.get(row["place"], each) == each
    third = grown(tmp_path, 3, second, grows=False)
    assert DatasetSchema.load(third).vocabulary_id == before.vocabulary_id


def test_a_data_set_of_the_same_values_extends_nothing_and_a_later_one_keeps_the_history(tmp_path: Path) -> None:
    first = made(tmp_path)
    second = grown(tmp_path, 2, first)
    again = grown(tmp_path, 2, second, grows=False)
    like = LikeDataset.open(str(second), grows=True)
    prepare(like.description, {"train": [tmp_path / "day2.csv"]}, tmp_path / "same", like=like)
    schemas = [DatasetSchema.load(each) for each in (second, again, tmp_path / "same")]
    assert len({each.vocabulary_id for each in schemas}) == 1
    assert [each.extends for each in schemas] == [(DatasetSchema.load(first).vocabulary_id,)] * 3
    assert schemas[0].preprocessing == schemas[1].preprocessing == schemas[2].preprocessing


@pytest.mark.parametrize("split", ["valid", "test"])
def test_all_rows_may_be_in_one_split(tmp_path: Path, split: str) -> None:
    like = LikeDataset.open(str(made(tmp_path)))
    raw = write_day(tmp_path, 2)
    schema = prepare(like.description, {split: [raw]}, tmp_path / "one", like=like)
    assert schema == check(tmp_path / "one") == DatasetSchema.load(tmp_path / "one")
    assert schema is not None
    assert schema.rows == {split: 300}
    assert {each.name: each.pooling_factor for each in schema.sparse}["seen"] == like.pooling_factor("seen")
    prepare(like.description, {"train": [raw]}, tmp_path / "train", like=like)
    assert read(tmp_path / "one", split) == read(tmp_path / "train", "train")
    with pytest.raises(UserError, match="--grow takes new values from the training split, but all rows are " + split):
        prepare(like.description, {split: [raw]}, tmp_path / "x", like=LikeDataset.open(like.path, grows=True))


def test_passes_and_a_url_give_the_same_bytes(tmp_path: Path) -> None:
    first = made(tmp_path)
    second = grown(tmp_path, 2, first)
    url = f"memory://like/{tmp_path.name}/d1"
    fsspec.filesystem("memory").put(str(first), url.removeprefix("memory:/"), recursive=True)
    like = LikeDataset.open(url, grows=True)
    for only in PASSES:
        prepare(like.description, {"train": [tmp_path / "day2.csv"]}, tmp_path / "by pass", like=like, only=only)
    for file in sorted(second.rglob("*")):
        if file.is_file() and file.name != "manifest.json":
            assert (tmp_path / "by pass" / file.relative_to(second)).read_bytes() == file.read_bytes()
    recorded = json.loads((tmp_path / "by pass" / "manifest.json").read_text())["like"]
    assert recorded == {"data_set": url, "grow": True}


def test_a_later_vocabulary_is_not_taken_from_the_work_of_another(tmp_path: Path) -> None:
    """The same rows like another data set, in the same work directory, are encoded anew."""
    first, raw = made(tmp_path), write_day(tmp_path, 2)
    other = tmp_path / "other"
    prepare(LikeDataset.open(str(first)).description, [write_day(tmp_path, 5)], other)
    for data in (first, other):
        like = LikeDataset.open(str(data))
        for only in PASSES[:-1]:
            prepare(like.description, {"train": [raw]}, tmp_path / "out", like=like, only=only)
    prepare(like.description, {"train": [raw]}, tmp_path / "out", like=like)
    assert DatasetSchema.load(tmp_path / "out").vocabulary_id == DatasetSchema.load(other).vocabulary_id
    check(tmp_path / "out")


@pytest.mark.parametrize("text", [DESCRIPTION, None])
def test_descriptions_come_back_from_the_manifest(tmp_path: Path, text: str | None) -> None:
    (tmp_path / "table.yaml").write_text(text or "")
    spec = criteo(7) if text is None else load_table(tmp_path / "table.yaml")
    assert from_record(json.loads(json.dumps(to_record(spec)))) == spec


def _replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_replaced("column: age", "column: age, name: years"), "has the dense column 'age', which the description"),
        (_replaced("  - {column: age}\n", ""), "has the dense column 'age', which the description lacks"),
        (_replaced("column: place", "column: place, name: town"), "has the sparse feature 'place', which the descr"),
        (_replaced("sparse:", "sparse:\n  - {column: new}"), "lacks the sparse feature 'new', which the description"),
        (_replaced("column: age", "column: age, transform: raw"), "dense column age has transform raw in the descr"),
        (_replaced("missing: mean", "missing: 1"), "dense column price has missing 1 in the description and missing m"),
        (_replaced("num_embeddings: 50", "num_embeddings: 51"), "sparse feature place has num_embeddings 51 in the"),
        (_replaced(', table: item, separator: "|"', ", table: item"), "sparse feature seen has multi_valued true th"),
        (_replaced("{column: user,", "{column: user, cast: integer,"), "sparse feature user has cast integer in the"),
        (_replaced(", table: item", ""), "sparse feature seen has no table in the description and table item there"),
    ],
)
def test_a_description_that_makes_other_features_is_refused(
    tmp_path: Path, change: Callable[[str], str], message: str
) -> None:
    like = LikeDataset.open(str(made(tmp_path)))
    changed = change(DESCRIPTION)
    assert changed != DESCRIPTION
    (tmp_path / "other.yaml").write_text(changed)
    with pytest.raises(UserError) as caught:
        prepare(load_table(tmp_path / "other.yaml"), [write_day(tmp_path, 2)], tmp_path / "x", like=like)
    assert message in str(caught.value)
    assert str(caught.value).startswith(like.path)
    assert "\n" not in str(caught.value)


def test_a_description_may_read_other_columns_in_another_order(tmp_path: Path) -> None:
    like = LikeDataset.open(str(made(tmp_path)))
    rows = [{("visitor" if key == "user" else key): value for key, value in row.items()} for row in rows_of(2)]
    lines = [json.dumps({**row, "clk": int(row["clk"]), "seen": row["seen"]}) for row in rows]
    (tmp_path / "day2.jsonl").write_text("\n".join(lines))
    head, user, *rest = DESCRIPTION.replace("format: csv", "format: jsonl").split("\n  - ")
    sparse = [line for line in rest if "user" not in line and "age" not in line]
    other = "\n  - ".join([head, user, "{column: age}\nsparse:", *sparse]).rstrip()
    other += "\n  - {column: visitor, name: user}\n"
    (tmp_path / "other.yaml").write_text(other)
    spec, raw = load_table(tmp_path / "other.yaml"), {"train": [tmp_path / "day2.jsonl"]}
    found = prepare(spec, raw, tmp_path / "b", like=like)
    assert found is not None
    assert found.preprocessing == like.schema.preprocessing
    expected = grown(tmp_path, 2, Path(like.path), grows=False)
    assert read(tmp_path / "b", "train") == read(expected, "train")


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["prepare", *map(str, arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mlet: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_errors_of_the_command_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, raw, out = made(tmp_path), write_day(tmp_path, 2), ("--out", tmp_path / "x")
    like = ("--like", first, *out)
    assert "--grow goes with --like" in error(capsys, "table", raw, "--grow", *out)
    assert f"{first}: was made by `mlet prepare table`, not criteo" in error(capsys, "criteo", raw, *like)
    assert "--min-count goes with --grow here" in error(capsys, "table", raw, "--min-count", 2, *like)
    assert "--split goes with criteo and avazu" in error(capsys, "table", raw, "--split", "rows", *like)
    assert "no such data set" in error(capsys, "table", raw, "--like", tmp_path / "none", *out)
    (tmp_path / "renamed.csv").write_text(raw.read_text().replace("user", "visitor", 1))
    renamed = error(capsys, "table", tmp_path / "renamed.csv", *like)
    assert "the header has no column 'user'; it has clk, price, age, visitor, item" in renamed
    prepare(
        LikeDataset.open(str(first)).description,
        {"train": [write_day(tmp_path, 3)], "test": [write_day(tmp_path, 4)]},
        tmp_path / "split",
    )
    assert "was split by the names of its files" in error(capsys, "table", raw, "--like", tmp_path / "split", *out)
    shutil.copytree(first, tmp_path / "bare")
    (tmp_path / "bare" / "manifest.json").unlink()
    assert "has no manifest.json, which records how it was" in error(
        capsys, "table", raw, "--like", tmp_path / "bare", *out
    )
    shutil.copytree(first, tmp_path / "broken")
    vocabulary = tmp_path / "broken" / "vocabulary"
    (vocabulary / "user.parquet").write_bytes((vocabulary / "item.parquet").read_bytes())
    assert "user.parquet: has other values, or in another order" in error(
        capsys, "table", raw, "--like", tmp_path / "broken", *out
    )
    (vocabulary / "user.parquet").unlink()
    assert "user.parquet: cannot be read" in error(capsys, "table", raw, "--like", tmp_path / "broken", *out)


def test_a_key_that_is_missing_from_json_lines_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.yaml").write_text("format: jsonl\nlabel: {column: clk}\nsparse: [{column: user}]\n")
    for name, key in (("one", "user"), ("two", "visitor")):
        lines = [json.dumps({"clk": i % 2, key: f"u{i % 5}"}) for i in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    prepare(load_table(tmp_path / "table.yaml"), [tmp_path / "one.jsonl"], tmp_path / "one")
    message = error(capsys, "table", tmp_path / "two.jsonl", "--like", tmp_path / "one", "--out", tmp_path / "x")
    assert "two.jsonl: no object at the start of a file has the key 'user', which" in message


def test_criteo_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for day in (1, 2):
        (tmp_path / f"day{day}").write_bytes(raw_bytes(make_raw_lines(200, seed=day, distinct=30 * day)))
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main(["prepare", "criteo", str(tmp_path / "day1"), "--out", str(one)]) == 0
    capsys.readouterr()
    more = ["--like", str(one), "--grow", "--min-count", "4", "--out", str(two), "--json"]
    assert cli.main(["prepare", "criteo", "--train", str(tmp_path / "day2"), *more]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    before, now = DatasetSchema.load(one), DatasetSchema.load(two)
    assert result["rows"] == {"train": 200}
    assert result["new_ids"] == sum(now.num_embeddings.values()) - sum(before.num_embeddings.values()) > 0
    for table in before.table_sizes:
        found, counts = vocabulary(two, table), pq.read_table(two / "vocabulary" / f"{table}.parquet")["count"]
        assert found[: before.table_sizes[table] - 1] == vocabulary(one, table)
        assert all(count >= 4 for count in counts.to_pylist()[before.table_sizes[table] - 1 :])
