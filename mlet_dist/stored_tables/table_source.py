"""One table of a run, an export or factors on disk, of which ranges of rows are read."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors
from mlet_dist.embeddings.multi_layer_tables import check_layers_fit
from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.errors import UserError

_GAP = 64  # rows that are read and thrown away rather than begin another read
_MOST_ROWS = 1 << 16  # that are read together


@dataclass(frozen=True)
class LocatedRows:
    """Rows of one width among those that were asked for, and where they are stored.

    Attributes:
        positions: which of the ids they are ``(m,)`` int64.
        stored_name: the tensor that holds them in the files.
        stored_rows: their rows there ``(m,)`` int64.
        width: their columns.
        projection_name: the name of their W2 in the state dict of the trained model; None if they have none.
        projection: W2 ``(width, d)`` float32. The vector of a row is the sum over all of its parts, of which rows that
            are not cut into chunks have one at most.
    """

    positions: torch.Tensor
    stored_name: str
    stored_rows: torch.Tensor
    width: int
    projection_name: str | None
    projection: torch.Tensor | None


@dataclass(frozen=True)
class TableSource:
    """One table on disk: W (n, d) of a single layer, or W1 (n, k) and W2 (k, d).

    Attributes:
        name: of the table.
        state_name: name of W in the state dict of the served model, and of W1 in that of the trained model.
        num_embeddings, hidden_dim, embedding_dim: n, k and d; k is None for a single layer.
        projection: W2, float32; None for a single layer.
        rows_dtype: of W1, or of W for a single layer.
        stored_name: name of W1, or of W for a single layer, in the files.
        order: in which its rows are stored; None for rows that are stored by id.
    """

    name: str
    state_name: str
    num_embeddings: int
    hidden_dim: int | None
    embedding_dim: int
    projection: torch.Tensor | None
    rows_dtype: torch.dtype
    stored_name: str
    _files: ChunkedTensors
    order: RowOrder | None = field(default=None, kw_only=True)

    @property
    def location(self) -> str:
        """Path or URL of the files, for messages."""
        return str(self._files.location)

    @property
    def rows_prefix(self) -> str:
        """The prefix of the names of rows in the state dict, ``<collection>.embedding_bags.`` or ``….embeddings.``."""
        return self.state_name.removesuffix(f"{self.name}.weight")

    @property
    def tables_prefix(self) -> str:
        """The prefix of the tables' names in the state dict."""
        return _tables_prefix(self.state_name, self.name)

    @property
    def stored_bytes(self) -> int:
        """Bytes of W1 and W2, or of W for a single layer, as stored."""
        projection = 0 if self.projection is None else self.projection.numel() * self.projection.element_size()
        return self.num_embeddings * self.row_bytes + projection

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of W1, or of W for a single layer, as stored."""
        return (self.hidden_dim or self.embedding_dim) * self.rows_dtype.itemsize

    def read_stored(self, start: int, stop: int) -> torch.Tensor:
        """Read rows ``[start, stop)`` of W1, or of W for a single layer: ``(stop - start, k or d)`` as stored.

        Raises:
            UserError: a file is missing or damaged.
        """
        rows = torch.empty(stop - start, self.hidden_dim or self.embedding_dim, dtype=self.rows_dtype)
        self.read_into(start, rows)
        return rows

    def read_into(self, start: int, rows: torch.Tensor) -> None:
        """Fill ``rows``, contiguous, with the rows from ``start`` on that ``read_stored`` would return."""
        self.read_by_id(self.stored_name, self.order, start, rows)

    def read_by_id(self, name: str, order: RowOrder | None, start: int, rows: torch.Tensor) -> None:
        """Fill ``rows`` with the rows from ``start`` on of a tensor whose rows are stored in ``order``.

        Raises:
            UserError: a file is missing or damaged.
        """
        if order is None:
            self._files.read_rows(name, start, rows)
        else:
            ids = torch.arange(start, start + len(rows))
            self._read_located(name, order.stored_rows(ids), rows)

    @property
    def projections(self) -> dict[int, tuple[str, torch.Tensor]]:
        """The name in the state dict and the values ``(w, d)`` of each W2 of whole rows, by w."""
        if self.projection is None:
            return {}
        return {self.projection.shape[0]: (projection_name(self.tables_prefix, self.name), self.projection)}

    def locate(self, ids: torch.Tensor) -> list[LocatedRows]:
        """Return where the rows of ``ids`` are stored, ``(n,)`` int64; none for those that read zero."""
        name = None if self.projection is None else projection_name(self.tables_prefix, self.name)
        width = self.hidden_dim or self.embedding_dim
        rows = ids if self.order is None else self.order.stored_rows(ids)
        return [LocatedRows(torch.arange(len(ids)), self.stored_name, rows, width, name, self.projection)]

    def load(self, name: str) -> torch.Tensor:
        """Return a small tensor of the files."""
        return self._files.load(name)

    def read_located(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        """Read rows of a tensor of the files, in any order: ``(m, columns)``, or ``(m,)`` if it has one dimension.

        Raises:
            UserError: a file is missing or damaged.
        """
        found = self._files.tensors.get(name)
        if found is None:
            raise UserError(f"{self.location}: holds no tensor {name!r}")
        values = torch.empty((len(rows), *found.shape[1:]), dtype=found.dtype)
        self._read_located(name, rows, values)
        return values

    def _read_located(self, name: str, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Fill ``values`` with rows of a tensor of the files, in any order."""
        ordered, order = rows.sort()
        for first, begin, end in _runs(ordered):
            read = values.new_empty((int(ordered[end - 1]) + 1 - first, *values.shape[1:]))
            self._files.read_rows(name, first, read)
            values[order[begin:end]] = read[ordered[begin:end] - first]

    @property
    def shared_row(self) -> int | None:
        """The id of the row that ids of rows that are not stored read; None if they read zero.

        All rows up to it are stored, and none after it.
        """
        return None

    def stored_rows(self, start: int, stop: int) -> torch.Tensor | None:
        """Return which rows of ``[start, stop)`` are stored, bool ``(stop - start,)``; None if all are.

        Rows that are not stored read zero, or ``shared_row``.
        """
        return None

    def with_files(self, files: ChunkedTensors) -> Self:
        """Return a copy that reads from other open files."""
        return replace(self, _files=files)

    def first_columns(self, embedding_dim: int) -> Self:
        """Return the table of the first columns of W; that of a single layer is W1 = W with an identity as W2."""
        w2 = torch.eye(self.embedding_dim) if self.projection is None else self.projection
        return replace(
            self,
            hidden_dim=len(w2),
            embedding_dim=embedding_dim,
            projection=w2[:, :embedding_dim].contiguous(),
        )


def projection_name(tables_prefix: str, name: str) -> str:
    """Return the name in the state dict of a W2: of a table, or of a part of one, ``<table>:<part>``."""
    return f"{tables_prefix}projections.{name}.weight"


def _tables_prefix(state_name: str, name: str) -> str:
    return state_name.removesuffix(f"{name}.weight").removesuffix("embedding_bags.").removesuffix("embeddings.")


def _runs(rows: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (first row, begin, end) of runs of ascending rows that are read together."""
    if not len(rows):
        return
    cuts = (rows.diff() > _GAP) | ((rows // _MOST_ROWS).diff() > 0)
    ends = [*cuts.nonzero().squeeze(1).add(1).tolist(), len(rows)]
    begin = 0
    for end in ends:
        yield int(rows[begin]), begin, end
        begin = end


def open_table(
    name: str,
    shape: Sequence[int],
    hidden_dim: int | None,
    files: ChunkedTensors,
    prefix: str,
    state_name: str,
    *,
    spread: bool = False,
) -> TableSource:
    """Return a table of ``files`` after checking that its W has ``shape`` (n, d); ``spread`` as in open_tables."""
    stored_name = f"{prefix}{state_name}"
    num_embeddings, embedding_dim = shape
    projection = None
    if stored_name not in files.tensors:
        raise UserError(f"{files.location}: holds no tensor {state_name!r}, which the model has")
    found = files.tensors[stored_name]
    if hidden_dim is not None:
        projection = files.load(f"{prefix}{projection_name(_tables_prefix(state_name, name), name)}").float()
        try:
            check_layers_fit(name, torch.Size(found.shape), projection.size())
        except ValueError as error:
            raise UserError(f"{files.location}: {error}") from None
    expected = (num_embeddings, hidden_dim or embedding_dim)
    if found.shape != expected or (projection is not None and projection.shape[1] != embedding_dim):
        raise UserError(f"{files.location}: {state_name!r} is {found.shape} in the files and {expected} in the model")
    return TableSource(
        name,
        state_name,
        num_embeddings,
        hidden_dim,
        embedding_dim,
        projection,
        found.dtype,
        stored_name,
        files,
        order=RowOrder((num_embeddings,)) if spread else None,
    )
