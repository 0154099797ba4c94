"""Parts of a file, each block of which is checked when it is first read."""

import io
import zlib
from collections.abc import Mapping
from typing import IO, Any

from mlet_dist.errors import UserError
from mlet_dist.training.checkpoint.manifest import BLOCK_BYTES, block_damage


class CheckedFile:
    """A file whose bytes are what the manifest says, or an error; not for several threads at once.

    Args:
        name: as messages call it.
        file: open and seekable.
        expected: the manifest's entry, ``bytes`` and ``crc32``; None for a file without one, which is not checked.

    Raises:
        UserError: here and in reading: the file is of another size, cannot be read, or a block of it is damaged.
    """

    def __init__(self, name: str, file: IO[bytes], expected: Mapping[str, Any] | None = None) -> None:
        self._name, self._file = name, file
        self.size = file.seek(0, io.SEEK_END)
        self._sums: list[str] | None = None
        if expected is not None:
            self._sums = expected["crc32"]
            if self.size != expected["bytes"]:
                raise UserError(f"{name} has {self.size:,} bytes instead of {expected['bytes']:,}: it is damaged")
        self._good: set[int] = set()
        self._held: tuple[int, memoryview] | None = None  # a block of which a part was read; more may follow

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill ``out``, of bytes, from position ``start`` on."""
        if start + len(out) > self.size:
            raise UserError(f"{self._name} ends at byte {self.size:,}, before {start + len(out):,}: it is damaged")
        done = 0
        while done < len(out):
            number, within = divmod(start + done, BLOCK_BYTES)
            part = out[done : done + BLOCK_BYTES - within]
            self._read_block(number, within, part)
            done += len(part)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._held = None

    def _read_block(self, number: int, within: int, out: memoryview) -> None:
        """Fill ``out`` from one block, and check all of the block unless that was done before."""
        if self._held is not None and self._held[0] == number:
            out[:] = self._held[1][within : within + len(out)]
            return
        begin = number * BLOCK_BYTES
        length = min(BLOCK_BYTES, self.size - begin)
        if self._sums is None or number in self._good:
            self._read(begin + within, out)
            return
        block = out if len(out) == length else self._buffer()[:length]
        self._read(begin, block)
        found = f"{zlib.crc32(block):08x}"
        if found != self._sums[number]:
            raise UserError(f"{self._name} is damaged: {block_damage(number, found, self._sums[number])}")
        self._good.add(number)
        if block is not out:
            self._held = number, block
            out[:] = block[within : within + len(out)]

    def _buffer(self) -> memoryview:
        """Room for a block; what was held is given up."""
        held, self._held = self._held, None
        buffer = bytearray(min(BLOCK_BYTES, self.size)) if held is None else held[1].obj
        return memoryview(buffer)

    def _read(self, start: int, out: memoryview) -> None:
        try:
            self._file.seek(start)
            while out:
                count = self._file.readinto(out)  # type: ignore[attr-defined]
                if not count:
                    raise EOFError("it has become shorter")
                out = out[count:]
        except Exception as error:  # each store has errors of its own
            raise UserError(f"{self._name} cannot be read: {error or type(error).__name__}") from None


class FilePart(io.RawIOBase):
    """Some bytes of a file, as a file."""

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
