"""What the tables of an output are read from: the layout of its form, and a source for each TorchRec table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

import torch

from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.errors import UserError
from mlet_dist.export.encoding import Encoding
from mlet_dist.export.kept_rows import KeptRows, KeptTableSource
from mlet_dist.export.served_layout import Form, ServedLayout, ServedPart, ServedTable, projection_bytes
from mlet_dist.stored_tables.ranged_source import RangedTableSource
from mlet_dist.stored_tables.table_source import TableSource

_INT32_ROWS = 1 << 31


@dataclass(frozen=True)
class ServedSources:
    """The tables of an output, open for reading.

    Attributes:
        layout: of the output.
        tables: by the name of the TorchRec table, a source of its rows, whose product W1·W2 is what is stored.
        tensors: what the output holds besides tables and dense layers, by state name: W2 of narrow ranges, float32, and
            the ids of kept rows, int32, or int64 for tables of 2^31 rows.
    """

    layout: ServedLayout
    tables: Mapping[str, TableSource]
    tensors: Mapping[str, torch.Tensor]


def served_sources(tables: Mapping[str, TableSource], form: Form, encoding: Encoding) -> ServedSources:
    """Return what an output of ``form`` and ``encoding`` holds for ``tables``."""
    layout: dict[str, ServedTable] = {}
    sources: dict[str, TableSource] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, table in tables.items():
        if form == "all":
            part = ServedPart(name, 0, table.num_embeddings, table.embedding_dim)
            n, sources[name] = table.num_embeddings, table
            layout[name] = ServedTable(n, n, None, table.embedding_dim, (part,))
            continue
        kept = KeptRows.of(table)
        kept_ids = None
        if kept.ids is not None:
            kept_ids = f"{table.tables_prefix}kept_ids.{name}"
            tensors[kept_ids] = kept.ids if table.num_embeddings >= _INT32_ROWS else kept.ids.int()
        parts = []
        for part, source, projection in _parts(table, kept, form, encoding):
            parts.append(part)
            if part.name in sources:
                raise UserError(f"table {part.name!r}: is also the name of a range of another table in the output")
            sources[part.name] = source
            if part.projection is not None and projection is not None:
                tensors[part.projection] = projection
        layout[name] = ServedTable(table.num_embeddings, kept.count, kept_ids, table.embedding_dim, tuple(parts))
    return ServedSources(ServedLayout(form, layout), sources, tensors)


def _parts(
    table: TableSource, kept: KeptRows, form: Form, encoding: Encoding
) -> Iterator[tuple[ServedPart, TableSource, torch.Tensor | None]]:
    """Yield the parts of a table, their sources, and W2 of narrow ones."""
    if form == "kept" or not isinstance(table, RangedTableSource):
        whole = KeptTableSource.of(table, kept)
        yield ServedPart(table.name, 0, kept.rows, table.embedding_dim), whole, None
        return
    groups = _groups(table, encoding)
    starts = accumulate((sum(table.ranges[i].rows for i in group) for group in groups), initial=0)
    for number, (group, first_row) in enumerate(zip(groups, starts, strict=False)):
        zero_row = number == len(groups) - 1 and kept.rows > kept.count and table.shared_row is None
        name = table.name if len(groups) == 1 else f"{table.name}:{group[0]}"
        narrow = is_narrow(table.ranges[group[0]], table.embedding_dim, encoding)
        source = table.select(name, group, zero_row=zero_row, collapsed=not narrow)
        projection = table.projection_of(group[0]) if narrow else None
        state_name = f"{table.tables_prefix}projections.{name}.weight" if narrow else None
        yield ServedPart(name, first_row, source.num_embeddings, source.embedding_dim, state_name), source, projection


def _groups(table: RangedTableSource, encoding: Encoding) -> list[list[int]]:
    """Return the numbers of the stored ranges; those next to each other that are served with d columns together."""
    groups: list[list[int]] = []
    wide = False
    for index, each in enumerate(table.ranges):
        if not each.width:
            continue
        narrow = is_narrow(each, table.embedding_dim, encoding)
        if groups and wide and not narrow:
            groups[-1].append(index)
        else:
            groups.append([index])
        wide = not narrow
    return groups


def is_narrow(rows: RowRange, embedding_dim: int, encoding: Encoding) -> bool:
    """Return whether a range takes fewer bytes as rows of its own width with W2 than as rows of d columns."""
    if rows.width >= embedding_dim or not encoding.fits(rows.width):
        return False
    narrow = rows.rows * encoding.row_bytes(rows.width) + projection_bytes(rows.width, embedding_dim)
    return narrow < rows.rows * encoding.row_bytes(embedding_dim)
