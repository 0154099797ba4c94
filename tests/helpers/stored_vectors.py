"""The vectors that tables on disk serve, and those that tables with other widths or more rows should begin with."""

import torch

from mlet_dist.stored_tables.table_source import TableSource


def vectors_of(table: TableSource) -> torch.Tensor:
    """Return W ``(n, d)`` of a table in float64."""
    rows = table.read_stored(0, table.num_embeddings).double()
    return rows if table.projection is None else rows @ table.projection.double()


def expected_vectors(before: torch.Tensor, table: TableSource) -> torch.Tensor:
    """Return what the first rows of a table, which may now have more, should be after they were ``before``."""
    expected = torch.zeros_like(before)
    for part in table.locate(torch.arange(len(before))):
        vectors = before[part.positions]
        if part.projection is not None:
            w2 = part.projection.double()
            vectors = vectors @ torch.linalg.pinv(w2) @ w2  # the closest vectors that the W2 can express
        expected[part.positions] = vectors
    if table.shared_row is not None and table.shared_row < len(before):
        expected[table.shared_row :] = before[table.shared_row :].mean(dim=0)
    return expected
