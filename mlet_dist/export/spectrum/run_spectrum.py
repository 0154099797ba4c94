"""`mlet spectrum`: singular values of all tables of a run, an export or factors, unweighted and by row frequency."""

import dataclasses
from pathlib import Path
from typing import Any

import torch

from mlet_dist.atomic_directory import check_free, staged_directory
from mlet_dist.data.location import data_set_path
from mlet_dist.data.row_counts import count_ids
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.embeddings.factors import FLOOR
from mlet_dist.errors import UserError
from mlet_dist.export.row_blocks import sum_grams
from mlet_dist.export.source import Tables
from mlet_dist.export.spectrum.singular_values import Spectrum, balance, suggest_smaller
from mlet_dist.export.spectrum.spectrum_page import html_page
from mlet_dist.export.spectrum.spectrum_report import NOTE
from mlet_dist.formatting import to_json
from mlet_dist.progress import Progress
from mlet_dist.stored_tables.ranged_source import RangedTableSource
from mlet_dist.stored_tables.table_source import TableSource
from mlet_dist.training.run_checkpoints import LAST, CheckpointChoice


def spectrum_of(
    path: Path, data: str | None = None, out: Path | None = None, choice: CheckpointChoice = LAST
) -> dict[str, Any]:
    """Compute the spectra of all tables in one pass, in blocks of rows.

    Memory is a few blocks, the Gram matrices and 8 bytes per row of one table.

    Args:
        data: the data set whose training split gives the frequencies of rows; None for that of the run, if available.
        out: directory for ``spectrum.json`` and ``spectrum.html``; must not exist or be empty.
        choice: the checkpoint of a run.

    Returns:
        Plain data: ``tables``, and how they were read. ``plain`` and ``weighted`` are ``Spectrum``s: of W, and of
        D^½·W, where the diagonal of D counts how often each row occurs, so that sum(s²) is that of all looked up rows.
        ``gains`` are the smallest, the mean and the largest eigenvalue of W2ᵀW2, by which W2 multiplies the gradients
        of a row's vector under SGD, in different directions. A table whose rows have different widths has
        ``row_ranges``, with the rows, ``hidden_dim``, ``gains`` and ``balance`` of each; its own ``hidden_dim`` is the
        largest of them, and its ``gains`` and ``balance`` are null, since it has several W2.

    Raises:
        UserError: ``path`` cannot be read, or ``data`` does not fit the tables.
    """
    if out is not None:
        check_free(out)
    with Tables.open(path, choice) as source:
        counted, schema, missing = _find_data_set(source, data)
        tables = []
        with Progress("spectrum", sum(each.num_embeddings for each in source.tables.values()), "rows") as progress:
            for table in source.tables.values():
                counts = None
                if schema is not None:
                    counts = count_ids(data_set_path(str(counted)), schema, table.name)
                grams = sum_grams(table, counts, progress)
                plain = Spectrum.of_gram(grams.table, table.num_embeddings)
                weighted = None
                if counts is not None and grams.weighted is not None:
                    weighted = Spectrum.of_gram(grams.weighted, table.num_embeddings)
                seen = {"rows_seen": None if counts is None else int((counts > 0).sum())}
                tables.append(_describe(table, plain, weighted) | seen | _layers(table, grams.rows))
    result = {
        "note": NOTE,
        "source": str(path),
        "data": counted,
        "not_weighted": missing,
        "floor": FLOOR,
        "recipe_gain": _recipe_gain(source),
        "tables": tables,
    }
    if out is not None:
        with staged_directory(out) as staging:
            (staging / "spectrum.json").write_text(to_json(result, indent=1) + "\n", encoding="utf-8")
            (staging / "spectrum.html").write_text(html_page(result), encoding="utf-8")
    return result


def _describe(table: TableSource, plain: Spectrum, weighted: Spectrum | None) -> dict[str, Any]:
    return {
        "name": table.name,
        "num_embeddings": table.num_embeddings,
        "embedding_dim": table.embedding_dim,
        "plain": dataclasses.asdict(plain),
        "weighted": None if weighted is None else dataclasses.asdict(weighted),
        "suggested": suggest_smaller(plain, weighted, table.embedding_dim),
    }


def _layers(table: TableSource, rows_gram: torch.Tensor | None) -> dict[str, Any]:
    """Return what is known of W1 and W2, for each range of rows if their widths differ.

    Args:
        table: the table.
        rows_gram: W1ᵀW1 (k, k) float64; None for a single layer.
    """
    if table.projection is None or rows_gram is None:
        return {"hidden_dim": None, "gains": None, "balance": None}
    if not isinstance(table, RangedTableSource):
        return {"hidden_dim": table.hidden_dim, **_two_layers(rows_gram, table.projection)}
    ranges: list[dict[str, Any]] = []
    start = 0
    for each in table.ranges:
        columns = slice(start, start := start + each.width)
        # Rows of d columns have no W2.
        found: dict[str, Any] = {"gains": None, "balance": None}
        if each.width not in (0, table.embedding_dim):
            found = _two_layers(rows_gram[columns, columns], table.projection[columns])
        ranges.append({"rows": each.rows, "hidden_dim": each.width, **found})
    widest = max(each["hidden_dim"] for each in ranges)
    return {"hidden_dim": widest, "gains": None, "balance": None, "row_ranges": ranges}


def _two_layers(rows_gram: torch.Tensor, projection: torch.Tensor) -> dict[str, Any]:
    """Return the factors of W2 on a gradient, and the distance between the Gram matrices of W1 and W2."""
    factors = torch.linalg.eigvalsh(projection.double().t() @ projection.double())
    # Rounding makes eigenvalues of 0, those of a W2 with fewer rows than columns, a little smaller.
    lowest, highest = max(0.0, float(factors[0])), float(factors[-1])
    gains = {"min": lowest, "mean": float(factors.mean()), "max": highest}
    return {"gains": gains, "balance": balance(rows_gram, projection)}


def _recipe_gain(source: Tables) -> float | None:
    """Return kσ², which multiplies SGD's learning rate of the tables at the start.

    None if W2 was not random, or if tables have a k or σ of their own.
    """
    model = source.config.get("model")
    if model is None or model["hidden_dim"] is None or source.config["train"].get("initial_weights") is not None:
        return None
    for entry in model.get("tables", {}).values():
        if isinstance(entry["hidden_dim"], int) or entry["projection_init_std"] is not None:
            return None
    deviation = model["projection_init_std"]
    return 1.0 if deviation is None else float(model["hidden_dim"] * deviation**2)


def _find_data_set(source: Tables, data: str | None) -> tuple[str | None, DatasetSchema | None, str | None]:
    """Return path and schema of the data set that gives the frequencies of rows, or the reason why there is none."""
    config = source.config.get("data")
    path = data if data is not None else None if config is None else str(config["path"])
    if path is None:
        return None, None, "no --data was given, and the tables do not record their training data"
    try:
        schema = DatasetSchema.load(data_set_path(path))
        _check_data_set(source, schema, path)
    except UserError as error:
        if data is not None:
            raise
        return None, None, f"the run's data set cannot be used ({error}); name another one with --data"
    return path, schema, None


def _check_data_set(source: Tables, schema: DatasetSchema, path: str) -> None:
    if source.spec is not None:
        source.spec.check_ids(schema, data_set_path(path))
    for table in source.tables.values():
        found = schema.table_sizes.get(table.name)
        if found is None:
            raise UserError(f"{path}: has no feature of the table {table.name!r} in {source.path}")
        if found != table.num_embeddings:
            raise UserError(
                f"{path}: table {table.name!r} has {found:,} ids and its table in {source.path} "
                f"{table.num_embeddings:,} rows"
            )
