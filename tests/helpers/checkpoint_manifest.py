"""Write the manifest of a checkpoint whose files another program wrote."""

from pathlib import Path

from mlet_dist.checkpoint.manifest import Checksum, Manifest
from mlet_dist.checkpoint.store import Checkpoint
from mlet_dist.embeddings.row_order import ROW_ORDER, SPREAD
from mlet_dist.training.run_directory import RUN_ID
from mlet_dist.training.run_seal import run_id_of_yaml


def write_manifest(directory: Path) -> None:
    """Write a manifest for all files in ``directory``, which makes it a complete checkpoint of the run around it."""
    files = {}
    for path in directory.iterdir():
        if path.name != "manifest.json":
            checksum = Checksum()
            checksum.update(path.read_bytes())
            files[path.name] = checksum.entry()
    checkpoint = Checkpoint.at(str(directory))
    assert checkpoint is not None
    config = directory.parent.parent / "config.yaml"
    about = {ROW_ORDER: SPREAD} | ({RUN_ID: run_id_of_yaml(config)} if config.exists() else {})
    (directory / "manifest.json").write_bytes(Manifest(checkpoint.step, files, about).render())
