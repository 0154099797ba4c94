"""Change exports, and their manifests so that all checksums are right."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp

from mlet_dist.checkpoint.manifest import Checksum
from mlet_dist.formatting import with_checksum


def change_manifest(export: Path, change: Callable[[dict], None]) -> None:
    """Change an export's manifest and update its self-checksum."""
    path = export / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(with_checksum(manifest)))


def change_tensor(export: Path, output: str, name: str, change: Callable[[torch.Tensor], None]) -> None:
    """Change a tensor of an output in DCP format, and update the files' checksums in the manifest."""
    manifest = json.loads((export / "manifest.json").read_text())
    directory = export / manifest["outputs"][output]["directory"]
    found = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {key: torch.empty(each.size, dtype=each.properties.dtype) for key, each in found.items()}
    dcp.load(state, checkpoint_id=directory, no_dist=True)
    change(state[name])
    shutil.rmtree(directory)
    dcp.save(state, checkpoint_id=directory, no_dist=True)

    def describe(content: dict) -> None:
        files = {}
        for path in directory.iterdir():
            checksum = Checksum()
            checksum.update(path.read_bytes())
            files[path.name] = checksum.entry()
        content["outputs"][output]["files"] = files

    change_manifest(export, describe)
