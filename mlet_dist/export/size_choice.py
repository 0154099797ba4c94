"""The sizes that `mlet export --dims` asks for: how a run gets there, and the directions that a table keeps."""

from collections.abc import Callable

import torch

from mlet_dist.data.location import data_set_path
from mlet_dist.data.row_counts import count_ids
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.errors import UserError
from mlet_dist.export.sized_model import How, RefittedTable, Size
from mlet_dist.export.source import ModelSource
from mlet_dist.stored_tables.adaptive_source import AdaptiveTableSource
from mlet_dist.stored_tables.ranged_source import RangedTableSource
from mlet_dist.stored_tables.refitted_source import vectors_of_ids
from mlet_dist.stored_tables.table_source import TableSource

_BLOCK_ROWS = 1 << 16

Counts = Callable[[str], torch.Tensor | None]
"""From the name of a table to how often training looked up each of its rows ``(n,)`` float64; None if unknown."""


def way_to(source: ModelSource, embedding_dim: int) -> How | None:
    """Return how a run gets to a width; None for its own.

    Raises:
        UserError: it cannot.
    """
    spec, wanted = source.spec, f"--dims {embedding_dim}"
    dims, nested = sorted(set(spec.embedding_dims.values())), spec.model.nested_dims
    if nested is not None and embedding_dim not in (*nested, *dims):
        widths = ", ".join(map(str, nested))
        raise UserError(
            f"{wanted}: {source.path} was trained at {widths} and {dims[-1]} columns (model.nested_dims); use some of "
            "these"
        )
    if embedding_dim > dims[-1]:
        raise UserError(f"{wanted}: the widest table of {source.path} has {dims[-1]} columns; use {dims[-1]} or less")
    if embedding_dim < 1 or embedding_dim % 4:
        raise UserError(f"{wanted}: fbgemm's kernels take widths that are multiples of 4; use one")
    if embedding_dim == dims[-1]:
        return None
    how: How = "truncated" if nested is None else "padded" if spec.model.builder is not None else "columns"
    if how != "columns":
        check_can_refit(source, wanted)
    return how


def check_can_refit(source: ModelSource, wanted: str) -> None:
    """Raise UserError if the rows of a run cannot be refitted, as an option of `mlet export` asks."""
    if source.spec.sequence_tables:
        raise UserError(
            f"{wanted}: the vectors of {', '.join(sorted(source.spec.sequence_tables))} are not pooled "
            "(model.sequences), and tables of fewer columns with a P2 are looked up by pooling; train a run with this "
            "model.embedding_dim"
        )
    adaptive = next((name for name, each in source.tables.items() if isinstance(each, AdaptiveTableSource)), None)
    if adaptive is not None:
        raise UserError(
            f"{wanted}: rows of table {adaptive!r} have widths of their own (compression.policy adaptive); continue "
            "the run with compression.policy=static or none, and export that"
        )


def size_of(source: ModelSource, embedding_dim: int, how: How, counts: Counts) -> Size:
    """Return the size of a width that ``way_to`` allows.

    Args:
        source: the run.
        embedding_dim: r.
        how: of ``way_to``.
        counts: weigh the rows of tables that are truncated.

    Raises:
        UserError: a file is missing or damaged.
    """
    if how == "columns":
        return Size(embedding_dim, how)
    tables = {}
    for name, table in source.tables.items():
        if how == "padded":
            first_columns = torch.eye(embedding_dim, table.embedding_dim)
            ranges = tuple(RowRange(each.rows, embedding_dim if each.width else 0) for each in ranges_of(table))
            directions = tuple(first_columns if each.width else None for each in ranges)
            tables[name] = RefittedTable(ranges, directions, shared_vector(table))
        else:
            ranges = tuple(RowRange(each.rows, min(each.width, embedding_dim)) for each in ranges_of(table))
            tables[name] = refit(table, ranges, counts(name), shared_vector(table))
    return Size(embedding_dim, how, tables)


def ranges_of(table: TableSource) -> tuple[RowRange, ...]:
    """Return the ranges of a table's rows; one of all rows if it has no ranges."""
    if isinstance(table, RangedTableSource):
        return tuple(RowRange(each.rows, min(each.width, table.embedding_dim)) for each in table.ranges)
    return (RowRange(table.num_embeddings, table.embedding_dim),)


def shared_vector(table: TableSource) -> torch.Tensor | None:
    """Return the vector ``(d,)`` float32 that ids of rows that are not stored read; None if there is none."""
    if table.shared_row is None:
        return None
    return vectors_of_ids(table, table.shared_row, table.shared_row + 1)[0].float()


def refit(
    table: TableSource, ranges: tuple[RowRange, ...], counts: torch.Tensor | None, shared: torch.Tensor | None
) -> RefittedTable:
    """Return ranges of rows in the directions in which their vectors are longest, each as often as it is looked up.

    Args:
        table: the table.
        ranges: of all its rows.
        counts: lookups of each row ``(n,)`` float64; None lets all rows count the same.
        shared: the vector of the last row that is stored.
    """
    directions: list[torch.Tensor | None] = []
    first, total, lost = 0, 0.0, 0.0
    for each in ranges:
        gram = weighted_gram(table, first, first + each.rows, counts)
        total += float(gram.trace())
        if each.width in (0, table.embedding_dim):
            directions.append(None)
            lost += float(gram.trace()) if not each.width else 0.0
        else:
            squares, vectors = torch.linalg.eigh(gram)
            directions.append(vectors.flip(1)[:, : each.width].T.float().contiguous())
            lost += float(squares[: -each.width].clamp(min=0).sum())
        first += each.rows
    return RefittedTable(ranges, tuple(directions), shared, lost / total if total else 0.0)


def weighted_gram(table: TableSource, start: int, stop: int, counts: torch.Tensor | None) -> torch.Tensor:
    """Return the Gram matrix ``(d, d)`` float64 of the vectors of ids ``[start, stop)``, weighted by their counts."""
    gram = torch.zeros(table.embedding_dim, table.embedding_dim, dtype=torch.float64)
    for first in range(start, stop, _BLOCK_ROWS):
        last = min(first + _BLOCK_ROWS, stop)
        vectors = vectors_of_ids(table, first, last)
        gram.addmm_(vectors.T, vectors if counts is None else vectors * counts[first:last, None])
    return gram


def counts_of(source: ModelSource, data: str | None) -> Counts:
    """Return how often training looked up the rows of each table.

    Args:
        source: the run.
        data: the data set; None for that of the run.

    Raises:
        UserError: it cannot be read, or does not fit the model.
    """
    location = data_set_path(data or str(source.config["data"]["path"]))
    schema = DatasetSchema.load(location)
    source.spec.check_ids(schema, location)

    def of_table(name: str) -> torch.Tensor | None:
        counts = torch.from_numpy(count_ids(location, schema, name)).double()
        rows = source.tables[name].num_embeddings
        # A vocabulary that has grown since the run gives the rows that the table has.
        return counts[:rows] if len(counts) >= rows else torch.cat([counts, counts.new_zeros(rows - len(counts))])

    return of_table
