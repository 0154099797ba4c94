"""Compressed raw files: recognised by their content, and decompressed in buffers, one member or frame after another."""

import bz2
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Protocol

import pyarrow as pa

from mlet_dist.errors import UserError

HEAD_BYTES = 512  # enough to recognise a compression, or a kind of file that is no text
READ_BYTES = 1 << 20  # compressed bytes to read at a time

_SNAPPY_HEAD = b"\xff\x06\0\0sNaPpY"
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\0": "xz",
    b"]\0\0": "lzma",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    _SNAPPY_HEAD: "snappy",
    b"PK\x03\x04": "zip",
    b"PK\x05\x06": "zip",
}
_BZIP2 = re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)")
_SKIPPABLE = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # a frame before the first one of pzstd
_FOREIGN = {
    b"PAR1": "a Parquet file (`format: parquet`)",
    b"ARROW1\0\0": "an Arrow file; write it as Parquet",
    b"Obj\x01": "an Avro file; write it as Parquet",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!\x1a\x07": "a RAR archive; unpack it",
    b"\x1f\x9d": "compressed with compress (.Z); decompress it",
    b"LZIP\x01": "compressed with lzip; decompress it",
    b"\x89LZO\0": "compressed with lzop; decompress it",
    b"\x02\x21\x4c\x18": "compressed in the legacy format of lz4; decompress it",
}
_TAR = slice(257, 262)
_TRUNCATED = "Compressed file ended before the end-of-stream marker was reached"


def compression_of(head: bytes) -> str | None:
    """Return the compression that the first ``HEAD_BYTES`` bytes of a file show, or None."""
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            return name
    if _BZIP2.match(head):
        return "bzip2"
    return "zstd" if _SKIPPABLE.match(head) else None


def foreign_kind(head: bytes) -> str | None:
    """Return what a file is that is known not to be text, and what to do with it; None for any other file."""
    if head[_TAR] == b"ustar":
        return "a tar archive; unpack it"
    return next((kind for magic, kind in _FOREIGN.items() if head.startswith(magic)), None)


def decompressed(path: str, compression: str, file: IO[bytes], buffer_bytes: int) -> Iterator[bytes]:
    """Yield the content of a compressed file in buffers of ``buffer_bytes``; checksums are verified.

    Raises:
        UserError: the file is truncated or corrupt, an archive of more than one file, or its compression needs a
            package that is not installed.
    """
    match compression:
        case "gzip":
            # gzip.GzipFile takes a third longer, since it reads small buffers.
            return _members(path, "gzip", _Inflater, file, buffer_bytes)
        case "bzip2":
            return _members(path, "bzip2", bz2.BZ2Decompressor, file, buffer_bytes)
        case "xz" | "lzma":
            return _members(path, compression, lzma.LZMADecompressor, file, buffer_bytes)
        case "zip":
            return _zip_member(path, file, buffer_bytes)
        case "snappy":
            return _snappy_frames(path, file, buffer_bytes)
        case _:
            return _frames(path, compression, file, buffer_bytes)


class _Decompressor(Protocol):
    """The interface of the standard library's decompressors of bz2 and lzma."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Inflater:
    """One gzip member, with the interface of ``_Decompressor``."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        # There is input left, or new input, never both.
        text = self._member.decompress(self._member.unconsumed_tail or data, max_length)
        self.needs_input = not self._member.unconsumed_tail and len(text) < max_length
        return text


def _members(
    path: str, name: str, start: Callable[[], _Decompressor], file: IO[bytes], buffer_bytes: int
) -> Iterator[bytes]:
    """Yield the content of a file of one or more members, between and after which there may be zeros."""
    member, data = start(), file.read(READ_BYTES)
    buffers: list[bytes] = []
    size = 0
    while data or not member.needs_input:
        try:
            text = member.decompress(data, buffer_bytes - size)
        except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise _corrupt(path, name, error) from error
        buffers.append(text)
        size, data = size + len(text), b""
        if size >= buffer_bytes:
            yield b"".join(buffers)
            buffers, size = [], 0
        if member.eof:
            data = member.unused_data.lstrip(b"\0")
            while not data and (following := file.read(READ_BYTES)):
                data = following.lstrip(b"\0")
            if not data:
                break
            member = start()
        elif member.needs_input:
            data = file.read(READ_BYTES)
    if not member.eof:
        raise _corrupt(path, name, _TRUNCATED)
    if size:
        yield b"".join(buffers)


class _Source:
    """A file for Arrow, which turns what reading raises into an error of its own; this keeps the original."""

    closed = False

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: Exception | None = None

    def read(self, size: int = -1) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:
            self.error = error
            raise

    def close(self) -> None:
        """Leave the file open, which belongs to the caller."""


def _frames(path: str, name: str, file: IO[bytes], buffer_bytes: int) -> Iterator[bytes]:
    """Yield the content of a file of zstd or lz4 frames."""
    source = _Source(file)
    stream = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), name)
    while True:
        try:
            text = stream.read(buffer_bytes)
        except (OSError, pa.ArrowException) as error:
            if source.error is not None:
                raise source.error from None
            raise _corrupt(path, name, error) from error
        if not text:
            return
        yield text


def _zip_member(path: str, file: IO[bytes], buffer_bytes: int) -> Iterator[bytes]:
    """Yield the content of the one file of a zip archive."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [member for member in archive.infolist() if not member.is_dir()]
            names = [member for member in names if not member.filename.startswith("__MACOSX/")]
            if len(names) != 1:
                raise UserError(
                    f"{path}: is a zip archive of {len(names)} files; it must hold one; unpack it and give its files"
                )
            with archive.open(names[0]) as member:
                while text := member.read(buffer_bytes):
                    yield text
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise _corrupt(path, "zip", error) from error
    except (NotImplementedError, RuntimeError) as error:  # another compression method, or encrypted
        raise UserError(f"{path}: the zip archive cannot be read: {error}; unpack it") from error


def _snappy_frames(path: str, file: IO[bytes], buffer_bytes: int) -> Iterator[bytes]:
    """Yield the content of a file of snappy frames: a byte of kind, three bytes of length, and as many bytes."""
    try:
        import cramjam
    except ImportError:
        raise UserError(
            f"{path}: is compressed with snappy, which needs the package cramjam (the extra `snappy`); install it or "
            "decompress the file"
        ) from None
    data = b""
    while following := file.read(max(READ_BYTES, buffer_bytes // 2)):
        data += following
        stop = 0
        while (after := stop + 4 + int.from_bytes(data[stop + 1 : stop + 4], "little")) <= len(data):
            stop = after
        try:
            text = bytes(cramjam.snappy.decompress(_SNAPPY_HEAD + data[:stop]))
        except cramjam.DecompressionError as error:
            raise _corrupt(path, "snappy", error) from error
        data = data[stop:]
        if text:
            yield text
    if data:
        raise _corrupt(path, "snappy", _TRUNCATED)


def _corrupt(path: str, name: str, error: object) -> UserError:
    return UserError(f"{path}: truncated or corrupt {name} file: {str(error).partition(chr(10))[0]}")
