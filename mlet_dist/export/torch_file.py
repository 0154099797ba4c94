"""Tensors of a state dict that torch.save wrote, mapped into memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from mlet_dist.errors import UserError
from mlet_dist.training.checkpoint.chunked import Chunk, ChunkedTensors, StoredTensor


class TorchFile(ChunkedTensors):
    """The tensors of a state dict in one file; nested dicts are joined by points, what is no tensor is left out.

    Args:
        path: written by torch.save in its format since 1.6.

    Raises:
        UserError: the file is missing, damaged, or holds more than plain data: a pickled class is never loaded.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except FileNotFoundError:
            raise UserError(f"{path} is missing") from None
        except Exception as error:  # a damaged file raises anything
            said = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path}: not a state dict that torch.save wrote: {said[:200]}") from None
        if not isinstance(state, Mapping):
            raise UserError(f"{path}: holds a {type(state).__name__}; save a state dict, of tensors by name")
        self._state: dict[str, torch.Tensor] = {}
        for name, tensor in _flat(state, ""):
            self._state[name] = tensor
            self.tensors[name] = StoredTensor(tuple(tensor.shape), tensor.dtype)
            self._chunks[name] = [Chunk((0,) * tensor.dim(), tuple(tensor.shape), name, 0, tensor.nbytes)]

    def close(self) -> None:
        """Let go of the file."""
        self._state.clear()

    def _read(self, chunk: Chunk, offset: int, out: torch.Tensor) -> None:
        stored = self._state[chunk.file]
        if offset or out.shape != stored.shape:
            start = offset // (stored.shape[1] * stored.element_size())
            stored = stored[start : start + len(out)]
        out.copy_(stored)


def _flat(state: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor) and value.layout == torch.strided:
            yield f"{prefix}{key}", value
