"""Parts of a file, each block of which is checked when it is first read."""

import io
from collections.abc import Callable, Mapping
from typing import IO, Any

from isal.isal_zlib import crc32

from mlet_dist.checkpoint.manifest import BLOCK_BYTES, block_damage
from mlet_dist.errors import UserError

_REST_BYTES = 1 << 20


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
        self._begun: tuple[int, int, int] | None = None  # a block, how far it was streamed, and the sum up to there

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill ``out``, of bytes, from position ``start`` on."""
        self._by_blocks(start, out, self._read_block)

    def stream_into(self, start: int, out: memoryview) -> None:
        """The same for one who goes on from where he was; the last bytes count only once ``settle`` has returned.

        No byte is read twice, and no more than are asked for.
        """
        self._by_blocks(start, out, self._stream_block)

    def settle(self) -> None:
        """Check what was streamed: the rest of its last block is read."""
        if self._begun is None:
            return
        number, within, _ = self._begun
        rest = memoryview(bytearray(_REST_BYTES))
        while self._begun is not None:
            part = rest[: self._length(number) - within]
            self._stream_block(number, within, part)
            within += len(part)

    def check_holds(self, stop: int) -> None:
        """Raise UserError where the file ends before position ``stop``."""
        if stop > self.size:
            raise UserError(f"{self._name} ends at byte {self.size:,}, before {stop:,}: it is damaged")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._held = None

    def _by_blocks(self, start: int, out: memoryview, fill: Callable[[int, int, memoryview], None]) -> None:
        self.check_holds(start + len(out))
        done = 0
        while done < len(out):
            number, within = divmod(start + done, BLOCK_BYTES)
            part = out[done : done + BLOCK_BYTES - within]
            fill(number, within, part)
            done += len(part)

    def _read_block(self, number: int, within: int, out: memoryview) -> None:
        """Fill ``out`` from one block, and check all of the block unless that was done before."""
        if self._held is not None and self._held[0] == number:
            out[:] = self._held[1][within : within + len(out)]
            return
        begin, length = number * BLOCK_BYTES, self._length(number)
        if self._sums is None or number in self._good:
            self._read(begin + within, out)
            return
        block = out if len(out) == length else self._buffer()[:length]
        self._read(begin, block)
        self._check(number, crc32(block))
        if block is not out:
            self._held = number, block
            out[:] = block[within : within + len(out)]

    def _stream_block(self, number: int, within: int, out: memoryview) -> None:
        """Fill ``out`` from one block, and check the block once all of it has passed."""
        if self._begun is not None and self._begun[:2] != (number, within):
            self.settle()
        begun = self._begun is not None
        if self._sums is None or number in self._good or not (begun or within == 0):
            self._read_block(number, within, out)
            return
        self._read(number * BLOCK_BYTES + within, out)
        found = crc32(out, self._begun[2] if self._begun is not None else 0)
        self._begun = number, within + len(out), found
        if within + len(out) == self._length(number):
            self._begun = None
            self._check(number, found)

    def _check(self, number: int, found: int) -> None:
        assert self._sums is not None
        if f"{found:08x}" != self._sums[number]:
            said = block_damage(number, f"{found:08x}", self._sums[number])
            raise UserError(f"{self._name} is damaged: {said}")
        self._good.add(number)

    def _length(self, number: int) -> int:
        return min(BLOCK_BYTES, self.size - number * BLOCK_BYTES)

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
