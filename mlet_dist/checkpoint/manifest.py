"""What a checkpoint says of itself, and the checksums by which it is known to be whole."""

import hashlib
import json
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from isal.isal_zlib import crc32  # zlib's, at ten times the speed

from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json

FORMAT_VERSION = 4

BLOCK_BYTES = 1 << 24
"""How much of a file one checksum is of, so that whoever needs a part of it need not read it all."""


class ManifestError(Exception):
    """A manifest is missing or damaged; the message names it."""


class Checksum:
    """Size and CRC-32, block by block, of bytes that pass by.

    Finds every flipped bit, and any change but one in 4 billion.
    """

    def __init__(self) -> None:
        self.size, self._sums = 0, array("L")

    def update(self, data: Any) -> None:
        """Count bytes in: anything with a buffer."""
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
        """``bytes`` and ``crc32``, a list, as the manifest holds them."""
        return {"bytes": self.size, "crc32": [f"{each:08x}" for each in self._sums]}


@dataclass(frozen=True)
class Manifest:
    """The contents of ``manifest.json``.

    Attributes:
        step: after which it was saved.
        files: by name, ``bytes`` and the ``crc32`` of each block.
        about: what else its writer noted, plain JSON data.
    """

    step: int
    files: Mapping[str, Mapping[str, Any]]
    about: Mapping[str, Any]

    def render(self) -> bytes:
        """As JSON that holds a SHA-256 of itself."""
        content = {
            "format_version": FORMAT_VERSION,
            "step": self.step,
            "files": dict(sorted(self.files.items())),
            "about": self.about,
        }
        return _sealed(content)

    @classmethod
    def parse(cls, data: bytes, where: str) -> "Manifest":
        """Read what ``render`` wrote, to the last bit.

        Raises:
            ManifestError: any byte is another one.
            UserError: another version of mlet_dist wrote it.
        """
        try:
            content = json.loads(data)["content"]
            if _sealed(content) != data:
                raise ValueError("its checksum is wrong")
            found = content["format_version"]
            if found != FORMAT_VERSION:
                # To go back to an older checkpoint would be to drop what is whole.
                raise UserError(
                    f"{where}: format_version is {found}, and this version of mlet_dist reads {FORMAT_VERSION}; use "
                    "the one that wrote it"
                )
            return cls(content["step"], content["files"], content["about"])
        except (ValueError, KeyError, TypeError) as error:
            raise ManifestError(f"{where} is damaged: {' '.join(str(error).split())}") from None

    def find_damage(self, name: str, open_file: Callable[[str], Any]) -> str | None:
        """Read one of the files through; what is wrong with it, or None."""
        expected = self.files[name]
        found = Checksum()
        try:
            with open_file(name) as file:
                while block := file.read(1 << 22):
                    found.update(block)
        except FileNotFoundError:
            return f"{name} is missing"
        except Exception as error:  # each store has errors of its own
            return f"{name} cannot be read: {error or type(error).__name__}"
        if found.size != expected["bytes"]:
            return f"{name} has {found.size:,} bytes instead of {expected['bytes']:,}"
        sums = zip(found.entry()["crc32"], expected["crc32"], strict=True)
        for number, (found_sum, expected_sum) in enumerate(sums):
            if found_sum != expected_sum:
                return f"{name} is damaged: {block_damage(number, found_sum, expected_sum)}"
        return None


def block_damage(number: int, found: str, expected: str) -> str:
    """How a message says that one block of a file is not what was written."""
    return f"the block at byte {number * BLOCK_BYTES:,} has checksum {found} instead of {expected}"


def _sealed(content: Mapping[str, Any]) -> bytes:
    text = to_json(content, indent=1)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{{"sha256": "{digest}",\n"content": {text}}}\n'.encode()
