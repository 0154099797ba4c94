"""Read ranges of rows of tensors directly from files, without a model or a process group."""

import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import IO, Any, Self, cast

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from mlet_dist.checkpoint.checked_file import CheckedFile, FilePart
from mlet_dist.checkpoint.load import Location, read_metadata
from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.errors import UserError

INDEX = ".metadata"
"""The file in which torch.distributed.checkpoint records where all tensors are."""

_MAX_OPEN_FILES = 2  # each may cache a block in memory


@dataclass(frozen=True)
class StoredTensor:
    """Shape and dtype of a full tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Chunk:
    """A rectangle of a tensor, and the position of its bytes in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


class ChunkedTensors(ABC):
    """The tensors of a checkpoint in some file format. As a context manager, it closes the files.

    Reading rows takes memory for those rows alone, whatever the size of the tensor or of its saved shards.

    Attributes:
        location: path or URL, also in messages.
        tensors: shape and dtype by name.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.tensors: dict[str, StoredTensor] = {}
        self._chunks: dict[str, list[Chunk]] = {}
        self._by_rows: dict[str, tuple[list[Chunk], list[int]]] = {}

    def read_rows(self, name: str, start: int, out: torch.Tensor, first_column: int = 0) -> None:
        """Fill ``out`` with rows of a tensor from row ``start`` on.

        Args:
            out: ``(rows, columns)`` of the tensor's dtype, contiguous, on the CPU; ``(rows,)`` of a tensor that has
                one dimension.
            first_column: where the columns of ``out`` begin.

        Raises:
            UserError: there is no such tensor, or a file is missing or damaged.
        """
        if out.dim() == 1:
            self._read_elements(name, start, out)
            return
        stop, covered = start + len(out), 0
        for chunk in self._chunks_over(name, start, stop):
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            left = max(first_column, chunk.offsets[1])
            right = min(first_column + out.shape[1], chunk.offsets[1] + chunk.sizes[1])
            if first >= last or left >= right:
                continue
            rows = out[first - start : last - start, left - first_column : right - first_column]
            is_direct = rows.is_contiguous() and rows.shape[1] == chunk.sizes[1]
            part = rows if is_direct else torch.empty(last - first, chunk.sizes[1], dtype=out.dtype)
            row_bytes = chunk.sizes[1] * out.element_size()
            self._read(chunk, (first - chunk.offsets[0]) * row_bytes, part)
            if not is_direct:
                rows.copy_(part[:, left - chunk.offsets[1] : right - chunk.offsets[1]])
            covered += rows.numel()
        if covered != out.numel():
            raise UserError(f"{self.location}: holds {covered:,} of {out.numel():,} values of rows of {name!r}")

    def _read_elements(self, name: str, start: int, out: torch.Tensor) -> None:
        stop, covered = start + len(out), 0
        for chunk in self._chunks_over(name, start, stop):
            first, last = max(start, chunk.offsets[0]), min(stop, chunk.offsets[0] + chunk.sizes[0])
            if first < last:
                self._read(chunk, (first - chunk.offsets[0]) * out.element_size(), out[first - start : last - start])
                covered += last - first
        if covered != len(out):
            raise UserError(f"{self.location}: holds {covered:,} of {len(out):,} values of {name!r}")

    def load(self, name: str) -> torch.Tensor:
        """Return a full tensor, meant for small ones.

        Raises:
            UserError: as for ``read_rows``.
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
        """Yield the chunks that may contain rows of a range, without a scan of all chunks of the tensor."""
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


class DcpFiles(ChunkedTensors):
    """The tensors of a directory that torch.distributed.checkpoint wrote.

    Args:
        location: directory or URL.
        open_file: opens one of its files by name.
        files: name -> the manifest's entry, to verify reads; None if there is no manifest.

    Raises:
        UserError: the file ``.metadata`` is missing or damaged.
    """

    def __init__(
        self, location: Location, open_file: Callable[[str], IO[bytes]], files: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(location)
        self._open_file, self._files = open_file, files
        if files is not None:
            damage = Manifest(step=0, files=files, about={}).find_damage(INDEX, open_file)
            if damage is not None:
                raise UserError(f"{location}: {damage}")
        metadata = read_metadata(location)
        for name, found in metadata.state_dict_metadata.items():
            if isinstance(found, TensorStorageMetadata):
                self.tensors[name] = StoredTensor(tuple(found.size), found.properties.dtype)
                self._chunks[name] = [
                    self._chunk(metadata.storage_data, name, tuple(each.offsets), tuple(each.sizes))
                    for each in found.chunks
                ]
        self._opened: dict[str, CheckedFile] = {}
        # Rows of consecutive ids are in many files, which are opened again and again; their blocks are verified once.
        self._verified: dict[str, set[int]] = {name: set() for name in files or ()}
        self._streams = False
        self._data_starts: dict[Chunk, int] = {}

    def position(self, name: str, row: int) -> tuple[str, int]:
        """Return the file that holds a row of a tensor, and about where in it, to read in the order of the files."""
        chunks = self._chunks_of(name)
        if chunks and not chunks[0].sizes:  # a single number
            return chunks[0].file, chunks[0].start
        chunk = next(self._chunks_over(name, row, row + 1), None)
        if chunk is None:
            return "", 0
        return chunk.file, chunk.start + (row - chunk.offsets[0]) * chunk.length // max(1, chunk.sizes[0])

    def first_rows(self, name: str, start: int, stop: int) -> list[int]:
        """Return where to split rows ``[start, stop)``, ``start`` included, so that each part is in one file."""
        return sorted({max(start, chunk.offsets[0]) for chunk in self._chunks_over(name, start, stop)} | {start})

    def separate(self) -> "DcpFiles":
        """Return a copy with its own open files, for one thread."""
        other = copy(self)
        other._opened = {}
        return other

    def streaming(self) -> "DcpFiles":
        """Return a copy with its own open files, for one thread that reads sequentially.

        Its rows are verified only once ``verify_streamed`` has returned: a block is verified after all of it was read.
        """
        other = self.separate()
        other._streams = True
        return other

    def verify_streamed(self) -> None:
        """Verify all rows that a ``streaming`` copy has returned.

        Raises:
            UserError: a file is damaged.
        """
        for file in self._opened.values():
            file.verify_streamed()

    def close(self) -> None:
        """Close all files."""
        for file in self._opened.values():
            file.close()
        self._opened.clear()

    def _chunk(
        self, storage: Mapping[MetadataIndex, Any], name: str, offsets: tuple[int, ...], sizes: tuple[int, ...]
    ) -> Chunk:
        found = storage.get(MetadataIndex(name, torch.Size(offsets)))
        if found is None:
            raise UserError(f"{self.location}: {INDEX} has no file position of the part of {name!r} at {offsets}")
        return Chunk(offsets, sizes, found.relative_path, found.offset, found.length)

    def _read(self, chunk: Chunk, offset: int, out: torch.Tensor) -> None:
        file = self._file(chunk.file)
        if chunk not in self._data_starts:
            self._data_starts[chunk] = chunk.start + self._find_data(file, chunk, out.dtype)
        target = out.view(-1).view(torch.uint8).numpy().data
        (file.stream_into if self._streams else file.read_into)(self._data_starts[chunk] + offset, target)

    def _find_data(self, file: CheckedFile, chunk: Chunk, dtype: torch.dtype) -> int:
        """Return the offset of the values within the bytes that torch.save wrote for a chunk."""
        file.check_contains(chunk.start + chunk.length)
        with self._unpickling(chunk):
            # On the meta device torch.load reads the index alone and records each storage's position in the file.
            part = cast(IO[bytes], FilePart(file, chunk.start, chunk.length))
            saved = torch.load(part, map_location="meta", weights_only=True)
            if tuple(saved.shape) != chunk.sizes or saved.dtype != dtype or not saved.is_contiguous():
                raise ValueError(f"it is {tuple(saved.shape)} of {saved.dtype}, not {chunk.sizes} of {dtype}")
            return int(saved.untyped_storage()._checkpoint_offset) + saved.storage_offset() * saved.element_size()

    def _file(self, name: str) -> CheckedFile:
        if name in self._opened:
            self._opened[name] = self._opened.pop(name)  # least recently used first
        else:
            while len(self._opened) >= _MAX_OPEN_FILES:
                oldest = self._opened.pop(next(iter(self._opened)))
                oldest.verify_streamed()
                oldest.close()
            path = f"{str(self.location).rstrip('/')}/{name}"
            expected = None
            if self._files is not None:
                if name not in self._files:
                    raise UserError(f"{path}: the manifest does not list this file")
                expected = self._files[name]
            try:
                file = self._open_file(name)
            except FileNotFoundError:
                raise UserError(f"{path} is missing") from None
            except Exception as error:  # each fsspec implementation raises its own errors
                raise UserError(f"{path} cannot be read: {error or type(error).__name__}") from None
            self._opened[name] = CheckedFile(path, file, expected, self._verified.get(name))
        return self._opened[name]

    @contextmanager
    def _unpickling(self, chunk: Chunk) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # unpickling a damaged file can raise anything
            cause = " ".join(str(error).split()) or type(error).__name__
            where = f"{os.fspath(self.location)}/{chunk.file}"
            raise UserError(f"{where}: the bytes at {chunk.start:,} are not a saved tensor: {cause[:200]}") from None
