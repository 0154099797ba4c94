"""Rows of the tables of an export's outputs, from its files as they lie."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from mlet_dist.errors import UserError
from mlet_dist.export.encoding import Encoding
from mlet_dist.training.checkpoint.checked_file import CheckedFile
from mlet_dist.training.checkpoint.tensor_files import TensorFiles


class StoredTensors(Protocol):
    """Tensors on disk."""

    def read_rows(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill ``out``, contiguous, with a tensor's rows from ``start`` on."""

    def load(self, name: str) -> torch.Tensor:
        """One whole tensor."""

    def close(self) -> None:
        """Close all files."""


class SafetensorsFiles:
    """The tensors of an export's safetensors files, by its index.

    Args:
        directory: of the output.
        files: name -> the manifest's entry, by which what is read is checked.

    Raises:
        UserError: here and in reading: a file is missing or damaged.
    """

    def __init__(self, directory: Path, files: Mapping[str, Any]) -> None:
        self._directory, self._files = directory, files
        self._opened: dict[str, tuple[CheckedFile, int, dict[str, Any]]] = {}
        index = next(name for name in files if name.endswith(".index.json"))
        content = CheckedFile(f"{directory}/{index}", self._open(index), files[index])
        self._shards: dict[str, list[dict[str, Any]]] = json.loads(_read(content, 0, content.size))["shards"]
        content.close()

    def read_rows(self, name: str, start: int, out: torch.Tensor) -> None:
        """Fill ``out`` ``(rows, columns)`` with rows from ``start`` on."""
        self._fill(name, start, out)

    def load(self, name: str) -> torch.Tensor:
        """One whole float32 tensor."""
        shard = self._shards_of(name)[0]
        tensor = torch.empty(shard["shape"])
        self._fill(name, 0, tensor)
        return tensor

    def close(self) -> None:
        """Close all files."""
        for file, _, _ in self._opened.values():
            file.close()
        self._opened.clear()

    def _fill(self, name: str, start: int, out: torch.Tensor) -> None:
        stop, covered = start + len(out), 0
        for shard in self._shards_of(name):
            offset, rows = shard["offsets"][0], shard["shape"][0]
            first, last = max(start, offset), min(stop, offset + rows)
            if first >= last:
                continue
            file, data, header = self._file(shard["file"])
            begin, end = header[name]["data_offsets"]
            row_bytes = (end - begin) // rows
            target = out[first - start : last - start].view(-1).view(torch.uint8).numpy().data
            file.read_into(data + begin + (first - offset) * row_bytes, target)
            covered += last - first
        if covered != len(out):
            raise UserError(f"{self._directory}: holds {covered:,} of {len(out):,} rows of {name!r} from {start:,} on")

    def _shards_of(self, name: str) -> list[dict[str, Any]]:
        if name not in self._shards:
            raise UserError(f"{self._directory}: holds no tensor {name!r}")
        return self._shards[name]

    def _file(self, name: str) -> tuple[CheckedFile, int, dict[str, Any]]:
        """An open file, where its data begin, and its header."""
        if name not in self._opened:
            file = CheckedFile(f"{self._directory}/{name}", self._open(name), self._files[name])
            (length,) = struct.unpack("<Q", _read(file, 0, 8))
            self._opened[name] = file, 8 + length, json.loads(_read(file, 8, length))
        return self._opened[name]

    def _open(self, name: str) -> Any:
        try:
            return (self._directory / name).open("rb")
        except FileNotFoundError:
            raise UserError(f"{self._directory}/{name} is missing") from None


def open_output(directory: Path, files: Mapping[str, Any], format: str) -> StoredTensors:
    """The tensors of an output; ``files`` and ``format`` as the manifest has them.

    Raises:
        UserError: a file is missing or damaged.
    """
    if format == "safetensors":
        return SafetensorsFiles(directory, files)
    return TensorFiles(directory, lambda name: (directory / name).open("rb"), files)


def read_parts(
    stored: StoredTensors, encoding: Encoding, state_name: str, start: int, stop: int, embedding_dim: int
) -> dict[str, torch.Tensor]:
    """Rows ``[start, stop)`` of a table, by suffix, as ``Encoding.encode`` gave them."""
    parts = {}
    for suffix, part in encoding.parts(embedding_dim).items():
        parts[suffix] = torch.empty(stop - start, part.columns, dtype=part.dtype)
        stored.read_rows(f"{state_name}{suffix}", start, parts[suffix])
    return parts


def _read(file: CheckedFile, start: int, length: int) -> bytes:
    data = bytearray(length)
    file.read_into(start, memoryview(data))
    return bytes(data)
