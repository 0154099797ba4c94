"""The export job: W1·W2 of every table into a checkpoint that a plain TorchRec model loads by name."""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mlet_dist import __version__
from mlet_dist.embeddings.collapse import collapse_rows
from mlet_dist.export.manifest import FORMAT_VERSION, ExportDirectory, describe_tensor
from mlet_dist.json_text import to_json
from mlet_dist.models.dlrm import TABLES_PREFIX, build_dlrm
from mlet_dist.progress import Progress
from mlet_dist.staging import staged_directory
from mlet_dist.training.checkpoint.choosing import newest_checkpoint
from mlet_dist.training.checkpoint.loading import MODEL_KEY, check_shapes, load_tensor, read_metadata, save_state
from mlet_dist.training.run_directory import RunDirectory


def export_run(run: Path, out: Path) -> dict[str, Any]:
    """Collapse the newest checkpoint of a finished run into ``out``, which must not exist yet or be empty.

    One process; it holds one W1 at a time, and all the collapsed tables.

    Returns:
        ``out``, the number of ``tables`` and the ``bytes`` they take served.

    Raises:
        UserError: the run never finished, a tensor is missing, or ``out`` is taken.
    """
    source = RunDirectory(run)
    config, spec, summary = source.load()
    newest = newest_checkpoint(source.checkpoint_store(config))
    checkpoint = newest.location
    metadata = read_metadata(checkpoint)
    served = dataclasses.replace(spec, model=dataclasses.replace(spec.model, hidden_dim=None))
    state: dict[str, torch.Tensor] = {}
    tables: list[dict[str, Any]] = []
    check_shapes(build_dlrm(spec, torch.device("meta")).state_dict(), metadata, checkpoint, MODEL_KEY)
    with staged_directory(out) as staging, Progress("export", len(spec.sparse), "tables") as progress:
        for feature in spec.sparse:
            name = f"{TABLES_PREFIX}embedding_bags.{feature.name}.weight"
            rows = load_tensor(name, checkpoint, metadata)
            trained_bytes = rows.numel() * rows.element_size()
            if spec.model.hidden_dim is not None:
                projection = load_tensor(f"{TABLES_PREFIX}projections.{feature.name}.weight", checkpoint, metadata)
                trained_bytes += projection.numel() * projection.element_size()
                rows = collapse_rows(rows, projection)
            state[name] = rows = rows.float()
            tables.append(
                {
                    "name": feature.name,
                    "num_embeddings": feature.num_embeddings,
                    "hidden_dim": spec.model.hidden_dim,
                    "embedding_dim": spec.model.embedding_dim,
                    "trained_bytes": trained_bytes,
                    **describe_tensor(name, rows),
                }
            )
            progress.update(1)
        dense = [name for name in build_dlrm(served, torch.device("meta")).state_dict() if name not in state]
        state |= {name: load_tensor(name, checkpoint, metadata) for name in dense}
        target = ExportDirectory(staging)
        save_state(state, target.model, no_dist=True)
        manifest = {
            "format_version": FORMAT_VERSION,
            "versions": {"mlet_dist": __version__, "torch": torch.__version__, "torchrec": version("torchrec")},
            "run": {"path": str(run), "checkpoint": newest.name, **_metrics(summary)},
            "config": config.to_dict(),
            "model": served.to_dict(),
            "state": target.model.name,
            "tables": tables,
            "dense": [describe_tensor(name, state[name]) for name in dense],
        }
        target.manifest.write_text(to_json(manifest, indent=1) + "\n", encoding="utf-8")
    served_bytes = sum(table["bytes"] for table in tables)
    return {
        "out": str(out),
        "tables": len(tables),
        "bytes": served_bytes,
        "trained_bytes": sum(table["trained_bytes"] for table in tables),
    }


def _metrics(summary: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name.endswith(("_auc", "_logloss", "_rows"))}
