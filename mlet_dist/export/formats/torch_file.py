"""Tensors of a state dict that torch.save wrote, read from its file by ranges of rows."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mlet_dist.checkpoint.checked_file import CheckedFile
from mlet_dist.checkpoint.tensor_ranges import Chunk, ChunkedTensors, StoredTensor
from mlet_dist.errors import UserError


class TorchFile(ChunkedTensors):
    """The tensors of a state dict in one file; nested dicts are joined by points, what is no tensor is left out.

    Only the index is unpickled, and plain data at that. Values are read from where they lie: mapped into memory, all
    that was read would count as memory of the process.

    Args:
        path: written by torch.save in its format since 1.6.

    Raises:
        UserError: the file is missing, damaged, of the format before that, or holds more than plain data.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._stored: dict[str, torch.Tensor] = {}
        try:
            raw = path.open("rb")
        except OSError as error:
            said = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise UserError(f"{path} {said}") from None
        self._file = CheckedFile(str(path), raw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a scripted model is an error below
                state = torch.load(path, map_location="meta", weights_only=True)
            if not isinstance(state, Mapping):
                raise UserError(f"{path}: holds a {type(state).__name__}; save a state dict, of tensors by name")
            for name, tensor in _flat(state, ""):
                self._stored[name] = tensor
                begin = tensor.untyped_storage()._checkpoint_offset
                if begin is None:
                    raise UserError(f"{path}: is in torch.save's format before 1.6; torch.load it and save it again")
                start = int(begin) + int(tensor.storage_offset()) * tensor.itemsize
                chunk = Chunk((0,) * tensor.dim(), tuple(tensor.shape), name, start, tensor.nbytes)
                self.tensors[name], self._chunks[name] = StoredTensor(chunk.sizes, tensor.dtype), [chunk]
        except UserError:
            self.close()
            raise
        except Exception as error:  # a damaged file raises anything
            self.close()
            said = " ".join(str(error).split(". ")[0].split())
            raise UserError(
                f"{path}: not a state dict that torch.save wrote, or damaged, or of more than plain tensors: "
                f"{type(error).__name__}: {said[:200]}"
            ) from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, chunk: Chunk, offset: int, out: torch.Tensor) -> None:
        stored = self._stored[chunk.file]
        if stored.is_contiguous():
            self._file.read_into(chunk.start + offset, _bytes(out))
            return
        if stored.dim() != 2 or stored.stride(1) != 1:
            raise UserError(f"{self.location}: {chunk.file!r} does not lie there row by row; save it as .contiguous()")
        step, (rows, columns) = stored.stride(0), out.shape
        first = offset // (columns * out.element_size())
        around = torch.empty((rows - 1) * step + columns, dtype=out.dtype)
        self._file.read_into(chunk.start + first * step * out.element_size(), _bytes(around))
        out.copy_(around.as_strided((rows, columns), (step, 1)))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _flat(state: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
            yield f"{prefix}{key}", value
