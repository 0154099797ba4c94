"""Read and write safetensors files: 8 bytes with the length of the header, a JSON header, the values."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlet_dist.checkpoint.checked_file import CheckedFile
from mlet_dist.checkpoint.tensor_ranges import Chunk, ChunkedTensors, StoredTensor
from mlet_dist.checkpoint.writer import ChecksumStream
from mlet_dist.errors import UserError
from mlet_dist.export.formats.tensor_shards import TensorShard, full_shapes
from mlet_dist.formatting import load_json
from mlet_dist.regular_file import open_regular

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of tables and dense layers, by their names in the format."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH_BYTES, _MAX_HEADER_BYTES = 8, 100_000_000  # the format's limit
_ALIGNMENT = 64
_MAX_OPEN_FILES = 2  # each may cache a block in memory


class SafetensorsFiles(ChunkedTensors):
    """The tensors of safetensors files.

    A tensor may be sharded over several files whose headers contain the shards' offsets in ``DCP_SHARDING_INFO``, as
    written by torch's HuggingFaceStorageWriter.

    Args:
        path: a ``.safetensors`` file, a ``.safetensors.index.json``, or a directory of them. A missing file is noticed
            only if there is an index.
        files: name -> the manifest's entry, to verify reads; None if there is no manifest.

    Raises:
        UserError: a file is missing or is not a safetensors file, or two files contain the same tensor.
    """

    def __init__(self, path: Path, files: Mapping[str, Any] | None = None) -> None:
        super().__init__(path)
        self._files = files
        self._opened: dict[str, CheckedFile] = {}
        self._placed: set[tuple[str, tuple[int, ...]]] = set()
        for file in _list_files(path):
            self._add_file(file)

    def close(self) -> None:
        """Close all files."""
        for file in self._opened.values():
            file.close()
        self._opened.clear()

    def _add_file(self, path: Path) -> None:
        file = self._file(str(path))
        try:
            header, data = _read_header(file)
            extra = header.pop("__metadata__", {})
            offsets_of = json.loads(extra.get("DCP_SHARDING_INFO", "{}"))
            entries = [
                (name, DTYPES.get(entry["dtype"]), tuple(entry["shape"]), *entry["data_offsets"])
                for name, entry in header.items()
            ]
            offsets = {
                name: tuple(offsets_of[name]["saved_offsets"] if name in offsets_of else [0] * len(shape))
                for name, _, shape, _, _ in entries
            }
        except UserError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a safetensors file: {error!r}") from None
        for name, dtype, shape, begin, end in entries:
            if dtype is None:
                continue  # no table has this dtype
            if end - begin != torch.Size(shape).numel() * dtype.itemsize or data + end > file.size:
                raise UserError(f"{path}: {name!r} is {shape} of {dtype}, but has {end - begin:,} bytes")
            self._add_chunk(path, name, dtype, Chunk(offsets[name], shape, str(path), data + begin, end - begin))

    def _add_chunk(self, path: Path, name: str, dtype: torch.dtype, chunk: Chunk) -> None:
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        before = self.tensors.get(name)
        if before is not None:
            if before.dtype != dtype or len(before.shape) != len(ends) or (name, chunk.offsets) in self._placed:
                raise UserError(f"{path}: holds {name!r}, which another file of {self.location} holds, too")
            ends = [max(pair) for pair in zip(ends, before.shape, strict=True)]
        self._placed.add((name, chunk.offsets))
        self.tensors[name] = StoredTensor(tuple(ends), dtype)
        self._chunks.setdefault(name, []).append(chunk)

    def _read(self, chunk: Chunk, offset: int, out: torch.Tensor) -> None:
        target = out.view(-1).view(torch.uint8).numpy().data
        self._file(chunk.file).read_into(chunk.start + offset, target)

    def _file(self, name: str) -> CheckedFile:
        if name in self._opened:
            self._opened[name] = self._opened.pop(name)  # least recently used first
            return self._opened[name]
        while len(self._opened) >= _MAX_OPEN_FILES:
            self._opened.pop(next(iter(self._opened))).close()
        path = Path(name)
        if self._files is not None and path.name not in self._files:
            raise UserError(f"{path}: the manifest does not list this file")
        try:
            raw = open_regular(path)
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        self._opened[name] = CheckedFile(name, raw, None if self._files is None else self._files[path.name])
        return self._opened[name]


def _list_files(path: Path) -> list[Path]:
    if path.is_dir():
        indexed = {file for index in path.glob("*.safetensors.index.json") for file in _indexed_files(index)}
        return sorted(indexed | set(path.glob("*.safetensors")))
    return _indexed_files(path) if path.suffix == ".json" else [path]


def _indexed_files(path: Path) -> list[Path]:
    """Return the files that an index lists."""
    try:
        names = sorted(set(load_json(path)["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an index of safetensors files: {error!r}") from None
    return [path.parent / name for name in names]


def _read_header(file: CheckedFile) -> tuple[dict[str, Any], int]:
    """Return the header of a file and the position of the first value."""
    length = bytearray(_LENGTH_BYTES)
    file.read_into(0, memoryview(length))
    (size,) = struct.unpack("<Q", length)
    if size > min(_MAX_HEADER_BYTES, file.size):
        raise ValueError(f"its header has {size:,} bytes")
    text = bytearray(size)
    file.read_into(_LENGTH_BYTES, memoryview(text))
    header = json.loads(text.decode())
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    return header, _LENGTH_BYTES + size


class SafetensorsFormat:
    """The ``Format`` in which shards are raw values, and the header of a file contains their offsets."""

    suffix = ".safetensors"

    def write(
        self, stream: ChecksumStream, file: str, first_row: int, tensors: Mapping[str, torch.Tensor]
    ) -> list[TensorShard]:
        shards = []
        for name, tensor in tensors.items():
            offsets = (first_row, *[0] * tensor.dim())[: tensor.dim()]
            dtype = str(tensor.dtype).removeprefix("torch.")
            shards.append(TensorShard(name, dtype, offsets, tuple(tensor.shape), file, 0, tensor.nbytes))
        placed = _write_header(stream, shards)
        for tensor in tensors.values():
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return placed

    def join(self, stream: ChecksumStream, file: str, shards: Sequence[TensorShard]) -> list[TensorShard]:
        shapes = full_shapes(shards)
        lengths = dict.fromkeys(shapes, 0)
        for shard in shards:
            lengths[shard.name] += shard.length
        dtypes = {shard.name: shard.dtype for shard in shards}
        joined = [
            TensorShard(name, dtypes[name], (0,) * len(shape), shape, file, 0, lengths[name])
            for name, shape in shapes.items()
        ]
        return _write_header(stream, joined)

    def index(self, shards: Sequence[TensorShard]) -> tuple[str, bytes]:
        """Return an index with ``weight_map``, the common format, for unsharded tensors, and ``shards`` for all.

        An entry of ``shards`` has ``file``, ``offsets`` and ``shape``.
        """
        shapes = full_shapes(shards)
        content: dict[str, Any] = {"metadata": {"total_size": sum(shard.length for shard in shards)}}
        content["weight_map"] = {shard.name: shard.file for shard in shards if shard.sizes == shapes[shard.name]}
        content["shards"] = {name: [] for name in shapes}
        for shard in shards:
            content["shards"][shard.name].append({"file": shard.file, "offsets": shard.offsets, "shape": shard.sizes})
        return "model.safetensors.index.json", (json.dumps(content, indent=1) + "\n").encode()


def _write_header(stream: ChecksumStream, shards: Sequence[TensorShard]) -> list[TensorShard]:
    """Write the header of a file that will contain ``shards`` in this order; return them with their positions."""
    offsets = json.dumps({shard.name: {"saved_offsets": shard.offsets} for shard in shards})
    header: dict[str, Any] = {"__metadata__": {"DCP_SHARDING_INFO": offsets, "DCP_VERSION": "1.0", "format": "pt"}}
    position = 0
    for shard in shards:
        data_offsets = [position, position + shard.length]
        header[shard.name] = {"dtype": _NAMES[shard.torch_dtype], "shape": shard.sizes, "data_offsets": data_offsets}
        position += shard.length
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + _LENGTH_BYTES) % _ALIGNMENT)
    stream.write(struct.pack("<Q", len(text)) + text)
    placed, position = [], stream.tell()
    for shard in shards:
        placed.append(shard.moved(shard.file, position))
        position += shard.length
    return placed
