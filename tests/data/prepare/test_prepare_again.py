"""`mlet prepare` with other arguments reuses those results of an earlier run that they do not affect, and no others."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.prepare.pipeline import PASSES, prepare
from mlet_dist.data.prepare.raw_formats import TableSpec, criteo
from mlet_dist.data.prepare.splits import PAPER_CRITEO_ROWS, SplitRule
from mlet_dist.errors import UserError
from tests.helpers.raw_logs import make_raw_lines, raw_bytes

Write = Callable[..., Path]

LINES = make_raw_lines(100)
BASE = criteo(2, PAPER_CRITEO_ROWS)
ROWS, FEATURES = 100, 26


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def reported(capsys: pytest.CaptureFixture[str]) -> dict[str, int]:
    """Return the work that each pass reported: bytes read, rows counted, vocabularies merged, rows written."""
    found = re.findall(r"^(\w+) ([\d,]+)/([\d,]+) ", capsys.readouterr().err, re.MULTILINE)
    assert all(done == total for _, done, total in found)
    return {name: int(total.replace(",", "")) for name, _, total in found}


def first_sparse(spec: TableSpec, **changes: object) -> TableSpec:
    return replace(spec, sparse=(replace(spec.sparse[0], **changes), *spec.sparse[1:]))  # type: ignore[arg-type]


HASHED = first_sparse(BASE, encoding="hash", num_embeddings=7, min_count=1)


@pytest.mark.parametrize(
    ("before", "after", "redone"),
    [
        (BASE, BASE, (False, 0, 0, 0)),
        (BASE, replace(BASE, max_malformed=0.5), (False, 0, 0, 0)),
        (BASE, criteo(5, PAPER_CRITEO_ROWS), (False, 0, FEATURES, ROWS)),
        (BASE, first_sparse(BASE, min_count=5), (False, 0, 1, ROWS)),
        (HASHED, first_sparse(HASHED, num_embeddings=8), (False, 0, 0, ROWS)),
        (HASHED, BASE, (False, ROWS, FEATURES, ROWS)),
        (BASE, criteo(2, SplitRule("random")), (False, ROWS, FEATURES, ROWS)),
        (criteo(2, SplitRule("random")), criteo(2, SplitRule("random", seed=1)), (False, ROWS, FEATURES, ROWS)),
        (BASE, first_sparse(BASE, column="C2"), (True, ROWS, FEATURES, ROWS)),
        (BASE, replace(BASE, dense=(replace(BASE.dense[0], transform="raw"),)), (True, ROWS, FEATURES, ROWS)),
        (BASE, replace(BASE, split=SplitRule("time", column="I1")), (True, ROWS, FEATURES, ROWS)),
    ],
    ids=[
        *("nothing", "max_malformed", "min_count", "min_count_of_one", "table_size", "encoding"),
        *("split", "seed", "column", "transform", "time_column"),
    ],
)
def test_only_what_an_argument_affects_is_redone(
    tmp_path: Path,
    write_raw: Write,
    capsys: pytest.CaptureFixture[str],
    before: TableSpec,
    after: TableSpec,
    redone: tuple[bool, int, int, int],
) -> None:
    lines = [[*line[:1], str(index), *line[2:]] for index, line in enumerate(LINES)]  # I1 can serve as a time
    raw = [write_raw(raw_bytes(lines[:60]), "a.tsv.gz"), write_raw(b"bad\n" + raw_bytes(lines[60:]), "b.tsv")]
    for name in PASSES[:-1]:
        prepare(before, raw, tmp_path / "out", only=name)
    size = sum(path.stat().st_size for path in raw)
    read, *others = redone
    assert reported(capsys) == dict(zip(PASSES, (size, ROWS, len(_counted(before)), ROWS), strict=False))
    prepare(after, raw, tmp_path / "out")
    expected = dict(zip(PASSES, (size if read else 0, *others), strict=False))
    # Parts that an earlier process wrote are verified.
    assert reported(capsys) == expected | ({} if expected["write"] else {"verify": ROWS})
    prepare(after, raw, tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")
    assert check(tmp_path / "out").malformed == 1


def _counted(spec: TableSpec) -> list[str]:
    return [sparse.name for sparse in spec.sparse if sparse.encoding == "vocabulary"]


def test_malformed_lines_are_checked_with_the_limit_of_each_run(
    tmp_path: Path, write_raw: Write, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A run with a higher or a lower limit on malformed lines does not read the file again."""
    raw = write_raw(20 * b"bad\n" + raw_bytes(LINES))
    strict, lax = criteo(1, max_malformed=0.1), criteo(1, max_malformed=0.2)
    refusal = r"day\.tsv: 20 of 120 lines are malformed, e\.g\. line 1: 1 fields .* \(finished work is kept in "
    with pytest.raises(UserError, match=refusal):
        prepare(strict, [raw], tmp_path / "out")
    assert reported(capsys) == {"read": raw.stat().st_size}
    assert caplog.messages == []
    prepare(lax, [raw], tmp_path / "out", only="read")
    assert reported(capsys) == {"read": 0}
    assert [message[:60] for message in caplog.messages] == [f"{raw}: skipped 20 malformed of 120 lines"[:60]]
    for name in ("read", "count", "merge"):
        with pytest.raises(UserError, match=refusal):
            prepare(strict, [raw], tmp_path / "out", only=name)
    prepare(lax, [raw], tmp_path / "out")
    prepare(lax, [raw], tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


def test_an_interrupted_merge_leaves_nothing_for_other_arguments(
    tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vocabularies that it copied belong to its own data set only."""
    raw = write_raw(raw_bytes(LINES))
    for name in PASSES[:-1]:
        prepare(HASHED, [raw], tmp_path / "out", only=name)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mlet_dist.data.prepare.dataset_manifest.save_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(HASHED, [raw], tmp_path / "out", only="merge")
    other = first_sparse(HASHED, num_embeddings=8)
    prepare(other, [raw], tmp_path / "out")
    prepare(other, [raw], tmp_path / "fresh")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("how", ["same", "relative", "symlink", "hard link", "url"])
def test_a_file_that_is_given_twice(
    tmp_path: Path, write_raw: Write, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, other = write_raw(raw_bytes(LINES)), write_raw(raw_bytes(LINES), "other.tsv")
    again: Path | str = raw
    if how == "relative":
        monkeypatch.chdir(raw.parent)
        again = raw.name
    elif how == "url":
        again = f"file:{'//'}{raw}"
    elif how != "same":
        again = raw.parent / "link.tsv"
        again.symlink_to(raw) if how == "symlink" else again.hardlink_to(raw)
    also = "" if how == "same" else f", also as {raw}"
    with pytest.raises(UserError) as caught:
        prepare(BASE, [raw, other, again], tmp_path / "out")  # type: ignore[list-item]
    assert str(caught.value) == f"{again}: is given twice{also}; give each raw file once"
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]
    prepare(BASE, [raw, other], tmp_path / "out")  # the same text is not the same file


def test_a_remote_file_that_is_given_twice(tmp_path: Path) -> None:
    with fsspec.open("memory://again/day.tsv", "wb") as file:
        file.write(raw_bytes(LINES))
    with pytest.raises(UserError, match=r"^memory:///again/day\.tsv: is given twice, also as memory://again/day\.tsv;"):
        prepare(BASE, ["memory://again/day.tsv", "memory:///again/day.tsv"], tmp_path / "out")
