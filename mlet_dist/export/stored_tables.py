"""Rows of the tables of an export's outputs, from its files as they lie."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors, TensorFiles
from mlet_dist.export.encoding import Encoding
from mlet_dist.export.formats.safetensors_files import SafetensorsFiles


def open_output(directory: Path, files: Mapping[str, Any], format: str) -> ChunkedTensors:
    """The tensors of an output; ``files`` and ``format`` as the manifest has them.

    What is read is checked as it is read.

    Raises:
        UserError: a file is missing or damaged.
    """
    if format == "safetensors":
        return SafetensorsFiles(directory, files)
    return TensorFiles(directory, lambda name: (directory / name).open("rb"), files)


def read_parts(
    stored: ChunkedTensors, encoding: Encoding, state_name: str, start: int, stop: int, embedding_dim: int
) -> dict[str, torch.Tensor]:
    """Rows ``[start, stop)`` of a table, by suffix, as ``Encoding.encode`` gave them."""
    parts = {}
    for suffix, part in encoding.parts(embedding_dim).items():
        parts[suffix] = torch.empty(stop - start, part.columns, dtype=part.dtype)
        stored.read_rows(f"{state_name}{suffix}", start, parts[suffix])
    return parts
