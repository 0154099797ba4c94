"""What compression did to the tables of a run, read from its directory; the run may still be training."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlet_dist.config.config_file import Config
from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.errors import UserError
from mlet_dist.models.row_widths import Sizes, budget_bytes
from mlet_dist.models.spec import ModelSpec
from mlet_dist.models.width_shares import width_shares
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.run_seal import load_sealed_json


def widths_of(path: Path) -> dict[str, Any]:
    """Return the widths of the rows of a compressed run, what they take, and how rows moved.

    Returns:
        Plain data: ``run``, ``policy``, ``finished``; ``single_layer_training_bytes``, ``budget_bytes`` and
        ``training_bytes``, of rows, W2, optimizer state, slots and utilities over all ranks, which before the end of
        the run are computed from the widths; and ``rank_peak_memory_bytes``, the peak of each rank in the last job of
        the run up to its last record, null before the first. ``widths`` has the shares of rows and lookups by width,
        and ``tables`` the same for each table. Rows that move begin with these widths, every ``interval`` steps there
        is a pass over all of them, and ``chunks`` says whether chunks of rows move. ``history`` has a record for every
        ``log_every`` steps: ``step``, ``moves`` since step 0, ``moves_per_pass`` since the record before, and the share
        of rows that have columns by table, ``kept``, and by the width that they began with, ``kept_by_width``. It is
        empty if rows do not move.

    Raises:
        UserError: ``path`` is not a run or cannot be read, or the run is not compressed.
    """
    run = RunDirectory(path)
    if not run.config.exists() or not run.model.exists():
        raise UserError(f"{path}: not a run of `mlet train`: it has no {run.config.name} and {run.model.name}")
    config = run.load_config()
    spec = ModelSpec.from_dict(load_sealed_json(run.model)[0], str(run.model))
    if not spec.row_ranges:
        raise UserError(
            f"{path}: compression.policy of this run is {config.compression.policy}: all rows of a table have the same "
            "width; only compressed runs have several"
        )
    summary = load_sealed_json(run.summary)[0] if run.summary.exists() else None
    ranges = {name: [RowRange(*each) for each in of_table] for name, of_table in spec.row_ranges.items()}
    lookups = {table.name: sum(each.pooling_factor for each in table.features) for table in spec.tables}
    records = list(_records(run.metrics))
    peaks = [record["rank_peak_memory_bytes"] for record in records if record["split"] == "timing"]
    return {
        "run": str(path),
        "policy": config.compression.policy,
        "finished": summary is not None,
        **_bytes(config, spec, ranges, summary),
        "rank_peak_memory_bytes": peaks[-1] if peaks else None,
        "widths": [dataclasses.asdict(each) for each in width_shares(ranges, lookups)],
        "tables": [
            {
                "name": name,
                "num_embeddings": sum(each.rows for each in of_table),
                "widths": [dataclasses.asdict(each) for each in width_shares({name: of_table}, {name: 1.0})],
            }
            for name, of_table in ranges.items()
        ],
        "chunks": bool(spec.adaptive and spec.adaptive["chunk_width"]),
        "interval": spec.adaptive["interval"] if spec.adaptive else None,
        "history": _history(records, spec.adaptive["interval"]) if spec.adaptive else [],
    }


def _records(metrics: Path) -> Iterator[dict[str, Any]]:
    """Read the complete lines of metrics.jsonl; a run that trains may be writing the last one."""
    try:
        text = metrics.read_bytes()
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{metrics}: cannot be read: {error.strerror}") from None
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{metrics}: line {number} is not JSON: {error}") from None


def _bytes(
    config: Config, spec: ModelSpec, ranges: dict[str, list[RowRange]], summary: dict[str, Any] | None
) -> dict[str, int]:
    sizes = Sizes.of(spec.model, config.optimizer.name, config.compression, spec.embedding_dims)
    single = sizes.single({table.name: table.num_embeddings for table in spec.tables})
    return {
        "single_layer_training_bytes": single,
        "budget_bytes": budget_bytes(config.compression, single),
        "training_bytes": sizes.trained(ranges) if summary is None else summary["training_bytes_peak"],
    }


def _history(records: list[dict[str, Any]], interval: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    step = moves = 0
    for record in records:
        if record["split"] != "compression":
            continue
        steps = max(1, record["step"] - step)
        found.append(
            {
                "step": record["step"],
                "moves": record["moves"],
                "moves_per_pass": (record["moves"] - moves) / steps * interval,
                "kept": {key[5:]: share for key, share in record.items() if key.startswith("kept_")},
                "kept_by_width": {
                    int(key.split("_")[1]): share for key, share in record.items() if key.startswith("width_")
                },
            }
        )
        step, moves = record["step"], record["moves"]
    return found
