"""What a choice of widths keeps: the shares of all rows and of all lookups that have each width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.models.row_widths import Counts


@dataclass(frozen=True)
class WidthShare:
    """The rows of one width, of all tables together.

    Attributes:
        width: their columns; 0 for rows that are not stored.
        rows: their share of all rows.
        lookups: their share of all lookups of the training split.
    """

    width: int
    rows: float
    lookups: float


def width_shares(ranges: Mapping[str, Sequence[RowRange]], lookups: Mapping[str, float]) -> list[WidthShare]:
    """Return the shares of each width, the largest width first.

    Args:
        ranges: the row ranges of each table, with their shares of its lookups.
        lookups: those of each table, in any unit.
    """
    rows: dict[int, int] = {}
    found: dict[int, float] = {}
    for name, of_table in ranges.items():
        for each in of_table:
            rows[each.width] = rows.get(each.width, 0) + each.rows
            found[each.width] = found.get(each.width, 0.0) + each.share * lookups[name]
    all_rows, all_lookups = sum(rows.values()), sum(found.values()) or 1.0
    return [WidthShare(each, rows[each] / all_rows, found[each] / all_lookups) for each in sorted(rows, reverse=True)]


def total_lookups(counts: Mapping[str, Counts]) -> dict[str, float]:
    """Return the lookups of each table, given those of its rows."""
    return {name: float(of_table.sum()) for name, of_table in counts.items()}


def describe_shares(shares: Sequence[WidthShare]) -> str:
    """Return the shares in one line."""
    return ", ".join(
        f"{each.rows:.1%} of the rows with {each.width} columns ({each.lookups:.1%} of lookups)" for each in shares
    )
