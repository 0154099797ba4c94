"""Read parts of a file, and verify the checksum of each block when it is first read."""

import io
from collections.abc import Callable, Mapping
from typing import IO, Any

from isal.isal_zlib import crc32

from mlet_dist.checkpoint.manifest import BLOCK_BYTES, block_damage
from mlet_dist.errors import UserError

_READ_BYTES = 1 << 20


class CheckedFile:
    """A file whose bytes are verified against the manifest as they are read. Not thread-safe.

    Args:
        name: the file's name in messages.
        file: open and seekable.
        expected: the manifest's entry, ``bytes`` and ``crc32``; None for a file without one, which is not verified.
        verified: numbers of blocks that are known to be good, to which this adds; other threads may share the set.

    Raises:
        UserError: by the constructor and by reads: the file has another size, cannot be read, or a block is damaged.
    """

    def __init__(
        self, name: str, file: IO[bytes], expected: Mapping[str, Any] | None = None, verified: set[int] | None = None
    ) -> None:
        self._name, self._file = name, file
        self.size = file.seek(0, io.SEEK_END)
        self._sums: list[str] | None = None  # expected, by block
        if expected is not None:
            self._sums = expected["crc32"]
            if self.size != expected["bytes"]:
                raise UserError(f"{name} has {self.size:,} bytes instead of {expected['bytes']:,}: it is damaged")
        self._verified = set[int]() if verified is None else verified
        self._cached: tuple[int, memoryview] | None = None  # number and bytes of a block that was read in part
        self._streamed: tuple[int, int, int] | None = None  # number of a block, bytes of it streamed, their checksum

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill ``out``, a buffer of bytes, from position ``start`` on."""
        self._by_blocks(start, out, self._read_block)

    def stream_into(self, start: int, out: memoryview) -> None:
        """Fill ``out`` like ``read_into``, for sequential reads; verified only once ``verify_streamed`` has returned.

        No byte is read twice, and none beyond ``out``.
        """
        self._by_blocks(start, out, self._stream_block)

    def verify_streamed(self) -> None:
        """Verify the bytes that ``stream_into`` returned; this reads the rest of the last block."""
        if self._streamed is None:
            return
        number, within, _ = self._streamed
        rest = memoryview(bytearray(_READ_BYTES))
        while self._streamed is not None:
            part = rest[: self._length(number) - within]
            self._stream_block(number, within, part)
            within += len(part)

    def check_contains(self, stop: int) -> None:
        """Raise UserError where the file ends before position ``stop``."""
        if stop > self.size:
            raise UserError(f"{self._name} ends at byte {self.size:,}, before {stop:,}: it is damaged")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._cached = None

    def _by_blocks(self, start: int, out: memoryview, fill: Callable[[int, int, memoryview], None]) -> None:
        self.check_contains(start + len(out))
        done = 0
        while done < len(out):
            number, within = divmod(start + done, BLOCK_BYTES)
            part = out[done : done + BLOCK_BYTES - within]
            fill(number, within, part)
            done += len(part)

    def _read_block(self, number: int, within: int, out: memoryview) -> None:
        """Fill ``out`` from one block, and verify all of the block unless that was done before."""
        if self._cached is not None and self._cached[0] == number:
            out[:] = self._cached[1][within : within + len(out)]
            return
        begin, length = number * BLOCK_BYTES, self._length(number)
        if self._sums is None or number in self._verified:
            self._read(begin + within, out)
            return
        block = out if len(out) == length else self._buffer()[:length]
        self._read(begin, block)
        self._check(number, crc32(block))
        if block is not out:
            self._cached = number, block
            out[:] = block[within : within + len(out)]

    def _stream_block(self, number: int, within: int, out: memoryview) -> None:
        """Fill ``out`` from one block, and verify the block once all of it has been streamed."""
        if self._streamed is not None and self._streamed[:2] != (number, within):
            self.verify_streamed()
        continues = self._streamed is not None
        if self._sums is None or number in self._verified or not (continues or within == 0):
            self._streamed = None  # another thread may have verified the block meanwhile
            self._read_block(number, within, out)
            return
        self._read(number * BLOCK_BYTES + within, out)
        found = crc32(out, self._streamed[2] if self._streamed is not None else 0)
        self._streamed = number, within + len(out), found
        if within + len(out) == self._length(number):
            self._streamed = None
            self._check(number, found)

    def _check(self, number: int, found: int) -> None:
        assert self._sums is not None
        if f"{found:08x}" != self._sums[number]:
            damage = block_damage(number, f"{found:08x}", self._sums[number])
            raise UserError(f"{self._name} is damaged: {damage}")
        self._verified.add(number)

    def _length(self, number: int) -> int:
        return min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)

    def _buffer(self) -> memoryview:
        """Return memory for one block, that of the cached block if there is one."""
        cached, self._cached = self._cached, None
        buffer = bytearray(min(BLOCK_BYTES, self.size)) if cached is None else cached[1].obj
        return memoryview(buffer)

    def _read(self, start: int, out: memoryview) -> None:
        try:
            self._file.seek(start)
            while out:
                count = self._file.readinto(out)  # type: ignore[attr-defined]
                if not count:
                    raise EOFError("it has become shorter")
                out = out[count:]
        except Exception as error:  # each fsspec implementation raises its own errors
            raise UserError(f"{self._name} cannot be read: {error or type(error).__name__}") from None


class FilePart(io.RawIOBase):
    """A range of bytes of a ``CheckedFile`` as a file object."""

    def __init__(self, file: CheckedFile, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readinto(self, out: Any) -> int:
        view = memoryview(out).cast("B")[: max(0, self._length - self._position)]
        self._file.read_into(self._start + self._position, view)
        self._position += len(view)
        return len(view)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True
