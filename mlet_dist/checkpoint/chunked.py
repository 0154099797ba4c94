"""Tensors that lie in rectangles in files, read by ranges of rows."""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Self

import torch

from mlet_dist.checkpoint.load import Location
from mlet_dist.errors import UserError


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a whole tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, and the bytes of a file that it was saved in."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class ChunkedTensors(ABC):
    """The tensors of a checkpoint in some format; as a context manager it closes the files.

    A reader of rows needs memory for those rows, whatever the size of the tensor or of the shards it was saved in.

    Attributes:
        location: as messages call it.
        tensors: by name.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.tensors: dict[str, StoredTensor] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        self._by_rows: dict[str, tuple[list[Chunk], list[int]]] = {}

    def read_rows(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill ``out`` ``(rows, columns)`` of the tensor's dtype, contiguous, on the CPU, with rows from ``start`` on.

        Raises:
            UserError: there is no such tensor, or a file is missing or damaged.
        """
        stop, covered = start + len(out), 0
        for chunk in self._chunks_over(name, start, stop):
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            if first >= last or not chunk.sizes[1]:
                continue
            columns = slice(chunk.offsets[1], chunk.offsets[1] + chunk.sizes[1])
            rows = out[first - start : last - start, columns]
            part = rows if rows.is_contiguous() else torch.empty_like(rows, memory_format=torch.contiguous_format)
            row_bytes = chunk.sizes[1] * out.element_size()
            self._read(chunk, (first - chunk.offsets[0]) * row_bytes, part)
            if part is not rows:
                rows.copy_(part)
            covered += part.numel()
        if covered != out.numel():
            raise UserError(f"{self.location}: holds {covered:,} of {out.numel():,} values of rows of {name!r}")

    def load(self, name: str) -> torch.Tensor:
        """One whole tensor, for small ones.

        Raises:
            UserError: as ``read_rows``.
        """
        chunks = self._chunks_of(name)
        found = self.tensors[name]
        tensor = torch.empty(found.shape, dtype=found.dtype)
        if tensor.dim() == 2:
            self.read_rows(name, 0, tensor)
        elif len(chunks) == 1 and chunks[0].sizes == found.shape:
            if tensor.numel():
                self._read(chunks[0], 0, tensor)
        else:
            raise UserError(f"{self.location}: {name!r} has {tensor.dim()} dimensions and {len(chunks)} parts")
        return tensor

    @abstractmethod
    def close(self) -> None:
        """Close all files."""

    @abstractmethod
    def _read(self, chunk: Chunk, offset: int, out: torch.Tensor) -> None:
        """Fill ``out``, contiguous and not empty, with the bytes of a chunk's data from ``offset`` on."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chunks_over(self, name: str, start: int, stop: int) -> Iterator[Chunk]:
        """Those that may hold rows of a range: a reader of ranges need not look at thousands of others each time."""
        if name not in self._by_rows:
            chunks = sorted(self._chunks_of(name), key=lambda chunk: chunk.offsets)
            ends = accumulate((chunk.offsets[0] + chunk.sizes[0] for chunk in chunks), max)
            self._by_rows[name] = chunks, list(ends)
        chunks, last_rows = self._by_rows[name]
        for chunk in islice(chunks, bisect_right(last_rows, start), None):
            if chunk.offsets[0] >= stop:
                return
            yield chunk

    def _chunks_of(self, name: str) -> list[Chunk]:
        if name not in self._chunks:
            raise UserError(f"{self.location}: holds no tensor {name!r}")
        return self._chunks[name]
