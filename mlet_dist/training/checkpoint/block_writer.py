"""A checkpoint written by one process, block of rows by block of rows: its tensors may be larger than memory."""

import pickle
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import IO, Any, cast

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

from mlet_dist.errors import UserError
from mlet_dist.training.checkpoint.loading import MODEL_KEY, first_cause
from mlet_dist.training.checkpoint.manifest import Manifest
from mlet_dist.training.checkpoint.store import Checkpoint
from mlet_dist.training.checkpoint.writing import SummedStream

METADATA = ".metadata"


class BlockWriter:
    """Writes a model's tensors into a new checkpoint, in the format of torch.distributed.checkpoint.

    Each block of rows is a part of its tensor, as a rank's shard would be, so whatever loads a sharded checkpoint loads
    this one, and needs memory for one block beside what it keeps.

    Args:
        checkpoint: what is there of it is taken away first.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._files: dict[str, dict[str, Any]] = {}
        checkpoint.begin()

    @contextmanager
    def file(self, name: str) -> Iterator["BlockFile"]:
        """A new file of the checkpoint; it is on the disk when the block ends.

        Raises:
            UserError: it cannot be written.
        """
        with self._checkpoint.open_new(name) as raw:
            stream = SummedStream(raw)
            yield BlockFile(name, stream, self._tensors, self._places, f"{self._checkpoint}/{name}")
            self._files[name] = stream.checksum.entry()

    def finish(self, about: Mapping[str, Any]) -> None:
        """Mark the checkpoint whole; ``about`` goes into its manifest."""
        paths = {name: (MODEL_KEY, name.removeprefix(f"{MODEL_KEY}.")) for name in self._tensors}
        metadata = Metadata(dict(self._tensors), planner_data=paths, storage_data=dict(self._places))
        with self._checkpoint.open_new(METADATA) as raw:
            stream = SummedStream(raw)
            stream.write(pickle.dumps(metadata))
            self._files[METADATA] = stream.checksum.entry()
        self._checkpoint.finish(Manifest(self._checkpoint.step, self._files, about))


class BlockFile:
    """One file of a checkpoint that is being written."""

    def __init__(
        self,
        name: str,
        stream: SummedStream,
        tensors: dict[str, TensorStorageMetadata],
        places: dict[MetadataIndex, _StorageInfo],
        path: str,
    ) -> None:
        self._name, self._stream, self._tensors, self._places, self._path = name, stream, tensors, places, path

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, blocks: Iterable[torch.Tensor]) -> None:
        """Write a tensor of the model.

        Args:
            name: its state name.
            blocks: all of it in order, cut along the first dimension; on the CPU.

        Raises:
            ValueError: the blocks are not of ``shape`` and ``dtype``.
            UserError: the file cannot be written.
        """
        full, rows, chunks = f"{MODEL_KEY}.{name}", 0, []
        for block in blocks:
            if block.dtype != dtype or tuple(block.shape[1:]) != shape[1:]:
                raise ValueError(f"{name}: a block is {tuple(block.shape)} of {block.dtype}, of {shape} of {dtype}")
            offsets = torch.Size([rows, *[0] * (len(shape) - 1)][: len(shape)])
            start = self._stream.tell()
            self._save(block)
            self._places[MetadataIndex(full, offsets)] = _StorageInfo(self._name, start, self._stream.tell() - start)
            chunks.append(ChunkStorageMetadata(offsets, block.shape))
            rows += len(block) if shape else 0
        if shape and rows != shape[0]:
            raise ValueError(f"{name}: the blocks have {rows} rows instead of {shape[0]}")
        self._tensors[full] = TensorStorageMetadata(TensorProperties(dtype), torch.Size(shape), chunks)

    def _save(self, block: torch.Tensor) -> None:
        try:
            # Of a view torch.save would write the whole tensor; and its checksum is one that torch.load never looks at.
            with serialization.patch({"save.compute_crc32": False}):  # type: ignore[attr-defined]
                torch.save(block.clone() if block._is_view() else block, cast(IO[bytes], self._stream))
        except Exception as error:  # torch.save hides the OSError
            raise UserError(f"{self._path}: cannot be written: {first_cause(error)}") from None
