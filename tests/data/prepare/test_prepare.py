"""Tests of mlet_dist.data.prepare.pipeline on Criteo logs, against a second computation with the csv module."""

import csv
import gzip
import hashlib
import io
import json
import math
import os
import stat
import uuid
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.data import parquet_parts
from mlet_dist.data.id_counts import IdCounts
from mlet_dist.data.prepare import chunks, pipeline, raw_blocks, reading, writing
from mlet_dist.data.prepare.pipeline import Resources, prepare_criteo
from mlet_dist.data.prepare.raw_formats import criteo
from mlet_dist.data.prepare.splits import PAPER_CRITEO_FILES, PAPER_CRITEO_ROWS, SplitRule
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from tests.helpers.raw_logs import COLUMNS, RawLine, make_raw_lines, raw_bytes

Write = Callable[..., Path]
Row = dict[str, int | float]

DENSE, SPARSE = COLUMNS[1:14], COLUMNS[14:]
REAL_SAMPLE = Path(__file__).parents[4] / "shared/data/criteo_137k.tsv.gz"
LINES = make_raw_lines(100)


def independently(text: str, min_count: int) -> tuple[dict[str, list[Row]], dict[str, list[tuple[str, int]]]]:
    """Return the rows of each split and the vocabularies, computed with the standard library alone."""
    lines = list(csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE))
    first, second = len(lines) * 8 // 10, len(lines) * 9 // 10
    vocabularies, ids = {}, {}
    for index, name in enumerate(SPARSE, start=14):
        counts = Counter(line[index] for line in lines[:first])
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        vocabularies[name] = [(value, count) for value, count in ordered if count >= min_count]
        ids[name] = {value: position for position, (value, _) in enumerate(vocabularies[name], start=1)}

    def row(line: RawLine) -> Row:
        dense = {n: math.log1p(max(int(x), 0)) if x else 0.0 for n, x in zip(DENSE, line[1:14], strict=True)}
        return {"label": int(line[0])} | dense | {n: ids[n].get(v, 0) for n, v in zip(SPARSE, line[14:], strict=True)}

    splits = {"train": lines[:first], "valid": lines[first:second], "test": lines[second:]}
    return {split: [row(line) for line in part] for split, part in splits.items()}, vocabularies


def written_rows(out: Path, split: str) -> list[Row]:
    schema = DatasetSchema.load(out)
    tables = [pq.read_table(out / part.path) for part in schema.parts[split]]
    assert [table.num_rows for table in tables] == [part.rows for part in schema.parts[split]]
    return [row for table in tables for row in table.to_pylist()]


def assert_equal_rows(actual: list[Row], expected: list[Row]) -> None:
    assert len(actual) == len(expected)
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert list(a) == list(e)
        for name in e:
            same = math.isclose(a[name], e[name], rel_tol=1e-6) if name in DENSE else a[name] == e[name]
            assert same, f"row {index}, {name}: {a[name]} instead of {e[name]}"


def assert_as_computed_independently(out: Path, text: str, min_count: int) -> None:
    splits, vocabularies = independently(text, min_count)
    schema = DatasetSchema.load(out)
    for split, rows in splits.items():
        assert_equal_rows(written_rows(out, split), rows)
        assert schema.rows[split] == len(rows)
        assert schema.positive_rate[split] == pytest.approx(sum(row["label"] for row in rows) / len(rows))
        unknown = {name: sum(row[name] == 0 for row in rows) for name in SPARSE}
        assert schema.id_counts[split] == {name: IdCounts(len(rows), count, 0) for name, count in unknown.items()}
    for name, vocabulary in vocabularies.items():
        table = pq.read_table(out / "vocabulary" / f"{name}.parquet")
        assert list(zip(table["value"].to_pylist(), table["count"].to_pylist(), strict=True)) == vocabulary
    assert schema.num_embeddings == {name: 1 + len(vocabulary) for name, vocabulary in vocabularies.items()}


@pytest.mark.parametrize("min_count", [1, 5])
def test_random_file_row_for_row(tmp_path: Path, write_raw: Write, min_count: int) -> None:
    text = raw_bytes(make_raw_lines(2003, seed=min_count))
    schema = prepare_criteo([write_raw(text, "day.tsv.gz")], tmp_path / "out", min_count=min_count)
    assert_as_computed_independently(tmp_path / "out", text.decode(), min_count)
    assert schema == DatasetSchema.load(tmp_path / "out")
    assert (schema.source, schema.malformed) == ("criteo", 0)


def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks, groups and row groups so small that little data has many of them."""
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(chunks, "GROUP_ROWS", 150)
    for module in (writing, parquet_parts):
        monkeypatch.setattr(module, "ROW_GROUP_ROWS", 40)
    monkeypatch.setattr(pipeline, "RANGE_VALUE_BYTES", 1 << 30)


@pytest.mark.parametrize("name", ["day.tsv", "day.tsv.gz"])
def test_many_blocks_groups_and_ranges(
    tmp_path: Path, write_raw: Write, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_sizes(monkeypatch)
    text = raw_bytes(make_raw_lines(1003))
    schema = prepare_criteo([write_raw(text, name)], tmp_path / "out", min_count=2)
    assert_as_computed_independently(tmp_path / "out", text.decode(), min_count=2)
    assert len(schema.parts["train"]) > 3
    for split, parts in schema.parts.items():
        assert [part.path for part in parts] == [f"{split}/part-{i:05}.parquet" for i in range(len(parts))]
        for part in parts:
            content = (tmp_path / "out" / part.path).read_bytes()
            assert (part.bytes, part.sha256) == (len(content), hashlib.sha256(content).hexdigest())
            assert part.positives == sum(pq.read_table(tmp_path / "out" / part.path)["label"].to_pylist())
            footer = pq.read_metadata(tmp_path / "out" / part.path)
            rows = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
            assert rows[:-1] == [40] * (len(rows) - 1)


def test_processes_change_nothing(tmp_path: Path, write_raw: Write) -> None:
    text = raw_bytes(make_raw_lines(2003))
    files = [write_raw(text, "a.tsv.gz"), write_raw(text[: len(text) // 2], "b.tsv")]
    for processes in (1, 2):
        pipeline.prepare(criteo(2), files, tmp_path / f"{processes}", resources=Resources(processes=processes))
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_paper_s_split_of_one_file(tmp_path: Path, write_raw: Write) -> None:
    """Six sevenths are train; the first half of the seventh day is test, the second half valid."""
    lines = make_raw_lines(71)
    path = write_raw(raw_bytes(lines))
    pipeline.prepare(criteo(1, PAPER_CRITEO_ROWS), [path], tmp_path / "out")
    labels = [int(line[0]) for line in lines]
    for split, expected in (("train", labels[:60]), ("test", labels[60:65]), ("valid", labels[65:])):
        assert [row["label"] for row in written_rows(tmp_path / "out", split)] == expected


def test_paper_s_split_of_day_files(tmp_path: Path, write_raw: Write) -> None:
    lines = make_raw_lines(71)
    days = [lines[:30], lines[30:50], lines[50:]]
    paths = [write_raw(raw_bytes(day), f"day_{i}") for i, day in enumerate(days)]
    pipeline.prepare(criteo(1, PAPER_CRITEO_FILES), paths, tmp_path / "out")
    labels = [int(line[0]) for line in lines]
    for split, expected in (("train", labels[:50]), ("test", labels[50:60]), ("valid", labels[60:])):
        assert [row["label"] for row in written_rows(tmp_path / "out", split)] == expected


def test_random_split_does_not_depend_on_blocks_and_processes(
    tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = make_raw_lines(1000)
    for index, line in enumerate(lines):
        line[1] = str(index)
    spec = criteo(1, SplitRule("random", seed=5))
    pipeline.prepare(spec, [write_raw(raw_bytes(lines))], tmp_path / "a")
    files = [write_raw(raw_bytes(lines[:333]), "1.tsv.gz"), write_raw(b"bad\n" + raw_bytes(lines[333:]), "2.tsv")]
    small_sizes(monkeypatch)
    pipeline.prepare(spec, files, tmp_path / "b")
    pipeline.prepare(criteo(1, SplitRule("random", seed=6)), files, tmp_path / "c")
    rows = {
        name: {s: [row["I1"] for row in written_rows(tmp_path / name, s)] for s in ("train", "valid", "test")}
        for name in "abc"
    }
    assert rows["a"] == rows["b"] != rows["c"]
    assert all(values == sorted(values) for values in rows["a"].values())
    assert sorted(value for values in rows["a"].values() for value in values) == pytest.approx(
        [math.log1p(i) for i in range(1000)]
    )
    assert 760 < len(rows["a"]["train"]) < 840
    assert 70 < len(rows["a"]["test"]) < 130


def test_ids_by_hand(tmp_path: Path, write_raw: Write) -> None:
    """Of ten rows, eight are train, with C1 = b b a a c c c ""; valid holds a, test a value that train does not."""
    lines = make_raw_lines(10)
    for line, value in zip(lines, ["b", "b", "a", "a", "c", "c", "c", "", "a", "new"], strict=True):
        line[14] = value
    prepare_criteo([write_raw(raw_bytes(lines))], tmp_path / "out")
    ids = [row["C1"] for split in ("train", "valid", "test") for row in written_rows(tmp_path / "out", split)]
    assert ids == [3, 3, 2, 2, 1, 1, 1, 4, 2, 0]
    table = pq.read_table(tmp_path / "out/vocabulary/C1.parquet")
    assert table.to_pydict() == {"value": ["c", "a", "b", ""], "count": [3, 2, 2, 1]}


def test_vocabulary_id_depends_on_the_vocabularies_alone(
    tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def id_of(lines: list[RawLine], min_count: int = 1) -> str:
        out = tmp_path / uuid.uuid4().hex
        return prepare_criteo([write_raw(raw_bytes(lines))], out, min_count=min_count).vocabulary_id

    expected = id_of(LINES)
    assert len(expected) == 64
    other_test = [*LINES[:80], *make_raw_lines(20, seed=9)]
    assert id_of(other_test) == expected
    small_sizes(monkeypatch)
    assert id_of(LINES) == expected
    swapped = [[*line[:14], line[15], line[14], *line[16:]] for line in LINES]
    more = [["0", *13 * [""], *26 * ["ffffffff"]], *LINES[1:]]
    assert len({expected, id_of(LINES, 2), id_of(swapped), id_of(more)}) == 4


def test_min_count_that_no_value_reaches(tmp_path: Path, write_raw: Write) -> None:
    schema = prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "out", min_count=2**63 - 1)
    assert set(schema.num_embeddings.values()) == {1}
    assert {row[name] for row in written_rows(tmp_path / "out", "train") for name in SPARSE} == {0}


def test_files_are_read_in_the_given_order(tmp_path: Path, write_raw: Write) -> None:
    later = write_raw(raw_bytes(LINES[60:]), "a.tsv.gz")
    earlier = write_raw(raw_bytes(LINES[:60]), "b.tsv")
    prepare_criteo([earlier, later], tmp_path / "out")
    assert_as_computed_independently(tmp_path / "out", raw_bytes(LINES).decode(), 1)


def test_malformed_lines_are_counted_and_skipped(
    tmp_path: Path, write_raw: Write, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 5_000)
    lines = raw_bytes(LINES).splitlines(keepends=True)
    text = b"".join([b"\xff\n", *lines[:50], lines[0].replace(b"\t", b"\tx\t", 1), *lines[50:], b"cut"])
    path = write_raw(text)
    assert prepare_criteo([path], tmp_path / "out").malformed == 3
    assert_as_computed_independently(tmp_path / "out", raw_bytes(LINES).decode(), 1)
    with (tmp_path / "out/quarantine.jsonl").open() as quarantine:
        found = [json.loads(line) for line in quarantine]
    assert [(each["file"], each["line"], each["reason"]) for each in found] == [
        (str(path), 1, "1 fields instead of 40"),
        (str(path), 52, "41 fields instead of 40"),
        (str(path), 103, "1 fields instead of 40"),
    ]
    assert [found[0]["text"], found[2]["text"]] == ["\\xff", "cut"]
    assert caplog.messages == [
        f"{path}: skipped 3 malformed of 103 lines, e.g. line 1: 1 fields instead of 40; line 52: 41 fields instead of "
        "40; line 103: 1 fields instead of 40"
    ]


def test_few_examples_are_kept(tmp_path: Path, write_raw: Write) -> None:
    prepare_criteo([write_raw(raw_bytes(LINES) + 10 * b"bad\n")], tmp_path / "out")
    assert len((tmp_path / "out/quarantine.jsonl").read_text().splitlines()) == reading.MAX_EXAMPLES


def test_up_to_a_tenth_malformed_is_tolerated(tmp_path: Path, write_raw: Write) -> None:
    good, bad = raw_bytes(make_raw_lines(180)), b"bad\n"
    assert prepare_criteo([write_raw(good + 20 * bad)], tmp_path / "a").malformed == 20
    with pytest.raises(UserError, match=r"day\.tsv: 21 of 201 lines are malformed, e\.g\. line 181: 1 fields"):
        prepare_criteo([write_raw(good + 21 * bad)], tmp_path / "b")
    strict = criteo(1, max_malformed=0.05)
    with pytest.raises(UserError, match=r"20 of 200 lines are malformed"):
        pipeline.prepare(strict, [write_raw(good + 20 * bad)], tmp_path / "b")


def test_up_to_ten_malformed_are_tolerated_in_a_short_file(tmp_path: Path, write_raw: Write) -> None:
    good, bad = raw_bytes(make_raw_lines(10)), b"bad\n"
    assert prepare_criteo([write_raw(good + 10 * bad)], tmp_path / "a").malformed == 10
    with pytest.raises(UserError, match="11 of 21 lines are malformed"):
        prepare_criteo([write_raw(good + 11 * bad)], tmp_path / "b")


def test_malformed_lines_may_all_be_at_the_beginning(
    tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit applies to the file, not to its blocks; reading stops early only for very many malformed lines."""
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 5_000)
    good, bad = raw_bytes(make_raw_lines(180)), b"bad\n"
    assert prepare_criteo([write_raw(20 * bad + good)], tmp_path / "a").malformed == 20
    monkeypatch.setattr(reading, "EXPECTED_LINES", 150)
    with pytest.raises(UserError, match=r"20 of the first [3-5][0-9] lines are malformed, e\.g\. line 1: 1 fields"):
        prepare_criteo([write_raw(20 * bad + good)], tmp_path / "b")


def test_no_share_malformed_still_allows_ten(tmp_path: Path, write_raw: Write) -> None:
    good, bad, none = raw_bytes(make_raw_lines(180)), b"bad\n", criteo(1, max_malformed=0)
    found = pipeline.prepare(none, [write_raw(10 * bad + good)], tmp_path / "a")
    assert found is not None
    assert found.malformed == 10
    with pytest.raises(UserError, match=r"11 of the first 191 lines are malformed"):
        pipeline.prepare(none, [write_raw(good + 11 * bad)], tmp_path / "b")


def test_a_file_of_another_format(tmp_path: Path, write_raw: Write) -> None:
    with pytest.raises(UserError, match=r"3 of 3 lines are malformed, e\.g\. line 1: 1 fields instead of 40"):
        prepare_criteo([write_raw(b"id,click\n1,0\n2,1\n")], tmp_path / "out")


def test_nothing_but_the_data_set_is_made(tmp_path: Path, write_raw: Write) -> None:
    out = tmp_path / "deep/er/out"
    prepare_criteo([write_raw(raw_bytes(LINES))], out)
    assert sorted(p.name for p in out.iterdir()) == [
        *("manifest.json", "quarantine.jsonl", "schema.json", "test", "train", "valid", "vocabulary")
    ]
    assert list(out.parent.iterdir()) == [out]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


def test_empty_directory_may_be_filled(tmp_path: Path, write_raw: Write) -> None:
    (tmp_path / "out").mkdir()
    prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "out")
    assert DatasetSchema.load(tmp_path / "out").rows["train"] == 80


def test_out_that_is_not_empty_is_refused_and_kept(tmp_path: Path, write_raw: Write) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    with pytest.raises(UserError, match="out: exists and is not empty"):
        prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "out")
    assert (tmp_path / "out/mine").read_text() == "precious"
    with pytest.raises(UserError, match="mine: is a file"):
        prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "out/mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]


@pytest.mark.skipif(not REAL_SAMPLE.exists(), reason="the real Criteo sample (../shared/data) is not here")
def test_real_sample(tmp_path: Path) -> None:
    schema = prepare_criteo([REAL_SAMPLE], tmp_path / "out", min_count=3)
    with gzip.open(REAL_SAMPLE, "rt", newline="") as text:
        lines = list(csv.reader(text, delimiter="\t", quoting=csv.QUOTE_NONE))
    first, second = len(lines) * 8 // 10, len(lines) * 9 // 10
    splits = {"train": lines[:first], "valid": lines[first:second], "test": lines[second:]}
    assert schema.malformed == 0
    tables = {}
    for split, part in splits.items():
        assert schema.rows[split] == len(part)
        assert schema.positive_rate[split] == sum(line[0] == "1" for line in part) / len(part)
        paths = [tmp_path / "out" / each.path for each in schema.parts[split]]
        tables[split] = pa.concat_tables([pq.read_table(path) for path in paths])
        assert tables[split]["label"].to_pylist() == [int(line[0]) for line in part]
        for index, name in enumerate(DENSE, start=1):
            expected = np.log1p(np.array([max(int(line[index] or 0), 0) for line in part])).astype(np.float32)
            assert np.array_equal(tables[split][name].to_numpy(), expected)
    for index, name in enumerate(SPARSE, start=14):
        counts = Counter(line[index] for line in splits["train"])
        kept = sorted((-count, value) for value, count in counts.items() if count >= 3)
        vocabulary = pq.read_table(tmp_path / "out/vocabulary" / f"{name}.parquet").to_pydict()
        assert vocabulary == {"value": [value for _, value in kept], "count": [-count for count, _ in kept]}
        assert schema.num_embeddings[name] == 1 + len(kept)
        ids = {value: id for id, (_, value) in enumerate(kept, start=1)}
        for split, part in splits.items():
            assert tables[split][name].to_pylist() == [ids.get(line[index], 0) for line in part]
