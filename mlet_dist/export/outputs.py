"""What an export may consist of."""

from dataclasses import dataclass

from mlet_dist.export.encoding import ENCODINGS, Encoding
from mlet_dist.export.formats.dcp import DcpFormat
from mlet_dist.export.formats.pieces import Format
from mlet_dist.export.formats.safetensors import SafetensorsFormat


@dataclass(frozen=True)
class Output:
    """A state dict of the served model on disk.

    Attributes:
        name: by which it is asked for.
        directory: in the export.
        encoding: of the tables; dense tensors stay as they are.
        format: of the files.
    """

    name: str
    directory: str
    encoding: Encoding
    format: Format


OUTPUTS = {
    each.name: each
    for each in (
        Output("dcp", "model", ENCODINGS["fp32"], DcpFormat()),
        Output("safetensors", "safetensors", ENCODINGS["fp32"], SafetensorsFormat()),
        *(Output(name, name, ENCODINGS[name], DcpFormat()) for name in ("fp16", "int8", "int4")),
    )
}
"""By name."""
