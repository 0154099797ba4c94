"""Raw files (lines of text, or Parquet; local or remote), cut into blocks that workers parse in parallel.

How a file is cut depends on nothing but the file, so that finished blocks can be kept. Blocks of a plain local file are
byte ranges, which the workers read themselves; text that is compressed, remote or in another encoding than UTF-8 is
read here and passed to the workers.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import pyarrow.parquet as pq

from mlet_dist.data.prepare.raw_files import RawFile, converted_text, open_raw, plain_pieces, raw_errors
from mlet_dist.data.prepare.text_encoding import UTF8_MARK
from mlet_dist.errors import UserError
from mlet_dist.urls import is_url

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Block:
    """Some complete lines of a text file, or a row group of a Parquet file.

    Attributes:
        path: path of the raw file.
        index: number of the block in the file.
        start, stop: range of the file's bytes, or of its decompressed text's if ``data`` is given; for Parquet, of its
            rows.
        data: the lines, or None if they are still to be read.
        spill_file: a temporary file with the lines, in place of ``data``; reading removes it.
    """

    path: str
    index: int
    start: int
    stop: int
    data: bytes | None = None
    spill_file: Path | None = None

    def spill(self, path: Path) -> "Block":
        """Move ``data`` to a file, from which another process gets it faster than through a pipe."""
        if self.data is None:
            return self
        path.write_bytes(self.data)
        return replace(self, data=None, spill_file=path)

    def read(self) -> bytes:
        """Return the lines, each with its line end, without a byte order mark.

        Raises:
            UserError: the file cannot be read.
        """
        data = self.data
        if self.spill_file is not None:
            data = self.spill_file.read_bytes()
            self.spill_file.unlink()
        if data is None:
            with raw_errors(self.path), open(self.path, "rb") as file:
                file.seek(self.start)
                data = file.read(self.stop - self.start)
            if len(data) != self.stop - self.start:
                raise UserError(f"{self.path}: became shorter while it was read; run again once it is complete")
        if self.index == 0:
            data = data.removeprefix(UTF8_MARK)
        return data if data.endswith(b"\n") else data + b"\n"


def text_blocks(raw: RawFile, on_read: Callable[[int], object], encoding: str | None = None) -> Iterator[Block]:
    """Yield the blocks of a text file; ``on_read`` is called with the number of bytes of each step.

    Raises:
        UserError: the file cannot be read, is truncated or corrupt, or has a line longer than a block.
    """
    with raw_errors(raw.path), open_raw(raw.path) as file:
        pieces = converted_text(raw.path, file, encoding, BLOCK_BYTES)
        if pieces is None and not is_url(raw.path):
            yield from _ranges(raw, file, on_read)
        else:
            yield from _read_blocks(raw.path, file, pieces or plain_pieces(file, BLOCK_BYTES), on_read)


def parquet_blocks(raw: RawFile, on_read: Callable[[int], object]) -> Iterator[Block]:
    """Yield the row groups of a Parquet file as blocks, none if it has no rows; ``on_read`` as in ``text_blocks``."""
    if not raw.columns:
        on_read(raw.size)
        return
    with raw_errors(raw.path), open_raw(raw.path) as file:
        footer = pq.ParquetFile(file).metadata
    start = 0
    for group in range(footer.num_row_groups):
        stop = start + footer.row_group(group).num_rows
        yield Block(raw.path, group, start, stop)
        on_read(raw.size // footer.num_row_groups)
        start = stop


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file to read row groups from; an error in reading it becomes a UserError."""
    with raw_errors(path), open_raw(path) as file:
        yield pq.ParquetFile(file)


def _read_blocks(
    path: str, raw: IO[bytes], pieces: Iterable[bytes], on_read: Callable[[int], object]
) -> Iterator[Block]:
    """Yield the blocks of a compressed, converted or remote file, with their lines."""
    index, start, rest, position = 0, 0, b"", 0
    for piece in pieces:
        if raw.tell() > position:  # an archive is not read from its start to its end
            on_read(raw.tell() - position)
            position = raw.tell()
        end = piece.rfind(b"\n") + 1
        if not end:
            rest += piece
            if len(rest) > BLOCK_BYTES:
                raise _line_too_long(path, start)
            continue
        data, rest = rest + piece[:end], piece[end:]
        yield Block(path, index, start, start + len(data), data)
        index, start = index + 1, start + len(data)
    if rest:
        yield Block(path, index, start, start + len(rest), rest)


def _ranges(raw: RawFile, file: IO[bytes], on_read: Callable[[int], object]) -> Iterator[Block]:
    """Yield the blocks of a plain local file as ranges of bytes that end with a line."""
    index, start = 0, 0
    while start < raw.size:
        stop = min(start + BLOCK_BYTES, raw.size)
        if stop < raw.size:
            file.seek(stop - 1)
            rest = file.readline(BLOCK_BYTES)  # the rest of the line that contains the block's last byte
            stop += len(rest) - 1
            if len(rest) == BLOCK_BYTES and not rest.endswith(b"\n"):
                raise _line_too_long(raw.path, start)
        yield Block(raw.path, index, start, stop)
        on_read(stop - start)
        index, start = index + 1, stop


def _line_too_long(path: str, start: int) -> UserError:
    return UserError(f"{path}: after byte {start}, a line has more than {BLOCK_BYTES} bytes; is it a text file?")
