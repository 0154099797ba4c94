"""Tests of mlet_dist.data.prepare.compression: every compression that is read gives the text, or a named error."""

import bz2
import gzip
import io
import lzma
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlet_dist.data.prepare import compression, raw_blocks
from mlet_dist.data.prepare.raw_blocks import text_blocks
from mlet_dist.data.prepare.raw_files import RawFile, inspect_file
from mlet_dist.data.prepare.raw_formats import TextFormat
from mlet_dist.errors import UserError
from tests.helpers.tables import PLAIN, prepare_table, values_of

TEXT = "".join(f"{i % 2},v{i * i % 97} é\n" for i in range(400)).encode()
CSV = TextFormat(",", '"', True, None)


def _arrow(name: str) -> Callable[[bytes], bytes]:
    def compress(content: bytes) -> bytes:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, name) as stream:
            stream.write(content)
        return bytes(sink.getvalue())

    return compress


def _zip(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("data")
        archive.writestr("data/table.csv", content)
        archive.writestr("__MACOSX/._table.csv", b"\0")
    return buffer.getvalue()


def _snappy(content: bytes) -> bytes:
    import cramjam

    return bytes(cramjam.snappy.compress(content))


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda content: lzma.compress(content, format=lzma.FORMAT_ALONE),
    "zstd": _arrow("zstd"),
    "lz4": _arrow("lz4"),
    "zip": _zip,
    "snappy": _snappy,
}
OF_MEMBERS = [name for name in COMPRESSIONS if name not in ("zip", "lzma")]


def read(path: Path, content: bytes) -> bytes:
    path.write_bytes(content)
    raw = RawFile(str(path), len(content), "", ())
    return b"".join(block.read() for block in text_blocks(raw, lambda _: None))


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_a_compression_is_known_by_content(name: str, tmp_path: Path) -> None:
    """The name of the file does not matter; the ids are those of the plain file."""
    lines = b"y,x\n" + TEXT
    (tmp_path / "plain.csv").write_bytes(lines)
    (tmp_path / "table.bin").write_bytes(COMPRESSIONS[name](lines))
    prepare_table(tmp_path / "plain", PLAIN, [tmp_path / "plain.csv"])
    prepare_table(tmp_path / "out", PLAIN, [tmp_path / "table.bin"])
    assert values_of(tmp_path / "out") == values_of(tmp_path / "plain")
    assert compression.compression_of(COMPRESSIONS[name](lines)[: compression.HEAD_BYTES]) == name


@pytest.mark.parametrize("name", OF_MEMBERS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=15)
@given(
    members=st.lists(st.integers(0, 4000), min_size=1, max_size=4),
    block=st.integers(100, 2000),
    piece=st.integers(1, 500),
    cut=st.integers(1, 60),
)
def test_any_members_and_any_sizes(
    name: str, members: list[int], block: int, piece: int, cut: int, tmp_path: Path
) -> None:
    """Files of several members or frames, and the same file without its last bytes."""
    compress = COMPRESSIONS[name]
    content = b"".join(compress(size * b"0123456\n") for size in members)
    last = len(compress(members[-1] * b"0123456\n"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw_blocks, "BLOCK_BYTES", block)
        patch.setattr(compression, "READ_BYTES", piece)
        assert read(tmp_path / "a", content) == sum(members) * b"0123456\n"
        if cut < last - 12:  # what is left of the last member is recognised as one
            with pytest.raises(UserError, match=f"a: truncated or corrupt {name} file: "):
                read(tmp_path / "a", content[:-cut])


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    content = bytearray(COMPRESSIONS[name](TEXT))
    content[len(content) // 2 : len(content) // 2 + 20] = bytes(20)
    with pytest.raises(UserError, match=f"a: truncated or corrupt {name} file: "):
        read(tmp_path / "a", bytes(content))


def test_an_error_of_the_storage_is_not_taken_for_damage(tmp_path: Path) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            if self.tell() > 3000:
                raise OSError(5, "Input/output error")
            return super().read(1000 if size is None or size < 0 else min(size, 1000))

    for name in ("gzip", "bzip2", "xz", "zstd", "lz4"):
        content = COMPRESSIONS[name](bytes(range(256)) * 40 + TEXT + bytes(reversed(TEXT)))
        if len(content) > 3000:
            with pytest.raises(OSError, match="Input/output error"):
                list(compression.decompressed("a", name, Failing(content + content), 1000))


def _archive(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"y,x\n1,a\n")
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("table.csv")
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_archive("a.csv", "b.csv"), "is a zip archive of 2 files; it must hold one; unpack it"),
        (_tar(), "is not text but a tar archive; unpack it"),
        (gzip.compress(_tar()), "is not text but a tar archive; unpack it"),
        (gzip.compress(gzip.compress(TEXT)), "holds a gzip file within a gzip file; decompress it once"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(30), "is not text but a 7z archive; unpack it"),
        (b"PAR1" + bytes(30), "is not text but a Parquet file (`format: parquet`)"),
    ],
)
def test_other_files_are_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        inspect_file(str(path), CSV, ("x", "y"))
    assert str(caught.value).startswith(f"{path}: {message}")


def test_compressed_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(b"PAR1" + TEXT))
    with pytest.raises(UserError, match=f"{path}: is a gzip file instead of a Parquet file; decompress it"):
        inspect_file(str(path), None, ("x",))


def test_an_encrypted_archive_is_named(tmp_path: Path) -> None:
    content = bytearray(_archive("a.csv"))
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1
    with pytest.raises(UserError, match=r"a: the zip archive cannot be read: .* is encrypted"):
        read(tmp_path / "a", bytes(content))


def test_without_the_package_for_snappy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = _snappy(TEXT)
    monkeypatch.setitem(sys.modules, "cramjam", None)
    with pytest.raises(
        UserError, match=r"a: is compressed with snappy, .* cramjam \(the extra `snappy`\); install it or"
    ):
        read(tmp_path / "a", content)


def test_a_name_does_not_make_a_compression(tmp_path: Path) -> None:
    """Browsers decompress files and keep their names; but what is neither compressed nor text is refused."""
    assert read(tmp_path / "day.csv.gz", TEXT) == TEXT
    with pytest.raises(UserError, match=r"day\.csv\.gz: is named \.gz but is neither compressed nor text"):
        read(tmp_path / "day.csv.gz", b"\x1e\x8b\x08\0\0\0" + TEXT)
