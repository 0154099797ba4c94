"""Compare the tables of an output of kept rows or of mixed widths with W1·W2, in the numbering of kept rows."""

from collections.abc import Callable

import torch

from mlet_dist.embeddings.collapse import collapse_rows
from mlet_dist.errors import UserError
from mlet_dist.export.kept_rows import KeptRows, KeptTableSource
from mlet_dist.export.outputs import read_parts
from mlet_dist.export.verify.table_check import (
    CheckedTable,
    FormRows,
    StoredOutput,
    TableError,
    check_block_rows,
    empty_parts,
)
from mlet_dist.stored_tables.table_source import TableSource


def check_form(
    table: TableSource, output: StoredOutput, wanted: torch.Tensor, checked: CheckedTable, done: Callable[[int], None]
) -> None:
    """Compare all kept rows of a table, and the zero row, with those of an output, and add the result to ``checked``.

    Args:
        wanted: the ids whose rows are looked up, ascending int64.
        done: is called with the number of rows after each block.

    Raises:
        UserError: a file is missing or damaged, or the output keeps other rows than the run.
    """
    assert output.layout is not None
    kept, layout = KeptRows.of(table), output.layout.tables[table.name]
    ids = None if layout.kept_ids is None else output.files.load(layout.kept_ids).long()
    same = layout.kept == kept.count and (ids is None) == (kept.ids is None)
    if not same or (ids is not None and kept.ids is not None and not torch.equal(ids, kept.ids)):
        raise UserError(
            f"{output.files.location}: keeps {layout.kept:,} rows of table {table.name!r}, which are not the "
            f"{kept.count:,} that {table.location} stores; name the run that it was exported from"
        )
    trained, error = KeptTableSource.of(table, kept), TableError()
    numbers = kept.renumber(wanted)
    used = numbers.unique()
    parts = []
    for part in layout.parts:
        state_name = f"{table.rows_prefix}{part.name}.weight"
        projection = None if part.projection is None else output.files.load(part.projection)
        first, last = torch.searchsorted(used, torch.tensor([part.first_row, part.first_row + part.num_embeddings]))
        rows = used[int(first) : int(last)] - part.first_row
        parts.append(empty_parts(output.encoding, part.embedding_dim, len(rows)))
        step = check_block_rows(table)
        for start in range(0, part.num_embeddings, step):
            stop = min(start + step, part.num_embeddings)
            stored = trained.read_stored(part.first_row + start, part.first_row + stop).float()
            expected = stored if table.projection is None else collapse_rows(stored, table.projection)
            block = read_parts(output.files, output.encoding, state_name, start, stop, part.embedding_dim)
            found = output.encoding.decode(block)
            error.add(part.first_row + start, expected, found if projection is None else found @ projection)
            begin, end = torch.searchsorted(rows, torch.tensor([start, stop])).tolist()
            for suffix, encoded in block.items():
                parts[-1][suffix][begin:end] = encoded[rows[begin:end] - start]
            done(stop - start)
    error.worst_row = kept.id_of(error.worst_row)
    checked.errors[output.name] = error
    checked.of_form[output.name] = FormRows(torch.searchsorted(used, numbers), used, parts)
