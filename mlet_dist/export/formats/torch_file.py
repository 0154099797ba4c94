"""Read ranges of rows of a state dict's tensors from a file that torch.save wrote."""

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mlet_dist.checkpoint.checked_file import CheckedFile
from mlet_dist.checkpoint.tensor_ranges import Chunk, ChunkedTensors, StoredTensor
from mlet_dist.errors import UserError
from mlet_dist.regular_file import open_regular


class TorchFile(ChunkedTensors):
    """The tensors of a state dict in one file. Keys of nested dicts are joined by dots; other values are ignored.

    Only the index is unpickled, with ``weights_only``. Values are read from the file and not mapped into memory, where
    all pages that were read would count as memory of the process.

    Args:
        path: written by torch.save in its format since 1.6.

    Raises:
        UserError: the file is missing, damaged or in the older format, or contains more than plain data.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._stored: dict[str, torch.Tensor] = {}
        try:
            raw = open_regular(path)
        except OSError as error:
            problem = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise UserError(f"{path} {problem}") from None
        self._file = CheckedFile(str(path), raw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of a scripted model, which is an error below
                state = torch.load(path, map_location="meta", weights_only=True)
            if not isinstance(state, Mapping):
                raise UserError(f"{path}: holds a {type(state).__name__}; save a state dict, name -> tensor")
            for name, tensor in _flatten(state, ""):
                self._stored[name] = tensor
                begin = tensor.untyped_storage()._checkpoint_offset
                if begin is None:
                    raise UserError(
                        f"{path}: is in the format of torch.save before 1.6; load it with torch.load and save it again"
                    )
                start = int(begin) + int(tensor.storage_offset()) * tensor.itemsize
                chunk = Chunk((0,) * tensor.dim(), tuple(tensor.shape), name, start, tensor.nbytes)
                self.tensors[name], self._chunks[name] = StoredTensor(chunk.sizes, tensor.dtype), [chunk]
        except UserError:
            self.close()
            raise
        except Exception as error:  # unpickling a damaged file can raise anything
            self.close()
            cause = " ".join(str(error).split(". ")[0].split())
            raise UserError(
                f"{path}: not a state dict that torch.save wrote, or it is damaged or contains more than plain "
                f"tensors: {type(error).__name__}: {cause[:200]}"
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
            raise UserError(f"{self.location}: {chunk.file!r} is not stored row by row; save it as .contiguous()")
        step, (rows, columns) = stored.stride(0), out.shape
        first = offset // (columns * out.element_size())
        around = torch.empty((rows - 1) * step + columns, dtype=out.dtype)
        self._file.read_into(chunk.start + first * step * out.element_size(), _bytes(around))
        out.copy_(around.as_strided((rows, columns), (step, 1)))


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _flatten(state: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
            yield f"{prefix}{key}", value
