"""Existing tables -> W1 and W2, from which `mlet train` goes on: the collapse backwards."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mlet_dist.atomic_directory import staged_directory
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.embeddings.factors import Factors, factors_of
from mlet_dist.errors import UserError
from mlet_dist.export.factorize.block_writer import BlockWriter
from mlet_dist.export.factorize.existing_tables import open_existing
from mlet_dist.export.row_blocks import read_blocks, sum_grams
from mlet_dist.export.source import Tables, TableSource
from mlet_dist.models.dlrm import TABLES_PREFIX
from mlet_dist.progress import Progress
from mlet_dist.training.snapshot import versions

_MOST_ERROR = 1e-6  # of float32 factors it is 4e-8; more means that their range was left


def factorize_tables(
    path: Path,
    hidden_dim: int,
    out: Path,
    *,
    seed: int = 0,
    gain: float | None = None,
    table_pattern: str | None = None,
    tables_only: bool = False,
) -> dict[str, Any]:
    """Write the exact factors of all tables at ``path`` as a checkpoint in ``out``, which must not exist or be empty.

    Each table is read twice, by blocks: for its Gram matrix and for W1. Memory is a few blocks and the Gram matrix,
    whatever the number of rows. ``out`` appears when all is written.

    Args:
        hidden_dim, seed, gain: as ``factors_of``.
        table_pattern: as ``open_existing``.
        tables_only: leave the dense layers of the source out.

    Returns:
        ``out``, ``tables``, the ``dense`` tensors kept, ``hidden_dim``, ``bytes`` of W1 and W2, the largest
        ``relative_error`` ||W1·W2 - W|| / ||W|| of a table, and the smallest and largest ``mean_gain`` of one:
        the mean of W2ᵀW2, by which SGD's learning rate of the table is multiplied.

    Raises:
        UserError: what is there cannot be read or factorised exactly, or ``out`` cannot be written.
    """
    with open_existing(path, table_pattern) as existing:
        for table in existing.tables.values():
            if hidden_dim < table.embedding_dim:
                raise UserError(
                    f"--hidden-dim {hidden_dim} is below the {table.embedding_dim} columns of table {table.name!r}; "
                    f"exact factors take {table.embedding_dim} or more"
                )
        dense = {} if tables_only else existing.dense
        rows = sum(table.num_embeddings for table in existing.tables.values())
        with staged_directory(out) as staging:
            _check_space(staging, out, existing, hidden_dim)
            writer = BlockWriter(CheckpointStore(staging).checkpoint(0))
            entries = []
            with Progress("factorize", 2 * rows, "rows") as progress:
                for number, table in enumerate(existing.tables.values()):
                    entries.append(_factorize(table, hidden_dim, seed, gain, writer, f"table-{number}", progress))
            if dense:
                with writer.file("dense") as file:
                    for name in dense:
                        file.add(name, [existing.load_dense(name)])
            spec = existing.spec
            if spec is not None:
                spec = replace(spec, model=replace(spec.model, hidden_dim=hidden_dim))
            writer.finish(
                {
                    "factorized": {"source": str(path), "seed": seed, "gain": gain, "tables": entries},
                    "spec": None if spec is None else spec.to_dict(),
                    "vocabulary_id": None if spec is None else spec.vocabulary_id,
                    "versions": versions(),
                }
            )
    gains = [each["mean_gain"] for each in entries]
    return {
        "out": str(out),
        "tables": len(entries),
        "dense": len(dense),
        "hidden_dim": hidden_dim,
        "bytes": sum(each["bytes"] for each in entries),
        "relative_error": max(each["relative_error"] for each in entries),
        "mean_gain": {"min": min(gains), "max": max(gains)},
    }


def _factorize(
    table: TableSource, k: int, seed: int, gain: float | None, writer: BlockWriter, file_name: str, progress: Progress
) -> dict[str, Any]:
    n, d = table.num_embeddings, table.embedding_dim
    gram = sum_grams(table, None, progress).table
    try:
        factors = factors_of(gram, k, table.name, seed, gain)
    except ValueError as error:
        raise UserError(f"{table.location}: {error}") from None
    errors: list[float] = []
    with writer.file(file_name) as file:
        file.add(table.state_name, _first_layer(table, factors, errors, progress))
        file.add(f"{TABLES_PREFIX}projections.{table.name}.weight", [factors.projection])
    energy = float(gram.trace())
    relative_error = (sum(errors) / energy) ** 0.5 if energy else 0.0
    if not relative_error <= _MOST_ERROR:
        raise UserError(
            f"{table.location}: table {table.name!r}: its factors in float32 are {relative_error:.1e} of it off; its "
            "values are too large, or too small, for float32"
        )
    return {
        "name": table.name,
        "shape": [n, d],
        "hidden_dim": k,
        "dtype": str(table.rows_dtype).removeprefix("torch."),
        "bytes": 4 * k * (n + d),
        "rank": factors.rank,
        "singular_values": factors.singular_values.tolist(),
        "mean_gain": float(factors.projection.double().square().sum()) / d,
        "relative_error": relative_error,
    }


def _first_layer(
    table: TableSource, factors: Factors, errors: list[float], progress: Progress
) -> Iterator[torch.Tensor]:
    """W1 by blocks, float32; the squared distance of each block's product from W goes into ``errors``."""
    d, k = factors.to_rows.shape
    projection = factors.projection.double()
    step = max(1, (1 << 22) // k)  # rows, so that wide layers do not make large blocks of narrow tables
    for _, values in read_blocks(table):
        for begin in range(0, len(values), step):
            part = values[begin : begin + step]
            rows = (part @ factors.to_rows).float()
            errors.append(float((rows[:, :d].double() @ projection[:d] - part).square().sum()))
            yield rows
            progress.update(len(part), table=table.name)


def _check_space(staging: Path, out: Path, existing: Tables, k: int) -> None:
    needed = sum(4 * k * (table.num_embeddings + table.embedding_dim) for table in existing.tables.values())
    free = shutil.disk_usage(staging).free
    if free < needed:
        raise UserError(f"{out}: cannot be written: it needs {needed:,} bytes and {free:,} are free")
