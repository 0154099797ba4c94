"""Files of torch.distributed.checkpoint, which `dcp.load` reads as they are."""

import pickle
from collections.abc import Mapping, Sequence
from typing import IO, cast

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.utils.serialization import config as serialization

from mlet_dist.checkpoint.writer import SummedStream
from mlet_dist.export.formats.tensor_shards import Piece, whole_shapes


class DcpFormat:
    """Each piece is what torch.save writes of it, wherever in a file it lies."""

    suffix = ".distcp"

    def write(
        self, stream: SummedStream, file: str, first_row: int, tensors: Mapping[str, torch.Tensor]
    ) -> list[Piece]:
        pieces = []
        for name, tensor in tensors.items():
            start = stream.tell()
            # torch.save would sum up each tensor once more, for a checksum that torch.load does not look at.
            with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
                torch.save(tensor, cast(IO[bytes], stream))
            offsets = (first_row, *[0] * tensor.dim())[: tensor.dim()]
            dtype = str(tensor.dtype).removeprefix("torch.")
            pieces.append(Piece(name, dtype, offsets, tuple(tensor.shape), file, start, stream.tell() - start))
        return pieces

    def join(self, stream: SummedStream, file: str, pieces: Sequence[Piece]) -> list[Piece]:
        joined, position = [], stream.tell()
        for piece in pieces:
            joined.append(piece.moved(file, position))
            position += piece.length
        return joined

    def index(self, pieces: Sequence[Piece]) -> tuple[str, bytes]:
        tensors: dict[str, TensorStorageMetadata] = {}
        places = {}
        shapes = whole_shapes(pieces)
        for piece in pieces:
            offsets = torch.Size(piece.offsets)
            if piece.name not in tensors:
                properties = TensorProperties(dtype=piece.torch_dtype)
                tensors[piece.name] = TensorStorageMetadata(properties, torch.Size(shapes[piece.name]), [])
            tensors[piece.name].chunks.append(ChunkStorageMetadata(offsets, torch.Size(piece.sizes)))
            places[MetadataIndex(piece.name, offsets)] = _StorageInfo(piece.file, piece.start, piece.length)
        paths = {name: (name,) for name in tensors}
        return ".metadata", pickle.dumps(Metadata(dict(tensors), planner_data=paths, storage_data=places), protocol=4)
