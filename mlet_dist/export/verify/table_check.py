"""Compare the tables of an export with W1·W2 block by block, and keep the rows of both that will be looked up."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors
from mlet_dist.embeddings.collapse import collapse_rows
from mlet_dist.export.encoding import Encoding
from mlet_dist.export.outputs import read_parts
from mlet_dist.export.served_layout import ServedLayout
from mlet_dist.stored_tables.table_source import TableSource

_BLOCK_BYTES = 1 << 25  # of the widest rows


@dataclass
class TableError:
    """The errors of an output's rows against W; the error of a value that is not finite is infinite.

    Attributes:
        max_abs_error: largest absolute error of a value.
        worst_row: the row of that value.
        largest: largest absolute value in W.
        squares, squared_errors: sums over all values of W² and of the squared errors.
    """

    max_abs_error: float = 0.0
    worst_row: int = 0
    largest: float = 0.0
    squares: float = 0.0
    squared_errors: float = 0.0

    def add(self, start: int, expected: torch.Tensor, found: torch.Tensor) -> None:
        """Add the errors of rows from ``start`` on."""
        error = (found - expected).abs().nan_to_num(nan=math.inf).double()
        largest, row = error.amax(dim=1).max(dim=0)
        if float(largest) > self.max_abs_error:
            self.max_abs_error, self.worst_row = float(largest), start + int(row)
        self.largest = max(self.largest, float(expected.abs().max()))
        self.squares += float(expected.double().square().sum())
        self.squared_errors += float(error.square().sum())

    def to_dict(self) -> dict[str, Any]:
        """Return ``max_abs_error``, ``worst_row`` and ``relative_error``, ||error|| / ||W|| in the Frobenius norm."""
        relative = 0.0
        if self.squared_errors:
            relative = math.sqrt(self.squared_errors / self.squares) if self.squares else math.inf
        return {"max_abs_error": self.max_abs_error, "worst_row": self.worst_row, "relative_error": relative}


@dataclass(frozen=True)
class StoredOutput:
    """An output of an export, open for reading; ``layout`` is None if it holds all rows with d columns."""

    name: str
    encoding: Encoding
    files: ChunkedTensors
    layout: ServedLayout | None = None


@dataclass(frozen=True)
class FormRows:
    """The rows of an output with a layout that are looked up.

    Attributes:
        positions: of each wanted row among ``numbers``.
        numbers: in the numbering of kept rows, ascending.
        parts: the encoded rows of each part of the table, by suffix.
    """

    positions: torch.Tensor
    numbers: torch.Tensor
    parts: list[dict[str, torch.Tensor]]


@dataclass
class CheckedTable:
    """A table of which all rows were compared.

    Attributes:
        stored: the kept rows of W1, or of W for a single layer, float32.
        parts: the kept rows of each output, by output and suffix.
        of_form: those of outputs with a layout, by output.
        errors: of each output.
    """

    stored: torch.Tensor
    parts: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    of_form: dict[str, FormRows] = field(default_factory=dict)
    errors: dict[str, TableError] = field(default_factory=dict)


def check_block_rows(table: TableSource) -> int:
    """Return the number of rows of a table that are compared at a time."""
    return max(1, _BLOCK_BYTES // (4 * max(table.hidden_dim or 0, table.embedding_dim)))


def empty_parts(encoding: Encoding, embedding_dim: int, rows: int) -> dict[str, torch.Tensor]:
    """Return memory for encoded rows, by suffix."""
    parts = encoding.parts(embedding_dim)
    return {suffix: torch.empty(rows, part.columns, dtype=part.dtype) for suffix, part in parts.items()}


def check_table(
    table: TableSource, outputs: Mapping[str, StoredOutput], wanted: torch.Tensor, done: Callable[[int], None]
) -> CheckedTable:
    """Read a table of a run and of an export's outputs in blocks of rows, and compare them.

    Args:
        outputs: those that hold all rows with d columns.
        wanted: the rows to keep, ascending int64.
        done: is called with the number of rows after each block.

    Raises:
        UserError: a file is missing or damaged.
    """
    columns = table.hidden_dim or table.embedding_dim
    step = check_block_rows(table)
    checked = CheckedTable(torch.empty(len(wanted), columns))
    for name, output in outputs.items():
        checked.parts[name] = empty_parts(output.encoding, table.embedding_dim, len(wanted))
        checked.errors[name] = TableError()
    for start in range(0, table.num_embeddings, step):
        stop = min(start + step, table.num_embeddings)
        stored = table.read_stored(start, stop).float()
        first, last = torch.searchsorted(wanted, torch.tensor([start, stop])).tolist()
        within = wanted[first:last] - start
        checked.stored[first:last] = stored[within]
        expected = stored if table.projection is None else collapse_rows(stored, table.projection)
        for name, output in outputs.items():
            block = read_parts(output.files, output.encoding, table.state_name, start, stop, table.embedding_dim)
            checked.errors[name].add(start, expected, output.encoding.decode(block))
            for suffix, rows in block.items():
                checked.parts[name][suffix][first:last] = rows[within]
        done(stop - start)
    return checked
