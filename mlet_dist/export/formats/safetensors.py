"""safetensors files: 8 bytes of length, a JSON header, the values.

A tensor in several files is marked as torch's HuggingFaceStorageWriter does it (torch/distributed/checkpoint/
_hf_utils.py), so that its reader finds the parts.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mlet_dist.checkpoint.writer import SummedStream
from mlet_dist.export.formats.pieces import Piece, whole_shapes
from mlet_dist.export.formats.safetensors_files import DTYPES

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
