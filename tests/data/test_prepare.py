"""Tests of mlet_dist.data.prepare, parts and staging."""

import csv
import gzip
import hashlib
import io
import math
import os
import stat
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mlet_dist.data import criteo, parts, prepare
from mlet_dist.data.prepare import prepare_criteo
from mlet_dist.data.schema import DatasetSchema, Part
from mlet_dist.errors import UserError
from tests.data.raw_logs import COLUMNS, RawLine, make_raw_lines, raw_bytes

Write = Callable[..., Path]
Row = dict[str, int | float]

DENSE, SPARSE = COLUMNS[1:14], COLUMNS[14:]
REAL_SAMPLE = Path(__file__).parents[3] / "shared/data/criteo_137k.tsv.gz"
LINES = make_raw_lines(100)


def independently(text: str, min_count: int) -> tuple[dict[str, list[Row]], dict[str, list[tuple[str, int]]]]:
    """What prepare should give, by the standard library alone: the rows of each split and the vocabularies."""
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


def test_many_blocks_merges_and_parts(tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes so small that everything which happens only to large data happens here; the result is the same."""
    monkeypatch.setattr(criteo, "BLOCK_BYTES", 10_000)
    monkeypatch.setattr(prepare, "PART_ROWS", 70)
    monkeypatch.setattr(prepare, "MERGE_ROWS", 50)
    monkeypatch.setattr(parts, "PART_ROWS", 150)
    monkeypatch.setattr(parts, "ROW_GROUP_ROWS", 40)
    text = raw_bytes(make_raw_lines(1003))
    schema = prepare_criteo([write_raw(text)], tmp_path / "out", min_count=2)
    assert_as_computed_independently(tmp_path / "out", text.decode(), min_count=2)
    assert [part.rows for part in schema.parts["train"]] == [150] * 5 + [52]
    last = (tmp_path / "out/train/part-00005.parquet").read_bytes()
    positives = sum(row["label"] for row in written_rows(tmp_path / "out", "train")[750:])
    assert schema.parts["train"][5] == Part(
        "train/part-00005.parquet", 52, positives, len(last), hashlib.sha256(last).hexdigest()
    )
    footer = pq.read_metadata(tmp_path / "out/train/part-00000.parquet")
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [40, 40, 40, 30]


def test_ids_by_hand(tmp_path: Path, write_raw: Write) -> None:
    """Ten rows, eight of them train: C1 is b b a a c c c "" there; valid holds a, test a value never seen."""
    lines = make_raw_lines(10)
    for line, value in zip(lines, ["b", "b", "a", "a", "c", "c", "c", "", "a", "new"], strict=True):
        line[14] = value
    prepare_criteo([write_raw(raw_bytes(lines))], tmp_path / "out")
    ids = [row["C1"] for split in ("train", "valid", "test") for row in written_rows(tmp_path / "out", split)]
    assert ids == [3, 3, 2, 2, 1, 1, 1, 4, 2, 0]
    table = pq.read_table(tmp_path / "out/vocabulary/C1.parquet")
    assert table.to_pydict() == {"value": ["c", "a", "b", ""], "count": [3, 2, 2, 1]}


def test_vocabulary_id_is_that_of_the_vocabularies(
    tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def id_of(lines: list[RawLine], min_count: int = 1) -> str:
        out = tmp_path / uuid.uuid4().hex
        return prepare_criteo([write_raw(raw_bytes(lines))], out, min_count=min_count).vocabulary_id

    expected = id_of(LINES)
    assert len(expected) == 64
    other_test = [*LINES[:80], *make_raw_lines(20, seed=9)]
    assert id_of(other_test) == expected
    monkeypatch.setattr(prepare, "MERGE_ROWS", 7)
    assert id_of(LINES) == expected
    swapped = [[*line[:14], line[15], line[14], *line[16:]] for line in LINES]
    more = [["0", *13 * [""], *26 * ["ffffffff"]], *LINES[1:]]
    assert len({expected, id_of(LINES, 2), id_of(swapped), id_of(more)}) == 4


def test_min_count_that_no_value_reaches(tmp_path: Path, write_raw: Write) -> None:
    schema = prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "out", min_count=2**63 - 1)
    assert set(schema.num_embeddings.values()) == {1}
    assert {row[name] for row in written_rows(tmp_path / "out", "train") for name in SPARSE} == {0}


def test_leftovers_of_a_killed_run_are_named_and_kept(
    tmp_path: Path, write_raw: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    leftovers = [tmp_path / f".o[u]t.{end}.tmp" for end in ("0123abcd", "89abcdef")]
    for path in (*leftovers, tmp_path / ".other.0123abcd.tmp", tmp_path / ".o[u]t.mine.tmp"):
        path.mkdir()
    prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "o[u]t")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        f"mlet: warning: {leftovers[0]}, {leftovers[1]}: left by a killed run, unless another process writes "
        f"{tmp_path}/o[u]t now; if none is, remove by hand"
    ]
    assert all(path.is_dir() for path in leftovers)
    prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "out")
    assert "warning" not in capsys.readouterr().err


def test_files_are_taken_in_the_order_given(tmp_path: Path, write_raw: Write) -> None:
    later = write_raw(raw_bytes(LINES[60:]), "a.tsv.gz")
    earlier = write_raw(raw_bytes(LINES[:60]), "b.tsv")
    prepare_criteo([earlier, later], tmp_path / "out")
    assert_as_computed_independently(tmp_path / "out", raw_bytes(LINES).decode(), 1)


def test_malformed_lines_count_and_take_no_part(tmp_path: Path, write_raw: Write) -> None:
    lines = raw_bytes(LINES).splitlines(keepends=True)
    path = write_raw(b"".join([b"\xff\n", *lines[:50], lines[0].replace(b"\t", b"\tx\t", 1), *lines[50:], b"cut"]))
    assert prepare_criteo([path], tmp_path / "out").malformed == 3
    assert_as_computed_independently(tmp_path / "out", raw_bytes(LINES).decode(), 1)


def test_nothing_but_the_data_set_is_made(tmp_path: Path, write_raw: Write) -> None:
    out = tmp_path / "deep/er/out"
    prepare_criteo([write_raw(raw_bytes(LINES))], out)
    assert sorted(p.name for p in out.iterdir()) == ["schema.json", "test", "train", "valid", "vocabulary"]
    assert list(out.parent.iterdir()) == [out]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


def test_empty_directory_may_be_filled(tmp_path: Path, write_raw: Write) -> None:
    (tmp_path / "out").mkdir()
    prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "out")
    assert DatasetSchema.load(tmp_path / "out").rows["train"] == 80


@pytest.fixture
def nothing_changes(tmp_path: Path) -> Iterator[None]:
    """Whatever the test does, the files of tmp_path (raw/ aside) are the same afterwards."""

    def files() -> list[Path]:
        return sorted(p for p in tmp_path.rglob("*") if "raw" not in p.relative_to(tmp_path).parts)

    before = files()
    yield
    assert files() == before


@pytest.mark.usefixtures("nothing_changes")
class TestFailures:
    """Each leaves neither ``out`` nor a temporary directory nor a parent behind."""

    def test_truncated_gzip(self, tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(criteo, "BLOCK_BYTES", 2000)  # so that rows are staged before the end is found missing
        path = write_raw(raw_bytes(LINES), "day.tsv.gz")
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(UserError, match=f"{path}: truncated or corrupt gzip file"):
            prepare_criteo([path], tmp_path / "out")

    def test_missing_file_is_named_before_any_is_read(self, tmp_path: Path, write_raw: Write) -> None:
        with pytest.raises(UserError, match=r"nowhere\.tsv: cannot be read"):
            prepare_criteo([write_raw(b"malformed"), tmp_path / "nowhere.tsv"], tmp_path / "new/out")

    def test_second_file_empty(self, tmp_path: Path, write_raw: Write) -> None:
        with pytest.raises(UserError, match=r"b\.tsv: is empty"):
            prepare_criteo([write_raw(raw_bytes(LINES)), write_raw(b"", "b.tsv")], tmp_path / "out")

    def test_too_few_rows(self, tmp_path: Path, write_raw: Write) -> None:
        with pytest.raises(UserError, match="9 rows are too few"):
            prepare_criteo([write_raw(raw_bytes(LINES[:9]))], tmp_path / "out")

    @pytest.mark.parametrize("min_count", [0, 2**63, 10**25])
    def test_min_count(self, tmp_path: Path, write_raw: Write, min_count: int) -> None:
        with pytest.raises(UserError, match=f"min_count is {min_count}; it must be at least 1 and at most {2**63 - 1}"):
            prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "out", min_count=min_count)

    @pytest.mark.parametrize("out", ["", ".", "./"])
    def test_current_directory(
        self, tmp_path: Path, write_raw: Write, out: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_raw(raw_bytes(LINES))
        (path.parent / "empty").mkdir()
        monkeypatch.chdir(path.parent / "empty")
        with pytest.raises(UserError, match="out is empty or the current directory; name a directory"):
            prepare_criteo([path], Path(out))
        assert sorted(p.name for p in path.parent.rglob("*")) == ["day.tsv", "empty"]

    def test_no_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no raw file"):
            prepare_criteo([], tmp_path / "out")

    def test_interrupt(self, tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(*_: object) -> None:
            assert list(tmp_path.glob("new/.out.*.tmp/train"))  # it does come while there is something to remove
            raise KeyboardInterrupt

        monkeypatch.setattr(prepare, "_encode", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "new/out")

    def test_parent_is_a_file(self, tmp_path: Path, write_raw: Write) -> None:
        path = write_raw(raw_bytes(LINES))
        with pytest.raises(UserError, match="out: cannot be written: Not a directory"):
            prepare_criteo([path], path / "out")

    @pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs /proc")
    def test_mount_point(self, write_raw: Write) -> None:
        with pytest.raises(UserError, match="/proc: is a mount point"):
            prepare_criteo([write_raw(raw_bytes(LINES))], Path("/proc"))


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
    with gzip.open(REAL_SAMPLE, "rt", newline="\n") as text:
        lines = [line.rstrip("\n").split("\t") for line in text]
    first, second = len(lines) * 8 // 10, len(lines) * 9 // 10
    splits = {"train": lines[:first], "valid": lines[first:second], "test": lines[second:]}
    assert schema.malformed == 0
    for split, part in splits.items():
        assert schema.rows[split] == len(part)
        assert schema.positive_rate[split] == pytest.approx(sum(line[0] == "1" for line in part) / len(part))
        table = pq.read_table(tmp_path / "out" / schema.parts[split][0].path)
        for index, name in enumerate(SPARSE, start=14):
            counts = Counter(line[index] for line in splits["train"])
            vocabulary = pq.read_table(tmp_path / "out/vocabulary" / f"{name}.parquet")
            kept = {value: count for value, count in counts.items() if count >= 3}
            values = vocabulary["value"].to_pylist()
            assert dict(zip(values, vocabulary["count"].to_pylist(), strict=True)) == kept
            assert schema.num_embeddings[name] == 1 + len(kept)
            decoded = [values[id - 1] if id else None for id in table[name].to_pylist()]
            assert decoded == [line[index] if line[index] in kept else None for line in part]
        for index, name in enumerate(DENSE, start=1):
            mean = sum(math.log1p(max(int(line[index] or 0), 0)) for line in part) / len(part)
            assert table[name].to_numpy().mean(dtype="float64") == pytest.approx(mean, rel=1e-5)
