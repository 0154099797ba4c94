"""Shards of tensors in files: the interface of the formats that an export is written in."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from mlet_dist.checkpoint.writer import ChecksumStream


@dataclass(frozen=True)
class TensorShard:
    """A rectangle of a tensor, and the position of its bytes in a file.

    Attributes:
        name: of the tensor in the state dict.
        dtype: as torch names it, without ``torch.``.
        offsets, sizes: of the rectangle.
        file: relative to the format's directory.
        start, length: of the bytes that the format wrote for the shard.
    """

    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "TensorShard":
        """Return the shard that ``to_dict`` was called on."""
        return cls(**{**plain, "offsets": tuple(plain["offsets"]), "sizes": tuple(plain["sizes"])})

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def moved(self, file: str, start: int) -> "TensorShard":
        """Return the same shard at another position."""
        return replace(self, file=file, start=start)


class Format(Protocol):
    """A file format for shards of tensors, with an index of many files."""

    suffix: str

    def write(
        self, stream: ChecksumStream, file: str, first_row: int, tensors: Mapping[str, torch.Tensor]
    ) -> list[TensorShard]:
        """Write tensors, by name, to a new file, as the rows from ``first_row`` on; return their shards.

        Each tensor must cover all of its storage.
        """

    def join(self, stream: ChecksumStream, file: str, shards: Sequence[TensorShard]) -> list[TensorShard]:
        """Start a file to which the caller will append the bytes of ``shards`` in this order; return its shards.

        The shards are ranges of rows, those of one tensor are adjacent and in order.
        """

    def index(self, shards: Sequence[TensorShard]) -> tuple[str, bytes]:
        """Return name and contents of the file from which readers learn the positions of all shards."""


def full_shapes(shards: Sequence[TensorShard]) -> dict[str, tuple[int, ...]]:
    """Return the full shape of each sharded tensor, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        ends = tuple(offset + size for offset, size in zip(shard.offsets, shard.sizes, strict=True))
        before = shapes.get(shard.name, ends)
        shapes[shard.name] = tuple(map(max, ends, before))
    return shapes
