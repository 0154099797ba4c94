"""Entries of an export's manifest: files, tables, versions and metrics."""

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fbgemm_gpu
import torch

from mlet_dist import __version__
from mlet_dist.checkpoint.manifest import Checksum
from mlet_dist.export.sized_model import SizedSource
from mlet_dist.export.source import ModelSource


def describe_tables(source: ModelSource) -> list[dict[str, Any]]:
    """Return the manifest's entries of the tables of a model; one at another size was trained as that of the run."""
    trained = source.trained.tables if isinstance(source, SizedSource) else source.tables
    return [
        {
            "name": table.name,
            "state_name": table.state_name,
            "num_embeddings": table.num_embeddings,
            "hidden_dim": trained[table.name].hidden_dim,
            "embedding_dim": table.embedding_dim,
            "shape": [table.num_embeddings, table.embedding_dim],
            "dtype": "float32",
            "trained_bytes": trained[table.name].stored_bytes,
            "bytes": 4 * table.num_embeddings * table.embedding_dim,
        }
        for table in source.tables.values()
    ]


def synced_entry(path: Path) -> dict[str, Any]:
    """Sync a file to disk and return its size and checksums."""
    checksum = Checksum()
    with path.open("rb") as file:
        os.fsync(file.fileno())
        while block := file.read(1 << 22):
            checksum.update(block)
    return checksum.entry()


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that the bytes of an export depend on."""
    return {
        "mlet_dist": __version__,
        "torch": torch.__version__,
        "torchrec": version("torchrec"),
        "fbgemm_gpu": fbgemm_gpu.__version__,
    }


def metrics_of(summary: Any) -> dict[str, Any]:
    """Return the metrics of a run's summary."""
    return {name: value for name, value in summary.items() if name.endswith(("_auc", "_logloss", "_rows"))}
