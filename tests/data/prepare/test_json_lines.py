"""Tests of mlet_dist.data.prepare.json_lines: the same values as from a CSV file, and a reason for each bad line."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlet_dist.data.prepare.json_lines import json_columns
from mlet_dist.data.prepare.raw_formats import JsonLines, LabelColumn, SparseColumn, TableSpec
from mlet_dist.data.prepare.splits import SplitRule
from mlet_dist.errors import UserError
from tests.helpers.tables import PLAIN, prepare_table, values_of

JSON: dict[str, Any] = PLAIN | {"format": "jsonl"}
SPEC = TableSpec(
    "table",
    JsonLines(),
    LabelColumn("y"),
    (),
    (SparseColumn("x", "x"), SparseColumn("l", "l", multi_valued=True, weights="w")),
    SplitRule("rows"),
)


def columns_of(*lines: str) -> tuple[dict[str, list[Any]], dict[int, str]]:
    columns, found = json_columns(SPEC, "a", "".join(f"{line}\n" for line in lines).encode(), ())
    return {name: column.to_pylist() for name, column in columns.items()}, found.reasons


def test_values_are_texts_as_they_are_written() -> None:
    columns, reasons = columns_of(
        '{"y": 1, "x": 7, "l": ["a", 1.50, true, null], "w": [1, 2e-1], "other": {"a": [1]}}',
        '{"y": 1.0, "x": "7", "l": [], "w": null}',
        "",
        '{"y": "1", "x": 123456789012345678901234567890}',
        ' {"y": 0, "x": 1.50, "l": null}\r',
        '{"y": 0, "x": null}',
        '{"y": 0, "x": true}',
        '{"y": 0, "x": "\\u00e9\\ud83d\\ude00"}',
        '{"y": 0, "x": NaN}',
    )
    assert columns == {
        "y": ["1", "1.0", "1", "0", "0", "0", "0", "0"],
        "x": ["7", "7", "123456789012345678901234567890", "1.50", None, "true", "é😀", None],
        "l": [["a", "1.50", "true", None], [], *6 * [None]],
        "w": [["1", "2e-1"], *7 * [None]],
    }
    assert reasons == {}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("7", "a number instead of a JSON object"),
        ('["y", 1]', "a list instead of a JSON object"),
        ('{"y": 1', "not a JSON object: Expecting ',' delimiter at character 8"),
        ("{'y': 1}", "not a JSON object: Expecting property name enclosed in double quotes at character 2"),
        ('{"y": 1} {"y": 0}', "not a JSON object: Extra data at character 10"),
        ('{"y": 1, "y": 0}', "an object that has the key 'y' twice"),
        ('{"x": {"a": 1}}', "x holds an object instead of a text, a number, true or false"),
        ('{"x": ["a"]}', "x holds a list instead of a text, a number, true or false"),
        ('{"l": "a"}', "l holds a text instead of a list"),
        ('{"l": [["a"]]}', "l holds a list instead of a list of texts or numbers"),
        ('{"x": "\\ud800"}', "x holds half of a surrogate pair, which is no text"),
        ('{"x": "' + 2**20 * "a" + '"}', "a line of 1048585 bytes; at most 1048575 are allowed"),
        (100_000 * "[", "a JSON object that is nested too deeply"),
    ],
)
def test_malformed_lines_are_counted_as_such(line: str, reason: str) -> None:
    columns, reasons = columns_of('{"y": 1}', "", line, '{"y": 0}')
    assert columns["y"] == ["1", "0"]
    assert reasons == {2: reason}


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    _, found = json_columns(SPEC, "a", b'{"y": 1}\n{"y": "\xe9"}\n', ())
    assert (found.reasons, found.malformed) == ({1: "byte 0xe9 is not UTF-8"}, 1)


ROWS = st.lists(
    st.fixed_dictionaries(
        {"y": st.sampled_from([0, 1]), "n": st.one_of(st.none(), st.integers(), st.integers(0, 3))},
        optional={
            "x": st.one_of(st.none(), st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), max_size=4)),
            "l": st.one_of(st.none(), st.lists(st.sampled_from(["a", "b c", "é"]), max_size=3)),
        },
    ),
    min_size=10,
    max_size=30,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20)
@given(rows=ROWS)
def test_the_same_file_as_csv_gives_the_same_ids(
    rows: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    rows = [{"y": 0, "n": 1}, {"y": 1, "n": 1}, *rows]  # a training split of one class is refused
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (folder / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["y", "n", "x", "l"])
        for row in rows:
            writer.writerow([row["y"], row["n"], row.get("x"), "|".join(row.get("l") or [])])
    shared = {"label": {"column": "y"}, "split": {"by": "rows", "shares": {"train": 0.5, "valid": 0.25, "test": 0.25}}}
    features = [{"column": "n"}, {"column": "x"}]
    schemas = [
        prepare_table(folder / form, shared | {"format": form, "sparse": [*features, lists]}, [folder / f"a.{form}"])
        for form, lists in (
            ("jsonl", {"column": "l", "multi_valued": True}),
            ("csv", {"column": "l", "separator": "|"}),
        )
    ]
    assert schemas[0].vocabulary_id == schemas[1].vocabulary_id
    for feature in ("n", "x", "l"):
        assert values_of(folder / "jsonl", feature) == values_of(folder / "csv", feature)


def test_malformed_lines_in_a_data_set(tmp_path: Path) -> None:
    lines = [json.dumps({"y": i % 2, "x": f"v{i}"}) for i in range(40)]
    (tmp_path / "a.json.gz").write_bytes(gzip.compress("\n".join([*lines[:20], "{", *lines[20:]]).encode()))
    assert prepare_table(tmp_path / "out", JSON, [tmp_path / "a.json.gz"]).malformed == 1
    [found] = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    assert (found["line"], found["text"]) == (21, "{")


def test_another_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,x\n" + 30 * "1,a\n")
    with pytest.raises(
        UserError, match=r"31 of 31 lines are malformed, .* line 1: .*; each line must be one JSON object"
    ):
        prepare_table(tmp_path / "out", JSON, [tmp_path / "a.csv"])


def test_a_key_that_no_object_has_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text(15 * '{"y": 1, "user": "a"}\n{"y": 0, "user": "a"}\n')
    prepare_table(tmp_path / "out", JSON, [tmp_path / "a.jsonl"])
    [warning] = [record.getMessage() for record in caplog.records]
    assert "has the key 'x', so it is missing there; the keys are user, y" in warning
    assert set(values_of(tmp_path / "out")) == {""}


def test_directories_are_columns_of_json_lines_too(tmp_path: Path) -> None:
    for value, more in (("a", ""), ("b", ', "x": "c"')):
        path = tmp_path / f"{more != ''}/x={value}/part.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(9 * '{"y": 1}\n{"y": 0}\n' + f'{{"y": 0{more}}}\n')
    prepare_table(tmp_path / "out", JSON, [tmp_path / "False"])
    assert set(values_of(tmp_path / "out")) == {"a"}
    with pytest.raises(UserError, match=r"part\.jsonl: column 'x' is in the file and in its path \(x=…\)"):
        prepare_table(tmp_path / "again", JSON, [tmp_path / "True"])
