"""The outputs that an export can contain, and reading rows back from their files."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors, DcpFiles
from mlet_dist.export.encoding import ENCODINGS, Encoding
from mlet_dist.export.formats.dcp import DcpFormat
from mlet_dist.export.formats.safetensors import SafetensorsFiles, SafetensorsFormat
from mlet_dist.export.formats.tensor_shards import Format
from mlet_dist.export.served_layout import Form
from mlet_dist.regular_file import open_regular


@dataclass(frozen=True)
class Output:
    """A state dict of the served model on disk.

    Attributes:
        name: its name for ``--outputs``.
        directory: its directory in the export.
        encoding: of the tables; dense tensors are stored in float32.
        format: of the files.
        form: which rows of the tables it holds, and with how many columns.
    """

    name: str
    directory: str
    encoding: Encoding
    format: Format
    form: Form = "all"

    def in_form(self, form: Form) -> "Output":
        """Return the output of the same encoding and format in another form."""
        return replace(self, name=f"{self.name}-{form}", directory=f"{self.directory}-{form}", form=form)


_WHOLE = (
    Output("dcp", "model", ENCODINGS["fp32"], DcpFormat()),
    Output("safetensors", "safetensors", ENCODINGS["fp32"], SafetensorsFormat()),
    *(Output(name, name, ENCODINGS[name], DcpFormat()) for name in ("fp16", "int8", "int4")),
)

OUTPUTS = {
    each.name: each
    for each in (
        *_WHOLE,
        *(output.in_form("kept") for output in _WHOLE),
        *(output.in_form("mixed") for output in _WHOLE),
    )
}
"""All outputs by name."""


def open_output(directory: Path, files: Mapping[str, Any], format: str) -> ChunkedTensors:
    """Open the tensors of an output; checksums are verified as the files are read.

    Args:
        files, format: as in the manifest.

    Raises:
        UserError: a file is missing or damaged.
    """
    if format == "safetensors":
        return SafetensorsFiles(directory, files)
    return DcpFiles(directory, lambda name: open_regular(directory / name), files)


def read_parts(
    stored: ChunkedTensors, encoding: Encoding, state_name: str, start: int, stop: int, embedding_dim: int
) -> dict[str, torch.Tensor]:
    """Read rows ``[start, stop)`` of a table, by suffix, as returned by ``Encoding.encode``."""
    parts = {}
    for suffix, part in encoding.parts(embedding_dim).items():
        parts[suffix] = torch.empty(stop - start, part.columns, dtype=part.dtype)
        stored.read_rows(f"{state_name}{suffix}", start, parts[suffix])
    return parts
