"""The layout of an export on disk, and the manifest that describes it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlet_dist.errors import UserError
from mlet_dist.models.spec import ModelSpec

FORMAT_VERSION = 1


@dataclass(frozen=True)
class ExportDirectory:
    """Paths inside an export.

    ::

        manifest.json     what is in it: tables, dense weights, checksums, versions, config, provenance
        model/            torch.distributed.checkpoint of a plain TorchRec DLRM's state dict, by name
    """

    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / "manifest.json"

    @property
    def model(self) -> Path:
        return self.path / "model"

    def load(self) -> tuple[ModelSpec, dict[str, Any]]:
        """The plain model that the export holds, and its manifest.

        Raises:
            UserError: it is no export, or its manifest is broken.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such directory; expected an export made by `mlet export`")
        if not self.manifest.exists():
            raise UserError(f"{self.path}: not an export of `mlet export`: it has no {self.manifest.name}")
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
            found = content["format_version"]
            if found != FORMAT_VERSION:
                raise UserError(f"{self.manifest}: format_version is {found}, this version reads {FORMAT_VERSION}")
            return ModelSpec.from_dict(content["model"], str(self.manifest)), content
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.manifest}: broken manifest: {error!r}; export again") from None


def describe_tensor(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """Name, shape, dtype, bytes and SHA-256 of the values, as the manifest records them."""
    return {
        "state_name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "bytes": tensor.numel() * tensor.element_size(),
        "sha256": hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest(),
    }
