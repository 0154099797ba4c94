"""Tests of mlet_dist.data.prepare.raw_blocks, raw_files, parsing and typed_columns on raw Criteo logs."""

import gzip
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlet_dist.data.prepare import compression, raw_blocks
from mlet_dist.data.prepare.chunks import Rejected
from mlet_dist.data.prepare.parsing import parse_block
from mlet_dist.data.prepare.raw_blocks import text_blocks
from mlet_dist.data.prepare.raw_files import RawFile, inspect_file
from mlet_dist.data.prepare.raw_formats import CRITEO_COLUMNS as COLUMNS
from mlet_dist.data.prepare.raw_formats import CRITEO_DENSE as DENSE
from mlet_dist.data.prepare.raw_formats import CRITEO_SPARSE as SPARSE
from mlet_dist.data.prepare.raw_formats import LABEL, criteo
from mlet_dist.errors import UserError
from tests.helpers.raw_logs import make_raw_lines, raw_bytes

Write = Callable[..., Path]

LINES = make_raw_lines(200)


@dataclass
class Found:
    """The valid rows of a file, and the reported malformed lines, numbered from the start of the file."""

    table: pa.Table
    lines: int
    malformed: int
    examples: list[Rejected]


def read(path: Path) -> Found:
    spec = criteo()
    raw = inspect_file(str(path), spec.text, spec.used_columns)
    tables, examples, lines, malformed, passed = [], [], 0, 0, 0
    for block in text_blocks(raw, lambda _: None):
        table, info = parse_block(spec, raw.columns, block)
        assert table.num_rows == info.rows == info.count - info.malformed
        columns = [c.cast(pa.string()) if pa.types.is_dictionary(c.type) else c for c in table.columns]
        tables.append(pa.table(columns, names=[name.rpartition(".")[2] for name in table.column_names]))
        examples += [Rejected(passed + each.line, each.reason, each.text) for each in info.examples]
        lines, malformed, passed = lines + info.count, malformed + info.malformed, passed + info.passed
    return Found(pa.concat_tables(tables), lines, malformed, examples)


def expected(lines: list[list[str]]) -> list[dict[str, object]]:
    rows = []
    for line in lines:
        row: dict[str, object] = {LABEL: int(line[0])}
        for name, text in zip(DENSE, line[1:14], strict=True):
            row[name] = pytest.approx(math.log(1 + max(int(text or 0), 0)), rel=1e-6)
        rows.append(row | dict(zip(SPARSE, line[14:], strict=True)))
    return rows


@pytest.mark.parametrize("name", ["day.tsv", "day.tsv.gz"])
def test_values_and_types(write_raw: Write, name: str) -> None:
    found = read(write_raw(raw_bytes(LINES), name))
    assert found.table.to_pylist() == expected(LINES)
    assert found.table.schema == pa.schema(
        [(LABEL, pa.int8()), *((n, pa.float32()) for n in DENSE), *((n, pa.string()) for n in SPARSE)]
    )
    assert (found.lines, found.malformed) == (200, 0)


def test_gzip_is_recognised_without_its_ending(write_raw: Write) -> None:
    found = read(write_raw(gzip.compress(raw_bytes(LINES)), "day"))
    assert found.table.num_rows == 200


def test_several_gzip_members_are_one_text(write_raw: Write) -> None:
    path = write_raw(raw_bytes(LINES[:90]), "day.gz")
    path.write_bytes(path.read_bytes() + gzip.compress(raw_bytes(LINES[90:])))
    assert read(path).table.to_pylist() == expected(LINES)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda text: text.replace(b"\n", b"\r\n"), id="CRLF"),
        pytest.param(lambda text: text[:-1], id="no newline at the end"),
        pytest.param(lambda text: text.replace(b"\n", b"\r\n")[:-2], id="CRLF, none at the end"),
        pytest.param(lambda text: b"\n\n" + text.replace(b"\n", b"\n\n"), id="blank lines"),
        pytest.param(lambda text: text + b"\r\n\r\n", id="blank CRLF lines at the end"),
        pytest.param(lambda text: b"\xef\xbb\xbf" + text, id="byte order mark"),
    ],
)
def test_line_ends_and_blank_lines_change_nothing(write_raw: Write, change: Callable[[bytes], bytes]) -> None:
    found = read(write_raw(change(raw_bytes(LINES))))
    assert found.table.to_pylist() == expected(LINES)
    assert (found.lines, found.malformed) == (200, 0)


def test_quotes_and_backslashes_are_ordinary(write_raw: Write) -> None:
    line = LINES[0].copy()
    line[14:17] = ['"', "\\", 'a"b']
    assert read(write_raw(raw_bytes([line]))).table.to_pylist() == expected([line])


def _line(index: int, **changes: str) -> bytes:
    fields = dict(zip(COLUMNS, LINES[index], strict=True)) | changes
    return "\t".join(fields.values()).encode()


MALFORMED = {
    "39 fields": (b"\t".join(_line(5).split(b"\t")[:39]), "39 fields instead of 40"),
    "41 fields": (_line(5) + b"\tdeadbeef", "41 fields instead of 40"),
    "one field": (b"what", "1 fields instead of 40"),
    "header": ("\t".join(COLUMNS).encode(), "label is 'label' instead of 0 or 1"),
    "not UTF-8": (_line(5).replace(b"\t", b"\t\xff", 20), "byte 0xff is not UTF-8"),
    "39 fields, not UTF-8": (b"\t".join(_line(5).split(b"\t")[:38]) + b"\t\xff", "39 fields instead of 40"),
    "label 2": (_line(5, label="2"), "label is '2' instead of 0 or 1"),
    "no label": (_line(5, label=""), "label is '' instead of 0 or 1"),
    "letters in I3": (_line(5, I3="1e3"), "I3 is '1e3' instead of an integer"),
    "hexadecimal I3": (_line(5, I3="0x1f"), "I3 is '0x1f' instead of an integer"),
    "spaces in I3": (_line(5, I3="1 7"), "I3 is '1 7' instead of an integer"),
    "endless I13": (_line(5, I13="9" * 60), f"I13 is '{'9' * 40}…' instead of an integer"),
    "NUL": (_line(5, C4="a\0b"), "a NUL byte within the line"),
    "stray carriage return": (_line(5, C4="ab\rcd"), "a carriage return within the line"),
}


@pytest.mark.parametrize("position", [0, 100, 200], ids=["first", "middle", "last"])
@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed_line_is_skipped_counted_and_named(write_raw: Write, kind: str, position: int) -> None:
    bad, reason = MALFORMED[kind]
    lines = raw_bytes(LINES).splitlines()
    path = write_raw(b"\n".join([*lines[:position], bad, *lines[position:]]))
    found = read(path)
    assert found.table.to_pylist() == expected(LINES)
    assert (found.lines, found.malformed) == (201, 1)
    [example] = found.examples
    assert (example.line, example.reason) == (position + 1, reason)
    assert example.text == bad[:200].decode(errors="backslashreplace")


def test_line_of_ten_megabytes(write_raw: Write) -> None:
    long = _line(5, C4=10**7 * "x")
    found = read(write_raw(raw_bytes(LINES[:3]) + long + b"\n" + raw_bytes(LINES[3:])))
    assert found.table.to_pylist() == expected(LINES)
    assert found.examples == [
        Rejected(4, f"a line of {len(long)} bytes; at most 1048575 are allowed", long[:200].decode())
    ]


@pytest.mark.parametrize("name", ["day.tsv", "day.tsv.gz"])
def test_line_number_counts_blank_lines_and_earlier_blocks(
    write_raw: Write, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 1000)
    lines = raw_bytes(LINES).splitlines()
    path = write_raw(b"\n".join([b"", *lines[:150], b"", b"bad", *lines[150:]]), name)
    found = read(path)
    assert found.table.to_pylist() == expected(LINES)
    assert found.examples == [Rejected(153, "1 fields instead of 40", "bad")]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(data=st.data(), block=st.integers(1, 3000), name=st.sampled_from(["day.tsv", "day.tsv.gz"]))
def test_any_mixture_of_lines_and_any_block_size(write_raw: Write, data: st.DataObject, block: int, name: str) -> None:
    """The valid lines are read in order, however the text is cut into blocks."""
    choices = st.one_of(st.integers(0, 199), st.sampled_from([bad for bad, _ in MALFORMED.values()]), st.just(b""))
    chosen = data.draw(st.lists(choices, min_size=1, max_size=12))
    good = [LINES[i] for i in chosen if isinstance(i, int)]
    text = b"\n".join(raw_bytes([LINES[i]])[:-1] if isinstance(i, int) else i for i in chosen)
    ending = data.draw(st.sampled_from([b"", b"\n", b"\r\n"]))
    path = write_raw(raw_bytes(LINES[:1]) + text + ending, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_blocks, "BLOCK_BYTES", block + 500)  # a line must fit
        found = read(path)
    assert found.table.to_pylist() == expected([LINES[0], *good])
    assert found.malformed == sum(isinstance(i, bytes) and i != b"" for i in chosen)


@pytest.mark.parametrize("name", ["day.tsv", "day.tsv.gz"])
def test_endless_line(write_raw: Write, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 1000)
    with pytest.raises(UserError, match=rf"{name}: after byte 0, a line has more than 1000 bytes"):
        read(write_raw(b"x" * 5000, name))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    members=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 3)), min_size=1, max_size=4),
    block=st.integers(100, 2000),
    piece=st.integers(1, 500),
    cut=st.integers(0, 60),
)
def test_any_gzip_members_and_any_sizes(
    write_raw: Write, members: list[tuple[int, int]], block: int, piece: int, cut: int
) -> None:
    """Members with and without text, with zeros after them; and the same file without its last bytes."""
    text = b"".join(size * b"0123456\n" for size, _ in members)
    content = b"".join(gzip.compress(size * b"0123456\n") + zeros * b"\0" for size, zeros in members)
    path = write_raw(b"", "a.gz")
    path.write_bytes(content)
    raw = RawFile(str(path), len(content), "", ())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_blocks, "BLOCK_BYTES", block)
        patch.setattr(compression, "READ_BYTES", piece)
        found = list(text_blocks(raw, lambda _: None))
        assert b"".join(each.data or b"" for each in found) == text
        assert all((each.data or b"").endswith(b"\n") and each.stop - each.start <= 2 * block for each in found)
        last = len(gzip.compress(members[-1][0] * b"0123456\n")) + members[-1][1]
        if members[-1][1] < cut < last - 1:  # from two bytes on, the rest is recognised as gzip
            path.write_bytes(content[:-cut])
            with pytest.raises(UserError, match="truncated or corrupt gzip file"):
                list(text_blocks(raw, lambda _: None))


@pytest.mark.parametrize("kept", [0.5, 0.999])
def test_truncated_gzip(write_raw: Write, kept: float) -> None:
    path = write_raw(raw_bytes(LINES), "day.tsv.gz")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=f"{path}: truncated or corrupt gzip file"):
        read(path)


def test_corrupt_gzip(write_raw: Write) -> None:
    path = write_raw(raw_bytes(LINES), "day.tsv.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: truncated or corrupt gzip file"):
        read(path)


def test_named_gz_but_is_not(write_raw: Write) -> None:
    path = write_raw(b"", "day.tsv.gz")
    path.write_bytes(raw_bytes(LINES))
    assert read(path).table.to_pylist() == expected(LINES)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.tsv: cannot be read: No such file"):
        read(tmp_path / "nowhere.tsv")


def test_directory_instead_of_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be read: Is a directory"):
        read(tmp_path)


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux: a file that opens but cannot be read")
def test_unreadable_file() -> None:
    with pytest.raises(UserError, match="/proc/self/mem: cannot be read: Input/output error"):
        read(Path("/proc/self/mem"))
