"""The manifest of a checkpoint, ``manifest.json``, and the checksums in it.

The manifest is written last. Its presence marks the checkpoint as complete.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from isal.isal_zlib import crc32  # the same values as zlib's, at ten times the speed

from mlet_dist.atomic_directory import sync_directory
from mlet_dist.atomic_file import replaced_file
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json

MANIFEST = "manifest.json"
FORMAT_VERSION = 5
_OLDEST_VERSION = 4  # its tables are stored by id, as those of all checkpoints whose manifest has no ``row_order``
RUN_ID = "run"
"""The key of ``Manifest.about`` under which a run's checkpoints hold its id."""

BLOCK_BYTES = 1 << 24
"""Bytes of a file that one checksum covers, so that a reader of a small part need not read the whole file."""


class ManifestError(Exception):
    """A manifest is missing or damaged; the message names it."""


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    Attributes:
        step: the step after which the checkpoint was saved.
        files: file name -> ``bytes`` and ``crc32``, a list with one checksum per block.
        about: further plain JSON data from the writer.
    """

    step: int
    files: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any]

    def write(self, filesystem: AbstractFileSystem, directory: str) -> None:
        """Write ``manifest.json`` into a checkpoint's directory atomically, which completes the checkpoint.

        All other files must have been written. On a local file system the manifest is first synced to disk under a
        temporary name and then renamed.
        """
        target = f"{directory}/{MANIFEST}"
        if not isinstance(filesystem, LocalFileSystem):  # object stores create an object atomically
            filesystem.pipe_file(target, self.render())
            return
        path = Path(directory)
        sync_directory(path)
        with replaced_file(Path(target)) as file:
            file.write(self.render())
        sync_directory(path)
        sync_directory(path.parent)

    def render(self) -> bytes:
        """Return the manifest as JSON that contains a SHA-256 of itself."""
        content = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "files": dict(sorted(self.files.items())),
            "about": self.about,
        }
        return _with_checksum(content)

    @classmethod
    def parse(cls, data: bytes, where: str) -> "Manifest":
        """Parse the output of ``render``.

        Args:
            where: the manifest's name in messages.

        Raises:
            ManifestError: the data differ from what was written, by one bit or more.
            UserError: another version of mlet_dist wrote the manifest.
        """
        try:
            content = json.loads(data)["content"]
            if _with_checksum(content) != data:
                raise ValueError("its checksum is wrong")
            found = content["format_version"]
            if not _OLDEST_VERSION <= found <= FORMAT_VERSION:
                # Not a ManifestError, which makes callers fall back to an older checkpoint: this one is complete.
                raise UserError(
                    f"{where}: format_version is {found}, and this version of mlet_dist reads {_OLDEST_VERSION} to "
                    f"{FORMAT_VERSION}; use the version that wrote it"
                )
            return cls(content["step"], content["files"], content["about"])
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(f"{where} is damaged: {' '.join(str(error).split())}") from None

    def find_damage(
        self, name: str, open_file: Callable[[str], Any], advance: Callable[[], None] = lambda: None
    ) -> str | None:
        """Read all of file ``name`` and return a description of its damage, or None if it is intact.

        Args:
            name: of the file.
            open_file: opens a file by name.
            advance: called after each block.
        """
        expected = self.files[name]
        found = Checksum()
        try:
            with open_file(name) as file:
                while block := file.read(1 << 22):
                    found.update(block)
                    advance()
        except FileNotFoundError:
            return f"{name} is missing"
        except Exception as error:  # each fsspec implementation raises its own errors
            return f"{name} cannot be read: {error or type(error).__name__}"
        if found.size != expected["bytes"]:
            return f"{name} has {found.size:,} bytes instead of {expected['bytes']:,}"
        sums = zip(found.entry()["crc32"], expected["crc32"], strict=True)
        for number, (found_sum, expected_sum) in enumerate(sums):
            if found_sum != expected_sum:
                return f"{name} is damaged: {block_damage(number, found_sum, expected_sum)}"
        return None


class Checksum:
    """Size and CRC-32 of a stream of bytes, one CRC-32 per block of ``BLOCK_BYTES``.

    CRC-32 detects every flipped bit. It misses one in 4 billion other changes.
    """

    def __init__(self) -> None:
        self.size, self._sums = 0, array("L")

    def update(self, data: Any) -> None:
        """Add ``data``, any object with a buffer."""
        view = memoryview(data).cast("B")
        while view:
            begun = self.size % BLOCK_BYTES
            part = view[: BLOCK_BYTES - begun]
            if begun == 0:
                self._sums.append(0)
            self._sums[-1] = crc32(part, self._sums[-1])
            self.size += len(part)
            view = view[len(part) :]

    def entry(self) -> dict[str, Any]:
        """Return ``bytes`` and ``crc32`` as in ``Manifest.files``."""
        return {"bytes": self.size, "crc32": [f"{each:08x}" for each in self._sums]}


def block_damage(number: int, found: str, expected: str) -> str:
    """Return the part of a message that reports a wrong checksum of block ``number`` of a file."""
    return f"the block at byte {number * BLOCK_BYTES:,} has checksum {found} instead of {expected}"


def _with_checksum(content: Mapping[str, Any]) -> bytes:
    text = to_json(content, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n"content": {text}}}\n'.encode()
