"""The candidates of `mlet export --budget`: sizes and encodings of a run within a number of bytes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from mlet_dist.config.compression_section import CompressionConfig
from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.errors import UserError
from mlet_dist.export.budget.allocation import PricedTable, Ranges, allocate, blocks_of, costs_of, widths_of
from mlet_dist.export.encoding import ENCODINGS, Encoding
from mlet_dist.export.served_layout import Form
from mlet_dist.export.served_sources import served_sources
from mlet_dist.export.size_choice import Counts, refit
from mlet_dist.export.sized_model import RefittedTable, Size, at_size
from mlet_dist.export.source import ModelSource
from mlet_dist.models.row_widths import Sizes, static_ranges
from mlet_dist.stored_tables.refitted_source import vectors_of_ids
from mlet_dist.stored_tables.table_source import TableSource

_READ_ROWS = 1 << 16
_SMALLEST_SHARE, _HALVINGS = 1e-6, 30


@dataclass(frozen=True)
class Candidate:
    """Tables within the budget.

    Attributes:
        rows: how the widths of rows were chosen: ``all`` have the same, ``sensitivity`` (``allocation``), ``counts``
            (as ``compression.policy`` static does), or ``kept`` (d columns or none).
        encoding: of the rows.
        embedding_dim: the columns of the widest rows.
        bytes: of all tables as they are served.
        size: of the export; None for the tables of the run.
    """

    rows: str
    encoding: Encoding
    embedding_dim: int
    bytes: int
    size: Size | None

    @property
    def output(self) -> str:
        """The name of the export's output."""
        name = "dcp" if self.encoding.name == "fp32" else self.encoding.name
        return name if self.rows == "all" else f"{name}-{self._form}"

    @property
    def _form(self) -> Form:
        return "kept" if self.rows == "kept" else "mixed"

    @property
    def refitted(self) -> Mapping[str, RefittedTable]:
        """The tables whose rows are refitted, by name."""
        return {} if self.size is None else self.size.tables

    def describe(self) -> dict[str, object]:
        """Return plain data for JSON."""
        found: dict[str, object] = {
            "output": self.output,
            "rows": self.rows,
            "embedding_dim": self.embedding_dim,
            "bytes": self.bytes,
        }
        if self.refitted:
            rows = sum(each.rows for table in self.refitted.values() for each in table.ranges)
            widths = sorted({each.width for table in self.refitted.values() for each in table.ranges}, reverse=True)
            found["shares_of_widths"] = {
                str(width): sum(
                    each.rows for table in self.refitted.values() for each in table.ranges if each.width == width
                )
                / rows
                for width in widths
            }
        return found


class CandidateMaker:
    """Makes the candidates of a model of one width.

    Args:
        source: the model; that of a nested width is ``at_size`` of the run.
        columns: that width; None for the width of the run.
        counts: lookups of each row in training.
        curvatures: of the loss, by table.
        rows_of_split: of the training split.

    Raises:
        UserError: a file is missing or damaged.
    """

    def __init__(
        self,
        source: ModelSource,
        columns: int | None,
        counts: Counts,
        curvatures: Mapping[str, torch.Tensor],
        rows_of_split: int,
    ) -> None:
        self._source, self._columns = source, columns
        self._counts = {name: _known(counts(name), table) for name, table in source.tables.items()}
        self._dims = {name: table.embedding_dim for name, table in source.tables.items()}
        self._priced = {}
        for name, table in source.tables.items():
            blocks, widths = blocks_of(table, self._counts[name], rows_of_split), widths_of(table.embedding_dim)
            self._priced[name] = PricedTable(blocks, widths, costs_of(blocks, curvatures[name], widths))

    @property
    def embedding_dim(self) -> int:
        """The columns of the widest table."""
        return max(self._dims.values())

    def within(self, budget: int) -> Iterator[Candidate]:
        """Yield the candidates that take at most ``budget`` bytes.

        Raises:
            UserError: a file is missing or damaged.
        """
        for encoding in ENCODINGS.values():
            if not all(encoding.fits(d) for d in self._dims.values()):
                continue
            whole = sum(table.num_embeddings * encoding.row_bytes(table.embedding_dim) for table in self._tables)
            if whole <= budget:
                size = None if self._columns is None else Size(self._columns, "columns")
                yield Candidate("all", encoding, self.embedding_dim, whole, size)
                continue

            def size_of(ranges: Ranges, form: Form = "mixed", encoding: Encoding = encoding) -> int:
                return self._bytes(ranges, form, encoding)

            yield from self._graded("sensitivity", "mixed", allocate(self._priced, encoding, budget, size_of), encoding)
            yield from self._graded("counts", "mixed", self._by_counts(budget, size_of), encoding)
            own = {name: (d,) for name, d in self._dims.items()}
            kept = allocate(self._priced, encoding, budget, lambda ranges: size_of(ranges, "kept"), own)
            yield from self._graded("kept", "kept", kept, encoding)

    def fewest_bytes(self) -> int:
        """Return the bytes of one row of each table in the smallest encoding."""
        return min(
            sum(encoding.row_bytes(d) for d in self._dims.values())
            for encoding in ENCODINGS.values()
            if all(encoding.fits(d) for d in self._dims.values())
        )

    @property
    def _tables(self) -> list[TableSource]:
        return list(self._source.tables.values())

    def _graded(self, rows: str, form: Form, ranges: Ranges | None, encoding: Encoding) -> Iterator[Candidate]:
        if ranges is None:
            return
        tables = {name: self._refit(name, of_table) for name, of_table in ranges.items()}
        size = Size(self.embedding_dim, "graded", tables, self._columns)
        yield Candidate(rows, encoding, self.embedding_dim, self._bytes(ranges, form, encoding), size)

    def _refit(self, name: str, ranges: tuple[RowRange, ...]) -> RefittedTable:
        table, counts, shared = self._source.tables[name], self._counts[name], None
        if not ranges[-1].width:
            first = sum(each.rows for each in ranges if each.width) - 1
            total, lookups = torch.zeros(table.embedding_dim, dtype=torch.float64), 0.0
            for start in range(first, table.num_embeddings, _READ_ROWS):
                stop = min(start + _READ_ROWS, table.num_embeddings)
                total += (vectors_of_ids(table, start, stop) * counts[start:stop, None]).sum(dim=0)
                lookups += float(counts[start:stop].sum())
            shared = (total / max(lookups, 1.0)).float()
        return refit(table, ranges, counts, shared)

    def _bytes(self, ranges: Ranges, form: Form, encoding: Encoding) -> int:
        """Return the bytes of tables as they are served, which do not depend on what directions are chosen."""
        tables = {}
        for name, of_table in ranges.items():
            d = self._dims[name]
            directions = tuple(torch.zeros(each.width, d) if 0 < each.width < d else None for each in of_table)
            tables[name] = RefittedTable(of_table, directions, None if of_table[-1].width else torch.zeros(d))
        sized = at_size(self._source, Size(self.embedding_dim, "graded", tables))
        return served_sources(sized.tables, form, encoding).layout.table_bytes(encoding)

    def _by_counts(self, budget: int, size_of: Callable[[Ranges], int]) -> Ranges | None:
        """Return the largest ranges of ``compression.policy`` static that fit; None of ids that are not sorted."""
        counts = {name: each.long().numpy() for name, each in self._counts.items()}
        settings = {table.name: table.settings for table in self._source.spec.with_hidden_dim(None).tables}
        sizes = Sizes(self.embedding_dim, "sgd", own_dims=self._dims)
        best, low, high = None, _SMALLEST_SHARE, 1.0
        for _ in range(_HALVINGS):
            share = (low * high) ** 0.5
            try:
                found = static_ranges(counts, CompressionConfig(policy="static", budget=share), settings, sizes)
            except UserError:  # not even a row of each table, or ids that are not sorted by frequency
                low = share
                continue
            ranges = {name: tuple(RowRange(each.rows, each.width) for each in of) for name, of in found.items()}
            if size_of(ranges) <= budget:
                best, low = ranges, share
            else:
                high = share
        return best


def _known(counts: torch.Tensor | None, table: TableSource) -> torch.Tensor:
    return torch.ones(table.num_embeddings, dtype=torch.float64) if counts is None else counts
