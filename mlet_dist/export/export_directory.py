"""The layout of an export on disk, and the manifest that describes it."""

import fnmatch
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.errors import UserError
from mlet_dist.formatting import CHECKSUM, with_checksum
from mlet_dist.models.spec import ModelSpec

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PACKAGE = "package"


@dataclass(frozen=True)
class ExportDirectory:
    """Paths inside an export; of the outputs, those are there that were asked for.

    ::

        manifest.json     what is in it: tables, dense weights, files with checksums, versions, config, provenance
        model/            torch.distributed.checkpoint of a plain TorchRec DLRM's state dict, by name
        safetensors/      the same as safetensors files, for torch's HuggingFaceStorageReader or by their index
        fp16/ int8/ int4/ torch.distributed.checkpoint of the state dict with TorchRec's quantised tables
        package/          a scripted model with one output's tables inside, and programs that run it

    Files are ``TABLE-00000-of-00003`` with ``.distcp`` or ``.safetensors``, each some rows of a table, or one file
    ``TABLE`` for all of it where they were gathered; ``_dense`` holds the other layers.
    """

    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    def is_there(self) -> bool:
        """Whether an export is here, whole or not. Checkpoints and data sets have a manifest.json too."""
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError):  # of an export that is damaged, as far as anybody can tell
            return True
        return isinstance(content, dict) and {"format_version", "model"} <= content.keys()

    def load(self) -> tuple[ModelSpec, dict[str, Any]]:
        """The plain model that the export holds, and its manifest.

        Raises:
            UserError: it is no export, or its manifest is broken.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such directory; expected an export made by `mlet export`")
        if not self.is_there():
            said = "is not one's" if self.manifest.exists() else "is missing"
            raise UserError(f"{self.path}: not an export of `mlet export`: its {self.manifest.name} {said}")
        try:
            content = json.loads(self.manifest.read_text(encoding="utf-8"))
            found = content["format_version"]
            if found != FORMAT_VERSION:
                raise UserError(f"{self.manifest}: format_version is {found}, this version reads {FORMAT_VERSION}")
            if with_checksum(content)[CHECKSUM] != content[CHECKSUM]:
                raise ValueError("its checksum is wrong")
            return ModelSpec.from_dict(content["model"], str(self.manifest)), content
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.manifest}: broken manifest: {error!r}; export again") from None

    def output(self, name: str, manifest: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """The directory of an output, and its files: name -> ``bytes`` and ``crc32``.

        Raises:
            UserError: the export was made without this output.
        """
        outputs = manifest["outputs"]
        if name not in outputs:
            raise UserError(
                f"{self.path}: holds {' and '.join(outputs)}, not {name}; export again with --outputs {name}"
            )
        return self.path / outputs[name]["directory"], outputs[name]["files"]

    def check_files(self, name: str, manifest: dict[str, Any], pattern: str = "*", share: slice = slice(None)) -> None:
        """Read an output's files, or some, through, and raise UserError unless they are what was written."""
        directory, files = self.output(name, manifest)
        entries = Manifest(step=0, files=files, about={})
        for file in fnmatch.filter(sorted(files), pattern)[share]:
            damage = entries.find_damage(file, lambda each: (directory / each).open("rb"))
            if damage is not None:
                raise UserError(f"{directory}: {damage}: the export is damaged; export again")


def describe_tensor(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """Name, shape, dtype, bytes and SHA-256 of the values, as the manifest records them."""
    return {
        "state_name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "bytes": tensor.numel() * tensor.element_size(),
        "sha256": hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest(),
    }
