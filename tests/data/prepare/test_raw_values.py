"""Tests of mlet_dist.data.prepare.raw_values and typed_columns: values of any type, missing values, and labels."""

import datetime
import decimal
import uuid

import numpy as np
import pyarrow as pa
import pytest

from mlet_dist.data.prepare.raw_formats import DenseColumn, LabelColumn, SparseColumn
from mlet_dist.data.prepare.raw_values import as_numbers, as_texts, canonical_texts
from mlet_dist.data.prepare.typed_columns import dense_values, label_values, value_texts

NOON = datetime.datetime(2021, 3, 4, 12, 0, 0)
NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([3, None, -7], pa.int8()), ["3", "", "-7"]),
        (pa.array([2**64 - 1, 2**63], pa.uint64()), ["18446744073709551615", "9223372036854775808"]),
        (pa.array([-(2**63)], pa.int64()), ["-9223372036854775808"]),
        (pa.array([3.0, None, NAN, -0.0, 2.0**53]), ["3", "", "", "0", "9007199254740992"]),
        (pa.array(np.array([3.0, 17.0], np.float16)), ["3", "17"]),
        (pa.array([True, None, False]), ["true", "", "false"]),
        (pa.array([b"caf\xc3\xa9", None]), ["café", ""]),
        (pa.array(["x", None], pa.large_string()), ["x", ""]),
        (pa.array(["x", None], pa.string_view()), ["x", ""]),
        (pa.array([b"x", None], pa.binary_view()), ["x", ""]),
        (pa.array([b"ab"], pa.binary(2)), ["ab"]),
        (pa.array([decimal.Decimal("12"), None], pa.decimal128(5, 0)), ["12", ""]),
        (pa.array([decimal.Decimal("12.00")], pa.decimal128(6, 2)), ["12"]),
        (pa.array([datetime.date(2021, 3, 4), None]), ["2021-03-04", ""]),
        (pa.array([datetime.date(2021, 3, 4)], pa.date64()), ["2021-03-04"]),
        (pa.array([datetime.time(1, 2, 3)]), ["01:02:03"]),
        (pa.array([NOON], pa.timestamp("s")), ["2021-03-04 12:00:00"]),
        (pa.array([NOON], pa.timestamp("ns")), ["2021-03-04 12:00:00"]),
        (pa.array([NOON], pa.timestamp("ms", "UTC")), ["2021-03-04 12:00:00+00:00"]),
        (pa.array([None, None]), ["", ""]),
    ],
)
def test_every_exact_type_is_a_category(values: pa.Array, expected: list[str]) -> None:
    texts, absent, valid = as_texts(values, None, None)
    assert texts.to_pylist() == expected
    assert valid.all()
    assert absent.tolist() == [text == "" for text in expected]


def test_a_uuid_is_a_category() -> None:
    one = uuid.UUID(int=2**100 + 17)
    values = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([one.bytes, None], pa.binary(16)))
    assert as_texts(values, None, None)[0].to_pylist() == [str(one), ""]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1.5]),
        pa.array([1e300]),
        pa.array([2.0**53 + 2]),  # a double does not hold its neighbour, so it may have been rounded
        pa.array([float("inf")]),
        pa.array([decimal.Decimal("1.50")]),
        pa.array([b"\xff"]),
        pa.array([{"a": 1}]),
        pa.array([datetime.timedelta(1)]),
    ],
)
def test_a_value_without_an_exact_reading_is_malformed(values: pa.Array) -> None:
    typed = value_texts(values, SparseColumn("c", "c"))
    assert list(typed.invalid) == [0]
    assert typed.invalid[0].startswith("c is ")
    assert "whole number" in typed.invalid[0]


@pytest.mark.parametrize(
    ("values", "in_csv"),  # as pandas and Python write them
    [
        (pa.array([1.0, None, 3.5, 1e22, 0.1]), ["1.0", "", "3.5", "1e+22", "0.1"]),
        (pa.array([0.1, 2.5, -0.0], pa.float32()), ["0.1", "2.5", "-0.0"]),
        (pa.array([decimal.Decimal("1.50"), decimal.Decimal("2.00")]), ["1.50", "2.00"]),
        (pa.array([1, None, 2**62 + 1]), ["1", "", "4611686018427387905"]),
    ],
)
def test_cast_text_gives_the_text_of_a_csv_file(values: pa.Array, in_csv: list[str]) -> None:
    texts, absent, valid = as_texts(values, "text", None)
    assert texts.to_pylist() == in_csv
    assert absent.tolist() == [text == "" for text in in_csv]
    assert valid.all()


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
def test_the_unit_of_a_timestamp_does_not_matter(unit: str) -> None:
    moments = [NOON, NOON.replace(microsecond=125_000)]
    expected = ["2021-03-04 12:00:00", "2021-03-04 12:00:00.125000"]
    assert as_texts(pa.array(moments, pa.timestamp(unit)), None, None)[0].to_pylist() == expected
    zoned = as_texts(pa.array(moments, pa.timestamp(unit, "Asia/Tokyo")), None, None)[0].to_pylist()
    assert zoned == ["2021-03-04 21:00:00+09:00", "2021-03-04 21:00:00.125000+09:00"]


def test_one_whole_number_is_one_category_whatever_its_type() -> None:
    spellings = pa.array(["7", "007", "7.0", "+7", " 7 ", "7.", "-0", "0"])
    assert as_texts(spellings, "integer", None)[0].to_pylist() == ["7"] * 6 + ["0"] * 2
    assert canonical_texts(pa.array(["1.0", " yes ", "010"])).to_pylist() == ["1", "yes", "10"]
    long = "12345678901234567890123"
    assert as_texts(pa.array([long]), "integer", None)[0].to_pylist() == [long]
    assert as_texts(pa.array(["1.5", "x", "1e3"]), "integer", None)[2].tolist() == [False] * 3


@pytest.mark.parametrize(
    "spelling", ["", "NULL", "null", "\\N", "nan", "NaN", "NA", "N/A", "<NA>", "None", "NaT", "?", "-"]
)
def test_known_spellings_of_missing_numbers(spelling: str) -> None:
    raw = pa.array(["4", spelling, f" {spelling} "]).dictionary_encode()
    assert dense_values(raw, DenseColumn("d", "d", "raw", 9.0)).values.to_pylist() == [4.0, 9.0, 9.0]
    refused = dense_values(raw, DenseColumn("d", "d", "raw", "refuse"))
    assert list(refused.invalid) == [1, 2]
    typed = value_texts(raw, SparseColumn("c", "c", cast="integer"))
    assert (typed.values.to_pylist(), typed.invalid) == (["4", "", ""], {})


def test_text_columns_keep_texts_that_may_be_values() -> None:
    raw = pa.array(["NA", "\\N", "-", ""]).dictionary_encode()
    assert value_texts(raw, SparseColumn("c", "c")).values.to_pylist() == ["NA", "", "-", ""]
    own = SparseColumn("c", "c", missing_values=("NA", "-"))
    assert value_texts(raw, own).values.to_pylist() == ["", "\\N", "", ""]


def test_own_spellings_replace_the_usual_ones_and_hold_for_numbers_of_any_type() -> None:
    dense = DenseColumn("d", "d", "raw", 5.0, missing_values=("-1",))
    assert dense_values(pa.array(["-1", "2"]), dense).values.to_pylist() == [5.0, 2.0]
    assert dense_values(pa.array([-1, 2, None]), dense).values.to_pylist() == [5.0, 2.0, 5.0]
    assert dense_values(pa.array([-1.0, 2.0]), dense).values.to_pylist() == [5.0, 2.0]
    assert list(dense_values(pa.array(["NULL"]), dense).invalid) == [0]
    assert value_texts(pa.array([-1, 2]), SparseColumn("c", "c", missing_values=("-1",))).values.to_pylist() == [
        "",
        "2",
    ]


def test_nan_is_missing_and_infinity_is_malformed() -> None:
    typed = dense_values(pa.array([NAN, 2.0, float("inf")]), DenseColumn("d", "d", "raw", 7.0))
    assert typed.values.to_pylist()[:2] == [7.0, 2.0]
    assert typed.invalid == {2: "d is inf instead of a number from -3.403e+38 to 3.403e+38"}
    assert as_numbers(pa.array([None, None]), False, None)[1].all()


@pytest.mark.parametrize(
    "raw",
    [
        pa.array(["0", "1"]),
        pa.array(["0.0", "1.0"]),
        pa.array(["False", "True"]),
        pa.array(["FALSE", "true"]),
        pa.array([" 0", "1 "]),
        pa.array(["0", "1e0"]),
        pa.array([False, True]),
        pa.array([0, 1], pa.uint8()),
        pa.array([0.0, 1.0]),
        pa.array([decimal.Decimal("0.0"), decimal.Decimal("1.0")]),
        pa.array(["False", "True"]).dictionary_encode(),
    ],
)
def test_labels_of_zero_and_one(raw: pa.Array) -> None:
    typed = label_values(raw, LabelColumn("y"))
    assert (typed.values.to_pylist(), typed.invalid, typed.others) == ([0, 1], {}, {})


def test_other_numbers_are_reported_apart_from_malformed_labels() -> None:
    typed = label_values(pa.array(["1", "2", "2.0", "", "x", "0", "-1"]), LabelColumn("y"))
    assert sorted(typed.invalid) == [1, 2, 3, 4, 6]
    assert typed.others == {"2": 1, "2.0": 1, "-1": 1}
    rows = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1, 1]), pa.array([1, 3]))
    assert label_values(rows, LabelColumn("y")).others == {"3": 3}
    many = label_values(pa.array(list(range(100))), LabelColumn("y")).others
    assert len(many) == 6
    assert sum(many.values()) == 98


def test_labels_are_mapped() -> None:
    raw = pa.array(["click", "skip", "2", "2.0", None, ""])
    only = label_values(raw, LabelColumn("y", positive=("click", "2")))
    assert (only.values.to_pylist()[:4], sorted(only.invalid)) == ([1, 0, 1, 1], [4, 5])
    both = label_values(raw, LabelColumn("y", positive=("click",), negative=("skip",)))
    assert sorted(both.invalid) == [2, 3, 4, 5]
    numbers = label_values(pa.array([1.0, 2.0, NAN]), LabelColumn("y", positive=("2",), negative=("1",)))
    assert (numbers.values.to_pylist()[:2], sorted(numbers.invalid)) == ([0, 1], [2])
    booleans = label_values(pa.array([True, False]), LabelColumn("y", positive=("false",)))
    assert booleans.values.to_pylist() == [0, 1]
    threshold = label_values(pa.array(["4", "3.5", "NULL"]), LabelColumn("y", positive_from=4))
    assert (threshold.values.to_pylist()[:2], sorted(threshold.invalid)) == ([1, 0], [2])


def test_bytes_that_are_no_text_are_not_missing() -> None:
    assert list(dense_values(pa.array([b"\xff", b"2", b""]), DenseColumn("d", "d", "raw", 0.0)).invalid) == [0]


def test_reasons_are_made_for_the_rows_that_are_shown() -> None:
    rows = 3_000_000
    typed = label_values(
        pa.DictionaryArray.from_arrays(pa.array(np.arange(rows) % 2), pa.array(["x", "1"])), LabelColumn("y")
    )
    assert len(typed.invalid) == rows // 2
    assert typed.invalid[4] == "y is 'x' instead of 0 or 1"
    assert 5 not in typed.invalid
    assert rows not in typed.invalid
    with pytest.raises(KeyError):
        typed.invalid[5]
