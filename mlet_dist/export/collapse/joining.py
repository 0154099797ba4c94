"""Many files of an export as one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlet_dist.checkpoint.checked_file import CheckedFile
from mlet_dist.checkpoint.manifest import BLOCK_BYTES
from mlet_dist.export.collapse.work_directory import WorkDirectory
from mlet_dist.export.formats.pieces import Format, Piece


def join_files(
    work: WorkDirectory,
    form: Format,
    directory: str,
    pieces: Sequence[Piece],
    entries: Mapping[str, Mapping[str, Any]],
    whole: str,
) -> tuple[list[Piece], dict[str, Any]]:
    """Copy pieces of tensors, in order of tensors and rows, to one new file; a block is in memory at a time.

    Args:
        directory: that the pieces' files are in, within ``work``.
        entries: what was noted of each file when it was written, by its name within ``work``.
        whole: name of the new file within ``work``.

    Returns:
        The pieces that the new file consists of, and its ``bytes`` and ``crc32``.

    Raises:
        UserError: a file is damaged, or cannot be read or written.
    """
    pieces = sorted(pieces, key=lambda piece: (piece.name, piece.offsets))
    buffer = memoryview(bytearray(BLOCK_BYTES))
    with work.new_file(whole) as stream:
        joined = form.join(stream, Path(whole).name, pieces)
        for piece in pieces:
            name = f"{directory}/{piece.file}"
            with _opened(work.root / name, entries[name]) as file:
                for start in range(0, piece.length, len(buffer)):
                    block = buffer[: piece.length - start]
                    file.read_into(piece.start + start, block)
                    stream.write(block)
    return joined, stream.checksum.entry()


@contextmanager
def _opened(path: Path, entry: Mapping[str, Any]) -> Iterator[CheckedFile]:
    with path.open("rb") as raw:
        file = CheckedFile(str(path), raw, entry)
        try:
            yield file
        finally:
            file.close()
