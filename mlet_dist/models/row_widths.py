"""Static compression: the width of every row, chosen before training from how often training looks it up.

A row with c lookups gets the largest of the permitted widths that is at most s·c^alpha, or none (mixed dimensions,
arXiv:1909.11810, with the temperature alpha). The scale s is the largest with which the tables stay within the budget:
rows, W2 and the optimizer's state of both together. Of rows with as many lookups, the first ones of their tables come
first. Tables may have limits of their own on the widths of their rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from mlet_dist.config.byte_sizes import bytes_of
from mlet_dist.config.compression_section import CompressionConfig
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.table_settings import TableSettings
from mlet_dist.embeddings.planning.cost_model import FLOAT, Optimizer, replicated_bytes, row_state_bytes
from mlet_dist.embeddings.sharded.slot_map import BYTES_PER_BUCKET, BYTES_PER_ROW, BYTES_PER_STEP
from mlet_dist.embeddings.slot_layout import FEWEST_SLOTS, fewest_rows_of_width, number_of_buckets
from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.errors import UserError

Counts = npt.NDArray[np.int64]

_HALVINGS = 60  # of the interval of log s
_TIE = 0.5  # the largest difference that the order of rows makes; counts differ by 1 at least


@dataclass(frozen=True)
class Sizes:
    """The bytes that a row and a W2 take in training, with their optimizer state.

    Attributes:
        embedding_dim: d.
        optimizer: the optimizer of the rows. W2 has the same one, but adagrad if the rows have rowwise_adagrad.
        bytes_per_row: what every row takes besides, whatever its width: slots and utilities.
        chunks: the number of chunks into which rows are cut; 0 for whole rows. Their W2 is that of all columns, for
            each table that has one.
        hidden_dim: k of these tables; None for single-layer tables.
        own_dims: d of the tables that have another, by name; none where rows move or are cut into chunks.
    """

    embedding_dim: int
    optimizer: Optimizer
    bytes_per_row: int = 0
    chunks: int = 0
    hidden_dim: int | None = None
    own_dims: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        optimizer: Optimizer,
        compression: CompressionConfig,
        own_dims: Mapping[str, int] = MappingProxyType({}),
    ) -> "Sizes":
        """Return the sizes of a config's tables."""
        if compression.policy != "adaptive":
            return cls(model.embedding_dim, optimizer, own_dims=own_dims)
        chunks = 0 if compression.nested else compression.chunks
        return cls(model.embedding_dim, optimizer, BYTES_PER_ROW * max(1, chunks), chunks, model.hidden_dim)

    def of_table(self, name: str) -> "Sizes":
        """Return the sizes of a table by its d."""
        d = self.own_dims.get(name, self.embedding_dim)
        return self if d == self.embedding_dim else replace(self, embedding_dim=d, own_dims={})

    def row(self, width: int) -> int:
        """Return the bytes of a row of W1, each of whose chunks has a state of its own; 0 for width 0."""
        if not self.chunks:
            return self._row(width)
        return width // self._chunk_width * self._row(self._chunk_width)

    def _row(self, width: int) -> int:
        return FLOAT * width + row_state_bytes(self.optimizer, width) if width else 0

    @property
    def _chunk_width(self) -> int:
        return (self.hidden_dim or self.embedding_dim) // self.chunks

    def projection(self, width: int) -> int:
        """Return the bytes of the W2 of a range, without its gradient; 0 for rows of width d, which have none."""
        return 0 if self.chunks or width in (0, self.embedding_dim) else self._projection(width)

    def _projection(self, width: int) -> int:
        elements = width * self.embedding_dim
        return replicated_bytes(elements, self.optimizer) - FLOAT * elements

    def table(self, ranges: Sequence[RowRange]) -> int:
        """Return the bytes of a table with row ranges."""
        rows = sum(each.rows for each in ranges)
        of_chunks = self._projection(self.hidden_dim) if self.chunks and self.hidden_dim else 0
        return (
            of_chunks
            + rows * self.bytes_per_row
            + sum(each.rows * self.row(each.width) + self.projection(each.width) for each in ranges)
        )

    def total(self, tables: Mapping[str, Sequence[RowRange]]) -> int:
        """Return the bytes of tables with row ranges, or a few more where rows move (see ``trained``).

        Slots and utilities are those of whole buckets, so that there are some for rows that do not exist.
        """
        size = sum(self.of_table(name).table(ranges) for name, ranges in tables.items())
        if not self.bytes_per_row:
            return size
        buckets = self._buckets(tables)
        rows = sum(each.rows for ranges in tables.values() for each in ranges)
        return size + -rows % buckets * self.bytes_per_row + buckets * BYTES_PER_BUCKET + BYTES_PER_STEP

    def trained(self, tables: Mapping[str, Sequence[RowRange]]) -> int:
        """Return the bytes that tables with row ranges take in training.

        Where rows move, a width has equally many slots in each bucket, so a few less than rows; ``total`` leaves this
        out, because it must not be smaller for more rows.
        """
        if not self.bytes_per_row:
            return self.total(tables)
        buckets = self._buckets(tables)
        without_slot = {width: number % buckets for width, number in self.stored(tables).items()}
        return self.total(tables) - sum(number * self._row(width) for width, number in without_slot.items())

    def _buckets(self, tables: Mapping[str, Sequence[RowRange]]) -> int:
        return number_of_buckets(min(self.stored(tables).values(), default=0))

    def stored(self, tables: Mapping[str, Sequence[RowRange]]) -> dict[int, int]:
        """Return the number of rows of each width above 0; of chunks, their number under the key of one chunk."""
        chunk = self._chunk_width if self.chunks else 0
        found: dict[int, int] = {}
        for width, rows in ((each.width, each.rows) for of in tables.values() for each in of if each.width):
            key, number = (chunk, rows * width // chunk) if chunk else (width, rows)
            found[key] = found.get(key, 0) + number
        return found

    def single(self, rows: Mapping[str, int]) -> int:
        """Return the bytes of single-layer tables of these numbers of rows."""
        return sum(number * self.of_table(name)._single_row for name, number in rows.items())

    @property
    def _single_row(self) -> int:
        return self._row(self.embedding_dim)


def default_widths(table: TableSettings, compression: CompressionConfig) -> tuple[int, ...]:
    """Return the widths that rows of a table may have if the config names none.

    They are hidden_dim and its halves above embedding_dim, embedding_dim, and a half and a quarter of it if kernels
    support that. Rows cut into chunks may have any number of chunks.
    """
    d, found = table.embedding_dim, []
    if not compression.nested:
        chunk = table.row_width // compression.chunks
        return tuple(chunk * number for number in range(compression.chunks, 0, -1))
    width = table.row_width
    while width > d and width % 4 == 0:
        found.append(width)
        width //= 2
    return (*found, d, *(d // part for part in (2, 4) if d % (4 * part) == 0))


def shares_rows(compression: CompressionConfig) -> bool:
    """Return whether rows of width 0 share a row of their table."""
    return compression.policy == "static" and compression.shared_rows


def budget_bytes(compression: CompressionConfig, single: int) -> int:
    """Return the budget in bytes; ``single`` is the size of the single-layer tables, of which it may be a share."""
    budget = compression.budget
    return bytes_of(budget) if isinstance(budget, str) else int(budget * single)


def permitted_widths(name: str, compression: CompressionConfig, table: TableSettings) -> tuple[int, ...]:
    """Return the widths that rows of a table may have, ascending; 0 is among them if rows may be left out.

    Raises:
        UserError: a limit of ``compression.tables`` is none of the widths; or as for ``_widths``.
    """
    widths = [0, *_widths(name, compression, table)]
    limits = compression.limits(name)
    for key, limit in (("min_width", limits.min_width), ("max_width", limits.max_width)):
        if limit is not None and limit not in widths:
            raise UserError(
                f"compression.tables.{name}.{key} is {limit}, which is none of the widths "
                f"{', '.join(map(str, widths[1:]))}; use one of them, or name it in compression.widths"
            )
    highest = widths[-1] if limits.max_width is None else limits.max_width
    return tuple(width for width in widths if limits.min_width <= width <= highest)


def _widths(name: str, compression: CompressionConfig, table: TableSettings) -> list[int]:
    """Return the widths of a table, whatever its limits, ascending: of the config's, those up to hidden_dim or d.

    Raises:
        UserError: the config names none of these.
    """
    named = compression.widths or default_widths(table, compression)
    widths = sorted({width for width in named if width <= table.row_width})
    if not widths:
        kind = "embedding_dim" if table.hidden_dim is None else "hidden_dim"
        raise UserError(
            f"compression.widths has no width up to {table.row_width}, the {kind} of table {name!r}; add one"
        )
    return widths


def static_ranges(
    counts: Mapping[str, Counts],
    compression: CompressionConfig,
    tables: Mapping[str, TableSettings],
    sizes: Sizes,
) -> dict[str, tuple[RowRange, ...]]:
    """Return the row ranges of each table; with policy adaptive those that it begins with.

    Args:
        counts: lookups of each row by table, sorted in descending order but for row 0, which stands for values out of
            vocabulary and is treated as the row after it. Those of a table with a single permitted width need not be
            sorted.
        compression: budget, widths, alpha, and limits on the widths of single tables.
        tables: the settings of each table, for its widths.
        sizes: of rows and W2.

    Raises:
        UserError: the counts of a table are not sorted, a table's limits are none of the widths, or the budget is too
            small for one row of each table and the limits, or for the rows that a width needs where rows move.
    """
    permitted = {name: permitted_widths(name, compression, tables[name]) for name in counts}
    widths = sorted({width for name in counts for width in _widths(name, compression, tables[name])})
    adaptive = compression.policy == "adaptive" and compression.nested
    fewest_rows = fewest_rows_of_width(sum(len(each) for each in counts.values())) if adaptive else 1
    while True:
        left = {name: tuple(each for each in of_table if each in (0, *widths)) for name, of_table in permitted.items()}
        for name, of_table in left.items():
            if of_table == (0,):
                most = compression.limits(name).max_width
                where, remedy = f"compression.tables.{name}.max_width is {most}", "use a larger max_width"
                if most is None:
                    most, remedy = tables[name].row_width, "use a larger hidden_dim for it"
                    where = f"no row of table {name!r} has more than {most} columns"
                raise UserError(
                    f"{where}, and with compression.budget {compression.budget} too few rows have so few columns: "
                    f"policy {compression.policy} needs {fewest_rows} of each width; {remedy}, or policy static"
                )
        found = _static_ranges(counts, compression, left, widths, sizes)
        chunks = sum(sizes.stored(found).values()) if sizes.chunks else FEWEST_SLOTS
        if chunks < FEWEST_SLOTS:
            raise UserError(
                f"compression.budget {compression.budget} stores {chunks} chunks of rows, and compression.nested false "
                f"needs {FEWEST_SLOTS}; use a larger budget, more compression.chunks, or policy static"
            )
        rows = {width: sum(_rows_of(width, each) for each in found.values()) for width in widths}
        rare = [width for width in widths if 0 < rows[width] < fewest_rows]
        if not rare:
            return found
        if len(widths) == 1:
            raise UserError(
                f"compression.budget {compression.budget} stores {rows[widths[0]]} rows of {widths[0]} columns, and "
                f"policy {compression.policy} needs {fewest_rows}; use a larger budget, or policy static"
            )
        widths.remove(max(rare))


def _rows_of(width: int, ranges: Sequence[RowRange]) -> int:
    return sum(each.rows for each in ranges if each.width == width)


def _static_ranges(
    counts: Mapping[str, Counts],
    compression: CompressionConfig,
    permitted: Mapping[str, Sequence[int]],
    widths: Sequence[int],
    sizes: Sizes,
) -> dict[str, tuple[RowRange, ...]]:
    """Return the row ranges within the budget, of the ``permitted`` widths of each table; all are ascending."""
    ordered = {name: _descending(name, each, check=len(permitted[name]) > 1) for name, each in counts.items()}
    single = sizes.single({name: len(each) for name, each in counts.items()})
    budget = budget_bytes(compression, single)

    shared = shares_rows(compression)

    def at(log_scale: float) -> dict[str, list[RowRange]]:
        least = {width: (width / math.exp(log_scale)) ** (1 / compression.alpha) for width in widths}
        return {
            name: _ranges(each, permitted[name], least, sizes.of_table(name), shared=shared)
            for name, each in ordered.items()
        }

    def size(ranges: Mapping[str, Sequence[RowRange]]) -> int:
        return sizes.total(ranges)

    top = max(float(each[0]) for each in ordered.values())
    # With the lowest scale all rows have the least width of their table, with the highest the largest one.
    low = math.log(widths[0]) - compression.alpha * math.log(max(top, 1.0)) - 1
    high = math.log(widths[-1]) + 1
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if size(at(middle)) <= budget else (low, middle)
    found = at(low)
    if size(found) > budget:
        limits = " with the widths of compression.tables" if compression.tables else ""
        slots = sizes.bytes_per_row * sum(len(each) for each in counts.values())
        of_slots = f", of which {slots:,} are slots and utilities of all rows," if slots else ""
        raise UserError(
            f"compression.budget {compression.budget} is {budget:,} bytes, in which one row of each table{limits} "
            f"cannot be stored; it must be at least {size(found):,} bytes{of_slots or ','} which is "
            f"{_rounded_up(size(found) / single)} of the {single:,} bytes of single-layer tables"
        )
    return {name: _with_shares(found[name], each) for name, each in ordered.items()}


def largest_bytes(
    rows: Mapping[str, int], compression: CompressionConfig, tables: Mapping[str, TableSettings], sizes: Sizes
) -> int:
    """Return the bytes of tables of these numbers of rows, all of the largest width that their tables permit."""
    return sizes.total(
        {
            name: [RowRange(number, permitted_widths(name, compression, tables[name])[-1])]
            for name, number in rows.items()
        }
    )


def _rounded_up(share: float) -> str:
    """Return the least number of three digits that is not below ``share``."""
    unit = 10.0 ** (math.floor(math.log10(share)) - 2)
    return f"{math.ceil(share / unit) * unit:.3g}"


def _descending(name: str, counts: Counts, *, check: bool) -> npt.NDArray[np.float64]:
    """Return the counts with that of row 0 replaced by the largest, and the first of equal ones made larger.

    Raises:
        UserError: ``check`` is set, and the counts are far from sorted.
    """
    known = counts.copy()
    known[0] = known[1] if len(known) > 1 else max(known[0], 1)
    if check and (known[1:] > known[:-1]).any():
        sorted_counts = np.sort(known)[::-1]
        cut = max(1, len(known) // 4)
        if known[:cut].sum() < 0.5 * sorted_counts[:cut].sum():
            raise UserError(
                f"the ids of table {name!r} are not sorted by descending frequency: "
                f"the first quarter of its rows has {known[:cut].sum():,} lookups, and the most frequent quarter "
                f"{sorted_counts[:cut].sum():,}; use a vocabulary of the features that the model takes, prepared "
                "without --like, policy static with one width for the whole table "
                f"(compression.tables.{name}), or policy none"
            )
    envelope = np.maximum.accumulate(known[::-1])[::-1]
    return envelope + np.linspace(_TIE, 0, len(known), endpoint=False)


def _ranges(
    counts: npt.NDArray[np.float64],
    permitted: Sequence[int],
    least: Mapping[int, float],
    sizes: Sizes,
    *,
    shared: bool,
) -> list[RowRange]:
    """Return the ranges of a table, widest first, of rows with at least ``least`` lookups for each permitted width.

    If rows of width 0 share a row, it is a range of d columns before theirs.

    Rows that are too few for a width pass to a neighbouring one: wide rows are no more than W2 has rows, so that they
    take no more than the next narrower width; narrow ones save less than their W2 takes, and get d columns.
    """
    ascending = counts[::-1]
    upper = [len(counts), *(len(counts) - int(np.searchsorted(ascending, least[each])) for each in permitted[1:]), 0]
    d = sizes.embedding_dim
    rows = {width: upper[i] - upper[i + 1] for i, width in enumerate(permitted)}
    for i in reversed(range(1, 0 if sizes.chunks else len(permitted))):
        width, next_narrower = permitted[i], permitted[i - 1]
        if width > d and next_narrower and 0 < rows[width] < width:
            rows[next_narrower] += rows[width]
            rows[width] = 0
    for width in permitted:
        saved = rows[width] * (sizes.row(d) - sizes.row(width)) if 0 < width < d and not sizes.chunks else 0
        if 0 < width < d and d in rows and rows[width] and saved <= sizes.projection(width):
            rows[d] += rows[width]
            rows[width] = 0
    if rows.get(0) == len(counts):  # every table stores its first row at least
        first = d if d in rows else min(permitted[1:])
        rows[first], rows[0] = 1, len(counts) - 1
    found = [RowRange(rows[width], width) for width in sorted(rows, reverse=True) if rows[width]]
    if shared and d in rows and not found[-1].width:
        others = found[-1].rows - 1
        found[-1:] = [RowRange(1, d), *([RowRange(others, 0)] if others else [])]
    return found


def _with_shares(ranges: Sequence[RowRange], counts: npt.NDArray[np.float64]) -> tuple[RowRange, ...]:
    """Return the ranges of a table with their shares of its lookups."""
    ends = np.cumsum([each.rows for each in ranges])
    sums = [float(counts[end - each.rows : end].sum()) for each, end in zip(ranges, ends, strict=True)]
    total = max(1.0, sum(sums))
    return tuple(each._replace(share=of / total) for each, of in zip(ranges, sums, strict=True))
