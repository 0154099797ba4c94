"""Rectangles of tensors in files: what an export's formats write, join and index."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from mlet_dist.checkpoint.writer import SummedStream


@dataclass(frozen=True)
class Piece:
    """A rectangle of a tensor, and the bytes of a file that hold it.

    Attributes:
        name: of the tensor in the state dict.
        dtype: as torch calls it, without ``torch.``.
        offsets, sizes: of the rectangle.
        file: relative to the format's directory.
        start, length: of what the format wrote of it, in bytes.
    """

    name: str
    dtype: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> "Piece":
        """Take back what ``to_dict`` gave."""
        return cls(**{**plain, "offsets": tuple(plain["offsets"]), "sizes": tuple(plain["sizes"])})

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def moved(self, file: str, start: int) -> "Piece":
        """The same rectangle elsewhere."""
        return replace(self, file=file, start=start)


class Format(Protocol):
    """A kind of file that holds pieces of tensors, and the index that goes with many of them."""

    suffix: str

    def write(
        self, stream: SummedStream, file: str, first_row: int, tensors: Mapping[str, torch.Tensor]
    ) -> list[Piece]:
        """Write tensors, by name, to a new file, as the rows from ``first_row`` on.

        Each tensor is all of its storage.
        """

    def join(self, stream: SummedStream, file: str, pieces: Sequence[Piece]) -> list[Piece]:
        """Begin a file that will hold the bytes of ``pieces`` in this order; the pieces that it then consists of.

        The pieces are rectangles of rows, and those of one tensor are neighbours and in order.
        """

    def index(self, pieces: Sequence[Piece]) -> tuple[str, bytes]:
        """Name and contents of the file by which readers find all pieces."""


def whole_shapes(pieces: Sequence[Piece]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor that pieces are of, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for piece in pieces:
        ends = tuple(offset + size for offset, size in zip(piece.offsets, piece.sizes, strict=True))
        before = shapes.get(piece.name, ends)
        shapes[piece.name] = tuple(map(max, ends, before))
    return shapes
