"""Tests of encodings of raw text: byte order marks, the key ``encoding``, and what is said without it."""

import codecs
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlet_dist.data.prepare import raw_blocks
from mlet_dist.data.prepare.raw_blocks import text_blocks
from mlet_dist.data.prepare.raw_files import RawFile
from mlet_dist.data.prepare.text_encoding import to_utf8
from mlet_dist.errors import UserError
from tests.helpers.tables import PLAIN, prepare_table, values_of

VALUES = ["café", "naïve", "plain", "Zürich", "smörgås"]
TEXT = "y,x\n" + "".join(f"{i % 2},{VALUES[i % 5]}\n" for i in range(40))


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (TEXT.encode("utf-8-sig"), None),
        (TEXT.encode("utf-16"), None),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), None),
        (TEXT.encode("utf-32"), None),
        (TEXT.replace("\n", "\r\n").encode("utf-16"), None),
        (gzip.compress(TEXT.encode("utf-16"), mtime=0), None),
        (TEXT.encode("latin-1"), "latin-1"),
        (TEXT.encode("cp1252"), "Windows-1252"),
        (gzip.compress(TEXT.encode("cp1252"), mtime=0), "cp1252"),
        (TEXT.encode("utf-16-le"), "utf-16-le"),
        (TEXT.encode("utf-16"), "latin-1"),  # a byte order mark is no text
        (TEXT.encode("utf-8-sig"), "cp1252"),
        (TEXT.encode(), "utf-8"),
    ],
)
def test_any_encoding_gives_the_same_values(
    content: bytes, encoding: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 101)  # cuts characters of several bytes
    (tmp_path / "a.csv").write_bytes(content)
    prepare_table(tmp_path / "out", PLAIN | ({} if encoding is None else {"encoding": encoding}), [tmp_path / "a.csv"])
    assert values_of(tmp_path / "out") == [VALUES[i % 5] for i in range(40)]


@settings(deadline=None)
@given(
    text=st.text(max_size=40),
    encoding=st.sampled_from(["utf-16", "utf-16-le", "utf-32", "shift_jis", "gb18030", "latin-1"]),
    size=st.integers(1, 9),
)
def test_text_is_converted_however_it_is_cut(text: str, encoding: str, size: int) -> None:
    content = text.encode(encoding, "ignore")
    pieces = [content[i : i + size] for i in range(0, len(content), size)]
    assert b"".join(to_utf8(pieces, encoding)).decode() == content.decode(encoding)


@pytest.mark.parametrize(
    ("encoding", "bad"), [("cp1252", b"\x81"), ("utf-16-le", b"\x00\xdc"), ("ascii", "é".encode()), ("cp1252", b"\x9d")]
)
def test_what_is_not_of_the_encoding_is_malformed(encoding: str, bad: bytes, tmp_path: Path) -> None:
    lines = [f"{i % 2},v{i}\n".encode(encoding) for i in range(40)]
    lines[20] = "1,".encode(encoding) + bad + "\n".encode(encoding)
    (tmp_path / "a.csv").write_bytes("y,x\n".encode(encoding) + b"".join(lines))
    assert prepare_table(tmp_path / "out", PLAIN | {"encoding": encoding}, [tmp_path / "a.csv"]).malformed == 1
    [found] = map(json.loads, (tmp_path / "out/quarantine.jsonl").read_text().splitlines())
    assert (found["line"], found["reason"]) == (22, f"the line is not {encoding} text")


def test_the_key_is_named_if_some_lines_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_bytes(b"y,x\n" + 20 * b"1,a\n0,a\n" + "1,é\n".encode("latin-1"))
    assert prepare_table(tmp_path / "out", PLAIN, [tmp_path / "a.csv"]).malformed == 1
    [record] = caplog.records
    assert record.getMessage().endswith(
        "skipped 1 malformed of 41 lines, e.g. line 42: byte 0xe9 is not UTF-8 (set `encoding` in the description, "
        "such as cp1252 or latin-1)"
    )


def test_the_key_is_named_where_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(TEXT.encode("latin-1"))
    with pytest.raises(UserError, match=r"32 of 40 lines .* byte 0xe9 is not UTF-8; set `encoding` in the description"):
        prepare_table(tmp_path / "out", PLAIN, [tmp_path / "a.csv"])
    (tmp_path / "a.csv").write_bytes("y,x,é\n1,a,b\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"line 1: the header is not UTF-8 text; set `encoding` in the description"):
        prepare_table(tmp_path / "out", PLAIN, [tmp_path / "a.csv"])
    (tmp_path / "a.csv").write_bytes(TEXT.encode("utf-16-le"))
    with pytest.raises(
        UserError, match=r"line 1: the header holds NUL bytes; if it is UTF-16, set `encoding: utf-16-le`"
    ):
        prepare_table(tmp_path / "out", PLAIN, [tmp_path / "a.csv"])


@pytest.mark.parametrize("name", ["latin-x", "rot13", "base64", 8, "", "utf_7_and_a_half"])
def test_unknown_encodings(name: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoding is .*; it must be the name of an encoding, such as utf-8, latin-1"):
        prepare_table(tmp_path / "out", PLAIN | {"encoding": name}, [])


def test_lines_of_many_blocks_are_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 64)
    (tmp_path / "a").write_bytes(TEXT.encode("utf-16"))
    raw = RawFile(str(tmp_path / "a"), 0, "", ())
    found = [block.read() for block in text_blocks(raw, lambda _: None)]
    assert len(found) > 5
    assert all(each.endswith(b"\n") for each in found)
    assert b"".join(found).decode() == TEXT
