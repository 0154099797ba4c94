"""Tests of one reading of a value in every format, and of messages that say how a description gets there."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.errors import UserError
from tests.helpers.tables import PLAIN, prepare_table

Description = dict[str, Any]


def _as_csv(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    path.write_text("y,x\n" + "".join(",".join("" if v is None else str(v) for v in row) + "\n" for row in rows))


def _as_jsonl(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    path.write_text("".join(json.dumps(dict(zip("yx", row, strict=True))) + "\n" for row in rows))


def _as_parquet(path: Path, rows: Sequence[Sequence[Any]]) -> None:
    pq.write_table(pa.table(dict(zip("yx", map(list, zip(*rows, strict=True)), strict=True))), path)


def column_of(out: Path, name: str) -> list[Any]:
    """Return a column of all rows of a data set, in the order of the splits."""
    parts = [part for split in ("train", "valid", "test") for part in sorted((out / split).iterdir())]
    return [value for part in parts for value in pq.read_table(part)[name].to_pylist()]


FORMATS = {"csv": _as_csv, "jsonl": _as_jsonl, "parquet": _as_parquet}


@pytest.fixture(params=FORMATS)
def dense_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., list[Any]]:
    """Return a function that writes values in a format and returns the dense feature that is made of them."""

    def make(values: Sequence[Any], **keys: Any) -> list[Any]:
        path = tmp_path / f"a.{request.param}"
        FORMATS[request.param](path, [(i % 2, value) for i, value in enumerate(values)])
        dense = [{"column": "x", "name": "d", "transform": "raw"} | keys]
        sparse = [{"column": "x", "cast": "text"}]
        prepare_table(tmp_path / "out", PLAIN | {"format": request.param, "dense": dense, "sparse": sparse}, [path])
        return column_of(tmp_path / "out", "d")

    return make


def test_booleans_are_numbers_in_every_format(dense_of: Callable[..., list[Any]]) -> None:
    assert dense_of([True, False, False] * 10) == [1.0, 0.0, 0.0] * 10


@pytest.mark.parametrize("spelling", [-1, "-1.0", "-1"])
def test_a_missing_number_is_missing_however_it_is_written(dense_of: Callable[..., list[Any]], spelling: Any) -> None:
    assert dense_of([-1.0, 2.5, 4.0] * 10, missing_values=[spelling], missing=7) == [7.0, 2.5, 4.0] * 10


def test_nan_is_missing_in_every_format(tmp_path: Path) -> None:
    for name, write in FORMATS.items():
        write(tmp_path / f"a.{name}", [(i % 2, [float("nan"), 3.0][i % 3 > 0]) for i in range(30)])
        keys = {"format": name, "sparse": [{"column": "x", "cast": "integer"}]}
        prepare_table(tmp_path / f"out-{name}", PLAIN | keys, [tmp_path / f"a.{name}"])
        found = pq.read_table(tmp_path / f"out-{name}/vocabulary/x.parquet")
        assert found["value"].to_pylist() == ["3", ""], name


def test_a_missing_whole_number_is_missing_however_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    _as_csv(path, [(i % 2, ["-1", "-1.0", "7", "07"][i % 4]) for i in range(40)])
    sparse = [{"column": "x", "cast": "integer", "missing_values": [-1]}]
    prepare_table(tmp_path / "out", PLAIN | {"sparse": sparse}, [path])
    assert pq.read_table(tmp_path / "out/vocabulary/x.parquet")["value"].to_pylist() == ["", "7"]


@pytest.mark.parametrize("word", ["yes", "T", "purchase", "it's"])
def test_labels_of_text_name_the_key_that_takes_them(tmp_path: Path, word: str) -> None:
    path = tmp_path / "a.csv"
    _as_csv(path, [(word, f"u{i}") for i in range(30)])
    with pytest.raises(
        UserError, match=r"instead of 0 or 1; list the labels that mean 1 in `label`, such as `positive"
    ):
        prepare_table(tmp_path / "out", PLAIN, [path])


@pytest.mark.parametrize(
    ("labels", "example"), [((-1, 1), "1"), ((1, 2), "2"), ((1, 3, 5), "5"), ((0.3, 1), "1"), ((0, 10.5), "10.5")]
)
def test_the_advice_for_other_labels_can_be_followed(tmp_path: Path, labels: Sequence[float], example: str) -> None:
    path = tmp_path / "a.csv"
    _as_csv(path, [(labels[i % len(labels)], f"u{i % 5}") for i in range(60)])
    with pytest.raises(UserError, match=rf"`positive_from: {example}` in `label` makes .* `positive: \[{example}\]`"):
        prepare_table(tmp_path / "out", PLAIN, [path])
    for keys in ({"positive_from": float(example)}, {"positive": [example]}):
        out = tmp_path / f"out-{next(iter(keys))}"
        prepare_table(out, PLAIN | {"label": {"column": "y"} | keys}, [path])
        assert set(column_of(out, "label")) == {0, 1}


def test_listed_labels_that_occur_nowhere_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.csv"
    _as_csv(path, [(["Yes", "no", "click"][i % 3], f"u{i % 5}") for i in range(60)])
    label = {"column": "y", "positive": ["yes", "click"], "negative": ["no", "Yes"]}
    with caplog.at_level(logging.WARNING):
        prepare_table(tmp_path / "out", PLAIN | {"label": label}, [path])
    (found,) = [each.getMessage() for each in caplog.records if "label." in each.getMessage()]
    assert found.startswith("label.positive: 'yes' occurs in no row of column y; ")


def wrong(tmp_path: Path, text: str) -> str:
    path = tmp_path / "t.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_table(path, lambda _: ("y", "C1", "C2"))
    return str(caught.value)


@pytest.mark.parametrize("listed", ["yes", "No", "true, click", "on"])
def test_labels_that_yaml_reads_as_booleans_are_refused(tmp_path: Path, listed: str) -> None:
    text = f"format: csv\nlabel: {{column: y, positive: [{listed}]}}\nsparse: [{{column: C1}}]\n"
    assert "it must be a list of labels in quotes, as the column writes them" in wrong(tmp_path, text)


@pytest.mark.parametrize("span", ["C1..C99999999999", "C1..C20000", f"C1..C{'9' * 5000}", "c1..C26", "C1..", "C1...C3"])
def test_ranges_that_are_too_long_or_none_end_at_once(tmp_path: Path, span: str) -> None:
    start = time.monotonic()
    message = wrong(tmp_path, f"format: csv\nlabel: {{column: y}}\nsparse: [{{columns: [{span}]}}]\n")
    assert "it must be a range of at most 10,000 columns, such as C1..C26" in message
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("spase: [{column: C1}]", "key 'sparse' is missing; is 'spase' a misspelling of it?"),
        ("sparse: [{colum: C1}]", "key 'sparse[0].column' is missing; is 'colum' a misspelling of it?"),
        ("sparse: [{column: C1}]\ndelimiter: \\t", '("\\t" in double quotes for a tab)'),
        ("sparse: [{column: C1}]\ndelimiter: '\\x01'", '("\\t" in double quotes for a tab)'),
        ("sparse: [{column: C1, separator: '\\t'}]", '("\\t" in double quotes for a tab)'),
        ('sparse: [{column: C1}]\nmissing_values: ["\\N"]', "\\N is in single quotes, since YAML reads it in double"),
        ("sparse: [{column: C1}]\nencoding: idna", "it must be the name of an encoding"),
        ("sparse: [{column: C1}]\nencoding: punycode", "it must be the name of an encoding"),
    ],
)
def test_what_yaml_reads_otherwise_than_it_looks(tmp_path: Path, text: str, message: str) -> None:
    assert message in wrong(tmp_path, f"format: csv\nlabel: {{column: y}}\n{text}\n")


def test_the_advice_for_missing_values_means_what_it_says(tmp_path: Path) -> None:
    message = wrong(tmp_path, "format: csv\nmissing_values: NA\nlabel: {column: y}\nsparse: [{column: C1}]\n")
    assert yaml.safe_load(message.partition("such as ")[2]) == ["", "NULL", "\\N"]


def test_headers_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("\ny,x\n1,a\n0,b\n")
    with pytest.raises(UserError, match="line 1 is blank; the first line must name the columns"):
        prepare_table(tmp_path / "out", PLAIN, [path])
    path.write_bytes(b"y,x\r1,a\r0,b\r")
    with pytest.raises(UserError, match="the header holds carriage returns; lines must end with"):
        prepare_table(tmp_path / "out", PLAIN, [path])


def test_a_list_of_json_lines_names_the_key_that_takes_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    _as_jsonl(path, [(i % 2, [i]) for i in range(30)])
    with pytest.raises(UserError) as caught:
        prepare_table(tmp_path / "out", PLAIN | {"format": "jsonl"}, [path])
    assert str(caught.value).endswith("true or false; set `multi_valued: true` for lists")


def test_what_is_wrong_with_a_time_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    _as_csv(path, [(i % 2, "2020-07-05 05:27:48 Europe/Berlin") for i in range(30)])
    with pytest.raises(UserError, match="x is '2020-07-05 05:27:48 Europe/Berlin' instead of a number, or a date"):
        prepare_table(tmp_path / "out", PLAIN | {"split": {"by": "time", "column": "x"}}, [path])
