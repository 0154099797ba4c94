"""A manifest for files that something else wrote, so that they count as a whole checkpoint."""

from pathlib import Path

from mlet_dist.checkpoint.manifest import Checksum, Manifest
from mlet_dist.checkpoint.store import Checkpoint


def seal(directory: Path) -> None:
    files = {}
    for path in directory.iterdir():
        if path.name != "manifest.json":
            checksum = Checksum()
            checksum.update(path.read_bytes())
            files[path.name] = checksum.entry()
    checkpoint = Checkpoint.at(str(directory))
    assert checkpoint is not None
    (directory / "manifest.json").write_bytes(Manifest(checkpoint.step, files, {}).render())
