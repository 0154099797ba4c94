"""A checkpoint written by one process, block of rows by block of rows: its tensors may be larger than memory."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mlet_dist.checkpoint.load import MODEL_KEY, first_cause
from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.checkpoint.store import Checkpoint
from mlet_dist.checkpoint.writer import SummedStream
from mlet_dist.errors import UserError
from mlet_dist.export.formats.dcp import DcpFormat
from mlet_dist.export.formats.pieces import Piece


class BlockWriter:
    """Writes a model's tensors into a new checkpoint, in the format of torch.distributed.checkpoint.

    Each block of rows is a part of its tensor, as a rank's shard would be, so whatever loads a sharded checkpoint loads
    this one, and needs memory for one block beside what it keeps.

    Args:
        checkpoint: what is there of it is taken away first.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._format = checkpoint, DcpFormat()
        self._pieces: list[Piece] = []
        self._files: dict[str, dict[str, Any]] = {}
        checkpoint.begin()

    @contextmanager
    def file(self, name: str) -> Iterator["BlockFile"]:
        """A new file of the checkpoint, by its name less the suffix; it is on the disk when the block ends."""
        name = f"{name}{self._format.suffix}"
        with self._checkpoint.open_new(name) as raw:
            stream = SummedStream(raw)
            yield BlockFile(f"{self._checkpoint}/{name}", name, stream, self._format, self._pieces)
            self._files[name] = stream.checksum.entry()

    def finish(self, about: Mapping[str, Any]) -> None:
        """Mark the checkpoint whole; ``about`` goes into its manifest."""
        name, content = self._format.index(self._pieces)
        with self._checkpoint.open_new(name) as raw:
            stream = SummedStream(raw)
            stream.write(content)
            self._files[name] = stream.checksum.entry()
        self._checkpoint.finish(Manifest(self._checkpoint.step, self._files, about))


class BlockFile:
    """One file of a checkpoint that is being written."""

    def __init__(self, path: str, name: str, stream: SummedStream, format: DcpFormat, pieces: list[Piece]) -> None:
        self._path, self._name, self._stream, self._format, self._pieces = path, name, stream, format, pieces

    def add(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Write a tensor of the model.

        Args:
            name: its state name.
            blocks: all of it in order, cut along the first dimension; on the CPU.

        Raises:
            UserError: the file cannot be written.
        """
        row = 0
        for block in blocks:
            # Of a view torch.save would write all that it is a view of.
            tensors = {f"{MODEL_KEY}.{name}": block.clone() if block._is_view() else block}
            try:
                self._pieces += self._format.write(self._stream, self._name, row, tensors)
            except Exception as error:  # torch.save hides the OSError
                raise UserError(f"{self._path}: cannot be written: {first_cause(error)}") from None
            row += len(block) if block.dim() else 0
