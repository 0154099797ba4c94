"""Tests of mlet_dist.data.prepare.time_columns: the spellings of times in logs, and their order."""

import datetime
import decimal

import pyarrow as pa
import pytest

from mlet_dist.data.prepare.splits import DATES, FRACTIONS, MILLIONTHS, WHOLE_NUMBERS
from mlet_dist.data.prepare.time_columns import KINDS, parse_time, time_values

UTC = datetime.UTC
MOMENT = int(datetime.datetime(2020, 7, 5, 5, 27, 48, tzinfo=UTC).timestamp()) * MILLIONTHS


@pytest.mark.parametrize(
    ("text", "offset"),
    [
        ("2020-07-05 05:27:48", 0),
        ("2020-07-05T05:27:48", 0),
        ("2020-07-05 05:27:48.378", 378_000),  # KuaiRec
        ("2020-07-05 05:27:48,378", 378_000),  # Python's logging
        ("2020-07-05 05:27:48.123456789", 123_456),  # nanoseconds, of pandas
        ("2020-07-05 05:27:48 UTC", 0),  # BigQuery
        ("2020-07-05 05:27:48.5 UTC", 500_000),
        ("2020-07-05T05:27:48.000Z", 0),  # Spark
        ("2020-07-05T05:27:48.000+00:00", 0),
        ("2020-07-05 07:27:48+02", 0),
        ("2020-07-05 07:27:48 +0200", 0),
        ("2020-07-05 07:27:48 +02:00", 0),
        ("2020/07/05 05:27:48", 0),
        ("2020/7/5 5:27:48", 0),
        ("2020-7-5 5:27:48", 0),
        ("  2020-07-05 05:27:48 ", 0),
        ("2020-07-05 05:27:48.0", 0),  # Hive
    ],
)
def test_spellings_of_one_moment(text: str, offset: int) -> None:
    assert parse_time(text) == (MOMENT + offset, DATES)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("1593878903", (1593878903, WHOLE_NUMBERS)),
        ("1593878903.0", (1593878903, WHOLE_NUMBERS)),
        (str(2**63 - 1), (2**63 - 1, WHOLE_NUMBERS)),
        ("1593878903.438", (1593878903.438, FRACTIONS)),
        ("-0.25", (-0.25, FRACTIONS)),
        (datetime.date(2020, 7, 5), (MOMENT - (5 * 3600 + 27 * 60 + 48) * MILLIONTHS, DATES)),
        (datetime.datetime(2020, 7, 5, 5, 27, 48), (MOMENT, DATES)),
        ("2020-07-05 05", (MOMENT - (27 * 60 + 48) * MILLIONTHS, DATES)),
    ],
)
def test_numbers_and_dates(value: object, expected: tuple[float, str]) -> None:
    assert parse_time(value) == expected


@pytest.mark.parametrize(
    "text",
    ["", "NaN", "x", str(2**63), "05/07/2020", "2020-13-01", "2020-07-05 05:27:48 Europe/Berlin", "1e40", "None"],
)
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="as in the column"):
        parse_time(text)
    typed = time_values(pa.array([text, "5"]), "t")
    assert list(typed.invalid) == [0]
    assert typed.values[1].as_py() == 5


def test_a_fraction_puts_all_numbers_of_a_block_in_millionths() -> None:
    typed = time_values(pa.array(["3", "2.5", "2"]).dictionary_encode(), "t")
    assert typed.values.to_pylist() == [3_000_000, 2_500_000, 2_000_000]
    assert [KINDS[kind] for kind in typed.kinds] == [FRACTIONS] * 3
    whole = time_values(pa.array([3.0, 2.0]), "t")
    assert (whole.values.to_pylist(), whole.kinds.tolist()) == ([3, 2], [KINDS.index(WHOLE_NUMBERS)] * 2)
    # A dictionary may hold values of other blocks.
    encoded = pa.DictionaryArray.from_arrays(pa.array([0, 2]), pa.array(["3", "2.5", "2"]))
    assert time_values(encoded, "t").values.to_pylist() == [3, 2]
    assert list(time_values(pa.array(["9999999999999", "0.5"]), "t").invalid) == [0]  # does not fit


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (pa.array([datetime.datetime(1970, 1, 1, 0, 0, 1)], pa.timestamp("ns")), 1_000_000),
        (pa.array([datetime.datetime(1970, 1, 1, 0, 0, 1)], pa.timestamp("s", "America/New_York")), 1_000_000),
        (pa.array([datetime.date(1970, 1, 2)]), 86_400_000_000),
        (pa.array([7], pa.uint64()), 7),
        (pa.array([decimal.Decimal("7.00")]), 7),
        (pa.array([7.25]), 7_250_000),
    ],
)
def test_arrow_types(raw: pa.Array, expected: int) -> None:
    assert time_values(raw, "t").values.to_pylist() == [expected]


def test_missing_times_are_malformed() -> None:
    assert list(time_values(pa.array([1, None]), "t").invalid) == [1]
    assert list(time_values(pa.array([2**63], pa.uint64()), "t").invalid) == [0]
    assert list(time_values(pa.array([True]), "t").invalid) == [0]
