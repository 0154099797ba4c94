"""safetensors files, read and written: 8 bytes of length, a JSON header, the values."""

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mlet_dist.checkpoint.checked_file import CheckedFile
from mlet_dist.checkpoint.tensor_ranges import Chunk, ChunkedTensors, StoredTensor
from mlet_dist.checkpoint.writer import SummedStream
from mlet_dist.errors import UserError
from mlet_dist.export.formats.tensor_shards import Piece, whole_shapes

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
"""By the format's name; what a table or a dense layer may be of."""
_MOST_OPEN = 2  # each may hold a block in memory
_LENGTH_BYTES, _MOST_HEADER_BYTES = 8, 100_000_000  # the format's own limit


class SafetensorsFiles(ChunkedTensors):
    """The tensors of safetensors files (format: 8 bytes of length, a JSON header, the values).

    A tensor may lie in parts in several files, where their headers say at which offsets, as torch's
    HuggingFaceStorageWriter notes it (``DCP_SHARDING_INFO``).

    Args:
        path: a ``.safetensors`` file, a ``.safetensors.index.json``, or a directory of them; only an index tells
            that a file is missing.
        files: name -> the manifest's entry, by which what is read is checked; None where there is no manifest.

    Raises:
        UserError: a file is missing or no safetensors file, or two files hold the same tensor.
    """

    def __init__(self, path: Path, files: Mapping[str, Any] | None = None) -> None:
        super().__init__(path)
        self._files = files
        self._opened: dict[str, CheckedFile] = {}
        self._placed: set[tuple[str, tuple[int, ...]]] = set()
        for file in _files_of(path):
            self._add(file)

    def close(self) -> None:
        """Close all files."""
        for file in self._opened.values():
            file.close()
        self._opened.clear()

    def _add(self, path: Path) -> None:
        file = self._file(str(path))
        try:
            header, data = _header(file)
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
                continue  # of a kind that no table has
            if end - begin != torch.Size(shape).numel() * dtype.itemsize or data + end > file.size:
                raise UserError(f"{path}: {name!r} is {shape} of {dtype}, which its {end - begin:,} bytes are not")
            self._place(path, name, dtype, Chunk(offsets[name], shape, str(path), data + begin, end - begin))

    def _place(self, path: Path, name: str, dtype: torch.dtype, chunk: Chunk) -> None:
        ends = [offset + size for offset, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        before = self.tensors.get(name)
        if before is not None:
            if before.dtype != dtype or len(before.shape) != len(ends) or (name, chunk.offsets) in self._placed:
                raise UserError(f"{path}: holds {name!r}, as another file of {self.location} does")
            ends = [max(pair) for pair in zip(ends, before.shape, strict=True)]
        self._placed.add((name, chunk.offsets))
        self.tensors[name] = StoredTensor(tuple(ends), dtype)
        self._chunks.setdefault(name, []).append(chunk)

    def _read(self, chunk: Chunk, offset: int, out: torch.Tensor) -> None:
        target = out.view(-1).view(torch.uint8).numpy().data
        self._file(chunk.file).read_into(chunk.start + offset, target)

    def _file(self, name: str) -> CheckedFile:
        if name in self._opened:
            self._opened[name] = self._opened.pop(name)  # the last one used is the last one
            return self._opened[name]
        while len(self._opened) >= _MOST_OPEN:
            self._opened.pop(next(iter(self._opened))).close()
        path = Path(name)
        if self._files is not None and path.name not in self._files:
            raise UserError(f"{path}: the manifest does not know this file")
        try:
            raw = path.open("rb")
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        self._opened[name] = CheckedFile(name, raw, None if self._files is None else self._files[path.name])
        return self._opened[name]


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        named = {file for index in path.glob("*.safetensors.index.json") for file in _named_by(index)}
        return sorted(named | set(path.glob("*.safetensors")))
    return _named_by(path) if path.suffix == ".json" else [path]


def _named_by(path: Path) -> list[Path]:
    """The files that an index names."""
    try:
        names = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an index of safetensors files: {error!r}") from None
    return [path.parent / name for name in names]


def _header(file: CheckedFile) -> tuple[dict[str, Any], int]:
    """What a file says of its tensors, and where their values begin."""
    length = bytearray(_LENGTH_BYTES)
    file.read_into(0, memoryview(length))
    (size,) = struct.unpack("<Q", length)
    if size > min(_MOST_HEADER_BYTES, file.size):
        raise ValueError(f"a header of {size:,} bytes")
    text = bytearray(size)
    file.read_into(_LENGTH_BYTES, memoryview(text))
    header = json.loads(text.decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return header, _LENGTH_BYTES + size


_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 64


class SafetensorsFormat:
    """A piece is its values alone; the header says which rows they are."""

    suffix = ".safetensors"

    def write(
        self, stream: SummedStream, file: str, first_row: int, tensors: Mapping[str, torch.Tensor]
    ) -> list[Piece]:
        pieces = []
        for name, tensor in tensors.items():
            offsets = (first_row, *[0] * tensor.dim())[: tensor.dim()]
            dtype = str(tensor.dtype).removeprefix("torch.")
            pieces.append(Piece(name, dtype, offsets, tuple(tensor.shape), file, 0, tensor.nbytes))
        placed = _begin(stream, pieces)
        for tensor in tensors.values():
            stream.write(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return placed

    def join(self, stream: SummedStream, file: str, pieces: Sequence[Piece]) -> list[Piece]:
        shapes = whole_shapes(pieces)
        lengths = dict.fromkeys(shapes, 0)
        for piece in pieces:
            lengths[piece.name] += piece.length
        dtypes = {piece.name: piece.dtype for piece in pieces}
        whole = [
            Piece(name, dtypes[name], (0,) * len(shape), shape, file, 0, lengths[name])
            for name, shape in shapes.items()
        ]
        return _begin(stream, whole)

    def index(self, pieces: Sequence[Piece]) -> tuple[str, bytes]:
        """``weight_map``, as everyone reads it, for tensors that lie whole in one file; ``shards`` for all.

        A shard is ``file``, ``offsets`` and ``shape``.
        """
        shapes = whole_shapes(pieces)
        content: dict[str, Any] = {"metadata": {"total_size": sum(piece.length for piece in pieces)}}
        content["weight_map"] = {piece.name: piece.file for piece in pieces if piece.sizes == shapes[piece.name]}
        content["shards"] = {name: [] for name in shapes}
        for piece in pieces:
            content["shards"][piece.name].append({"file": piece.file, "offsets": piece.offsets, "shape": piece.sizes})
        return "model.safetensors.index.json", (json.dumps(content, indent=1) + "\n").encode()


def _begin(stream: SummedStream, pieces: Sequence[Piece]) -> list[Piece]:
    """Write the header of a file that holds ``pieces`` in this order; the same pieces, placed."""
    offsets = json.dumps({piece.name: {"saved_offsets": piece.offsets} for piece in pieces})
    header: dict[str, Any] = {"__metadata__": {"DCP_SHARDING_INFO": offsets, "DCP_VERSION": "1.0", "format": "pt"}}
    position = 0
    for piece in pieces:
        place = [position, position + piece.length]
        header[piece.name] = {"dtype": _NAMES[piece.torch_dtype], "shape": piece.sizes, "data_offsets": place}
        position += piece.length
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    stream.write(struct.pack("<Q", len(text)) + text)
    placed, position = [], stream.tell()
    for piece in pieces:
        placed.append(piece.moved(piece.file, position))
        position += piece.length
    return placed
