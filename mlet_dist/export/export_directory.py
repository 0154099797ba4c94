"""The layout of an export on disk, and its manifest."""

import errno
import fnmatch
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.errors import UserError
from mlet_dist.formatting import CHECKSUM, load_json, with_checksum
from mlet_dist.models.spec import ModelSpec
from mlet_dist.regular_file import open_regular
from mlet_dist.urls import no_such_directory

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
PACKAGE = "package"
PREPROCESSING = "preprocessing"
SIZE = "size"


@dataclass(frozen=True)
class ExportDirectory:
    """Paths inside an export. Of the outputs, only the requested ones exist.

    ::

        manifest.json     tables, dense weights, files with checksums, versions, config, provenance
        model/            state dict of the model with plain TorchRec tables, written as by torch.distributed.checkpoint
        safetensors/      the same state dict as safetensors files, for torch's HuggingFaceStorageReader or any reader
        fp16/ int8/ int4/ state dict with TorchRec's quantised tables, written as by torch.distributed.checkpoint
        model-kept/ …     each of these with only the rows that a compressed run stores
        model-mixed/ …    the same, with narrow rows as they are, and their W2
        package/          a scripted model that contains the tables of one output, and programs that run it
        preprocessing/    what turns raw rows into the inputs of the model, and programs that do it
        size/             of a size that the run was not trained at: how its rows were made, for `mlet verify`

    A file ``TABLE-00000-of-00003`` with the suffix ``.distcp`` or ``.safetensors`` contains a range of rows of a table,
    and a file ``TABLE`` of a gathered export all of them; ``_dense`` contains the other layers, and
    what an output of kept rows or mixed widths has besides tables.
    """

    path: Path

    @property
    def manifest(self) -> Path:
        return self.path / MANIFEST

    def exists(self) -> bool:
        """Return whether this is an export, intact or damaged. Checkpoints and data sets have a manifest.json, too.

        Raises:
            UserError: the path is a loop of symbolic links.
        """
        try:
            content = load_json(self.manifest)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except (OSError, ValueError) as error:  # it may be the manifest of a damaged export
            if isinstance(error, OSError) and error.errno == errno.ELOOP:
                raise UserError(f"{self.path}: cannot be read: {error.strerror}") from None
            return True
        return isinstance(content, dict) and {"format_version", "model"} <= content.keys()

    def load(self) -> tuple[ModelSpec, dict[str, Any]]:
        """Return the exported model and the manifest.

        Raises:
            UserError: this is not an export, or its manifest is damaged.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: {no_such_directory(self.path)}; expected an export made by `mlet export`")
        if not self.exists():
            problem = "is not an export's" if self.manifest.exists() else "is missing"
            raise UserError(f"{self.path}: not an export of `mlet export`: its {self.manifest.name} {problem}")
        try:
            content = load_json(self.manifest)
            found = content["format_version"]
            if found != FORMAT_VERSION:
                raise UserError(
                    f"{self.manifest}: format_version is {found}, and this version of mlet_dist reads "
                    f"{FORMAT_VERSION}; export again"
                )
            if with_checksum(content)[CHECKSUM] != content[CHECKSUM]:
                raise ValueError("its checksum is wrong")
            return ModelSpec.from_dict(content["model"], str(self.manifest)), content
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.manifest}: broken manifest: {error!r}; export again") from None

    def output(self, name: str, manifest: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Return the directory of an output and its files: name -> ``bytes`` and ``crc32``.

        Raises:
            UserError: the export was made without this output.
        """
        outputs = manifest["outputs"]
        if name not in outputs:
            raise UserError(
                f"{self.path}: contains the outputs {' and '.join(outputs)}, not {name}; export again with "
                f"--outputs {name}"
            )
        return self.path / outputs[name]["directory"], outputs[name]["files"]

    def check_files(self, name: str, manifest: dict[str, Any], pattern: str = "*", share: slice = slice(None)) -> None:
        """Read the files of an output and raise UserError if one is missing or damaged.

        Args:
            pattern: of the names of the files to check.
            share: which of these files, in the order of their names, this rank checks.
        """
        directory, files = self.output(name, manifest)
        _check(directory, files, fnmatch.filter(sorted(files), pattern)[share])

    def check_preprocessing(self, manifest: Mapping[str, Any]) -> None:
        """Read the files of the preprocessing, if there are any; raise UserError if one is missing or damaged."""
        files = manifest.get(PREPROCESSING, {}).get("files", {})
        _check(self.path / PREPROCESSING, files, sorted(files))


def _check(directory: Path, files: Mapping[str, Any], names: Sequence[str]) -> None:
    entries = Manifest(step=0, files=dict(files), about={})
    for file in names:
        damage = entries.find_damage(file, lambda each: open_regular(directory / each))
        if damage is not None:
            raise UserError(f"{directory}: {damage}: the export is damaged; export again")


def describe_tensor(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    """Return the manifest's entry of a tensor: name, shape, dtype, bytes and SHA-256 of the values."""
    return {
        "state_name": name,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "bytes": tensor.numel() * tensor.element_size(),
        "sha256": hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data).hexdigest(),
    }
