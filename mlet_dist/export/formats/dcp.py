"""Write files in the format of torch.distributed.checkpoint, which ``dcp.load`` reads."""

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

from mlet_dist.checkpoint.tensor_ranges import INDEX
from mlet_dist.checkpoint.writer import ChecksumStream
from mlet_dist.export.formats.tensor_shards import TensorShard, full_shapes


class DcpFormat:
    """The ``Format`` in which each shard is written by torch.save, at any position of a file."""

    suffix = ".distcp"

    def write(
        self, stream: ChecksumStream, file: str, first_row: int, tensors: Mapping[str, torch.Tensor]
    ) -> list[TensorShard]:
        shards = []
        for name, tensor in tensors.items():
            start = stream.tell()
            # torch.load ignores the checksums that torch.save would compute.
            with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
                torch.save(tensor, cast(IO[bytes], stream))
            offsets = (first_row, *[0] * tensor.dim())[: tensor.dim()]
            dtype = str(tensor.dtype).removeprefix("torch.")
            shards.append(TensorShard(name, dtype, offsets, tuple(tensor.shape), file, start, stream.tell() - start))
        return shards

    def join(self, stream: ChecksumStream, file: str, shards: Sequence[TensorShard]) -> list[TensorShard]:
        joined, position = [], stream.tell()
        for shard in shards:
            joined.append(shard.moved(file, position))
            position += shard.length
        return joined

    def index(self, shards: Sequence[TensorShard]) -> tuple[str, bytes]:
        tensors: dict[str, TensorStorageMetadata] = {}
        storage = {}
        shapes = full_shapes(shards)
        for shard in shards:
            offsets = torch.Size(shard.offsets)
            if shard.name not in tensors:
                properties = TensorProperties(dtype=shard.torch_dtype)
                tensors[shard.name] = TensorStorageMetadata(properties, torch.Size(shapes[shard.name]), [])
            tensors[shard.name].chunks.append(ChunkStorageMetadata(offsets, torch.Size(shard.sizes)))
            storage[MetadataIndex(shard.name, offsets)] = _StorageInfo(shard.file, shard.start, shard.length)
        paths = {name: (name,) for name in tensors}
        return INDEX, pickle.dumps(Metadata(dict(tensors), planner_data=paths, storage_data=storage), protocol=4)
