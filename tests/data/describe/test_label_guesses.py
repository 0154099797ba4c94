"""Tests of the labels and times that `mlet describe` finds."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mlet_dist.data.describe import describe
from mlet_dist.errors import UserError
from tests.helpers.described_tables import LABEL, ROWS, described, drawn, features, round_trip, spread, table

Write = Callable[..., Path]


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("click", drawn(0, 1), {}),
        ("isClick", drawn("0.0", "1.0"), {}),
        ("label", drawn("True", "False"), {}),
        ("label", drawn(1, 2, 1), {"positive_from": 2}),
        ("label", drawn(-1, 1), {"positive_from": 1}),
        ("target", drawn("yes", "no"), {"positive": ["yes"]}),
        ("clk", drawn("Y", "N", "y"), {"positive": ["Y", "y"]}),
        ("label", drawn("seen", "seen", "seen", "bought it"), {"positive": ["bought it"]}),
        ("rating", drawn(1, 2, 3, 4, 5), {"positive_from": 4}),
        ("stars", drawn(0.5, 1.5, 3.0, 4.5, 5.0), {"positive_from": 4.5}),
        ("score", drawn(*range(1, 11)), {"positive_from": 8}),
        ("overall", drawn("0", "1", ""), {}),
    ],
)
def test_label_by_name(
    tmp_path: Path, write_raw: Write, name: str, values: Sequence[object], expected: dict[str, Any]
) -> None:
    raw = write_raw(table(flag=drawn(0, 1, seed=5), x=drawn(*"abc"), **{name: values}), "a.csv")
    schema, found = round_trip(raw, tmp_path)
    assert found["label"] == {"column": name, **expected}
    assert 0 < schema.positive_rate["train"] < 1


def test_label_without_a_name_is_said_to_be_a_guess(write_raw: Write) -> None:
    text = describe(str(write_raw(table(a=drawn(*"pqr"), b=drawn(0, 1), c=drawn(1, 0)), "a.csv"))).text
    assert "# A guess: the first column of 0s and 1s; c holds 0s and 1s, too.\nlabel:\n  column: b\n" in text
    text = describe(str(write_raw(table(a=drawn(*"pqr"), b=drawn(1, 2, 3, 4, 5)), "b.csv"))).text
    assert "# A guess: no column holds 0s and 1s; this one looks like ratings.\nlabel:\n  column: b\n" in text


def test_a_quantity_with_a_vague_name_is_no_label(write_raw: Write) -> None:
    raw = write_raw(table(x=drawn(*"pqr"), y=spread(0, 900), score=spread(0, 900, 2), bought=drawn(0, 1)), "a.csv")
    assert described(raw)["label"] == {"column": "bought"}
    raw = write_raw(table(x=drawn(*"pqr"), watch_ratio=[i / 99 for i in spread(0, 300)]), "b.csv")
    assert described(raw)["label"]["column"] == "watch_ratio"


def test_without_a_label_the_description_says_what_to_set(tmp_path: Path, write_raw: Write) -> None:
    raw = write_raw(table(a=drawn(*"pqr"), age=drawn(1, 22, 27, 30, 41, 58)), "a.csv")
    text = describe(str(raw)).text
    assert "# label: {column: NAME, positive_from: 4}\n# Columns with two values or few numbers:\n#   age: " in text
    with pytest.raises(UserError, match=r"table\.yaml: key 'label' is missing"):
        round_trip(raw, tmp_path)
    # The advice can be followed.
    raw.write_bytes(table(a=drawn(*"pqr"), b=drawn(*"xyz"), label=drawn(1, 7, 30)))
    assert described(raw)["label"]["column"] == "label"


def test_a_head_of_one_class_is_split_at_random(tmp_path: Path, write_raw: Write) -> None:
    raw = write_raw(table(x=drawn(*"abc"), label=[0] * 200 + [1] * 40), "a.csv")
    schema, found = round_trip(raw, tmp_path)
    assert found["split"]["by"] == "random"
    assert all(0 < rate < 1 for rate in schema.positive_rate.values())
    long = write_raw(table(x=drawn(*"abc", rows=12_000), label=[0] * 11_000 + [1] * 1_000), "b.csv")
    assert "all of these rows are of one class" in describe(str(long)).text
    assert described(long)["split"] == {"by": "random"}


def test_rows_without_a_label_are_allowed_for(tmp_path: Path, write_raw: Write) -> None:
    raw = write_raw(table(x=drawn(*"abc"), label=drawn("0", "1", "", "NULL")), "a.csv")
    schema, found = round_trip(raw, tmp_path)
    assert schema.malformed > ROWS / 4
    assert found["max_malformed"] > schema.malformed / ROWS


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("timestamp", spread(1_600_000_000, 1_600_900_000)),
        ("ts", [i * 1000 + 7 for i in spread(1_600_000_000, 1_600_900_000)]),
        ("timestamp", [f"{i}.25" for i in spread(1_600_000_000, 1_600_900_000)]),
        ("x", spread(1_600_000_000, 1_600_900_000)),
        ("event_time", [f"2020-07-{1 + i // 60 % 20:02} {i % 24:02}:{i % 60:02}:01.5" for i in spread(0, 9000)]),
        ("x", [f"2020-07-{1 + i % 20:02}T05:00:00Z" for i in spread(0, 9000)]),
        ("conversion_timestamp", spread(0, 900)),
        ("date", [20200701 + i for i in spread(0, 28)]),
    ],
)
def test_split_by_time(tmp_path: Path, write_raw: Write, name: str, times: list[object]) -> None:
    raw = write_raw(table(label=LABEL, c=drawn(*"abc"), **{name: times}), "a.csv")
    schema, found = round_trip(raw, tmp_path)
    assert found["split"] == {"by": "time", "column": name}
    assert [feature.name for feature in schema.sparse] == ["c"]
    assert schema.malformed == 0


def test_a_few_days_are_split_at_the_last_two(tmp_path: Path, write_raw: Write) -> None:
    days = [f"2020-07-0{1 + i // 60}" for i in range(ROWS)]
    schema, found = round_trip(write_raw(table(label=LABEL, c=drawn(*"abc"), day=days), "a.csv"), tmp_path)
    assert found["split"]["starts"] == {"valid": "2020-07-03", "test": "2020-07-04"}
    assert schema.rows == {"train": 120, "valid": 60, "test": 60}


def test_dates_of_birth_do_not_split(write_raw: Write) -> None:
    born = [f"{1950 + i}-07-0{1 + i % 9}" for i in spread(0, 60)]
    found = described(write_raw(table(label=LABEL, c=drawn(*"abc"), birthday=born), "a.csv"))
    assert found["split"] == {"by": "rows"}


def test_categories_of_time_stay_features(write_raw: Write) -> None:
    found = described(write_raw(table(label=LABEL, hour=spread(0, 24), weekday=spread(0, 7)), "a.csv"))
    assert list(features(found, "sparse")) == ["hour", "weekday"]
    assert found["split"] == {"by": "rows"}
