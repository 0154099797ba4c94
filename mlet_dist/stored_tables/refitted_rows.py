"""Rows of a table on disk in another width, or with another W2, and the optimizer state that goes with them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

from mlet_dist.embeddings.row_moves import least_squares_inverse, rescaled_state
from mlet_dist.errors import UserError
from mlet_dist.stored_tables.table_source import LocatedRows, TableSource

_BLOCK_ROWS = 1 << 16
AVERAGE = "exp_avg"
"""The optimizer state that is a mean of gradients; others are sums or means of their squares."""


@dataclass(frozen=True)
class RefittedRows:
    """A table on disk, seen as rows of one width with one W2.

    A row whose width and W2 are those on disk is what it is there. Any other gets the least-squares solution of
    x'·W2' = x·W2 with the smallest norm: its vector stays what it was if the new width is d or more, but for directions
    that W2' has hardly (``row_moves.least_squares_inverse``).

    Attributes:
        source: the table.
        width: w', the columns of the rows.
        projection: W2' ``(w', d)``; None for rows that are vectors of d columns.
        same_as: the name of the W2 on disk that W2' is equal to; None if there is none.
    """

    source: TableSource
    width: int
    projection: torch.Tensor | None = None
    same_as: str | None = None

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the rows of ascending ids ``(n, w')`` float32.

        Raises:
            UserError: a file is missing or damaged.
        """
        rows = torch.zeros(len(ids), self.width)
        for part in self.source.locate(ids):
            values = self.source.read_located(part.stored_name, part.stored_rows).float()
            if self._is_same(part):
                rows[part.positions] = values
                continue
            vectors = values.double() if part.projection is None else values.double() @ part.projection.double()
            if self._inverse is not None:
                vectors = vectors @ self._inverse
            rows[part.positions] += vectors.float()
        return rows

    def mean_row(self, first: int, stop: int) -> torch.Tensor:
        """Return the row whose vector is closest to the mean of those of ids ``[first, stop)``, ``(1, w')`` float32."""
        total = torch.zeros(1, self.source.embedding_dim, dtype=torch.float64)
        for vectors in vectors_of(self.source, first, stop):
            total += vectors.sum(dim=0)
        mean = total / (stop - first)
        return (mean if self._inverse is None else mean @ self._inverse).float()

    def state(self, ids: torch.Tensor, name: str, stored_as: Callable[[str], str], *, by_row: bool) -> torch.Tensor:
        """Return an optimizer state of the rows of ascending ids ``(n, w')``, or ``(n,)`` if ``by_row``.

        Args:
            ids: of the rows.
            name: of the state, such as ``sum`` or ``exp_avg``.
            stored_as: from the name of a tensor in the files to that of its state.
            by_row: whether the optimizer has one number a row.

        The rows must be whole in the files. Ids that share a row there have equal parts of its state.

        Raises:
            UserError: a file is missing or damaged.
        """
        found = self._stored_state(ids, name, stored_as, by_row=by_row)
        if self.source.shared_row is not None:
            found[ids >= self.source.shared_row] /= self.source.num_embeddings - self.source.shared_row
        return found

    def _stored_state(
        self, ids: torch.Tensor, name: str, stored_as: Callable[[str], str], *, by_row: bool
    ) -> torch.Tensor:
        """Return the ``state`` of rows, which for all ids of a shared row is that of the row."""
        found = torch.zeros(len(ids) if by_row else (len(ids), self.width))
        for part in self.source.locate(ids):
            values = self.source.read_located(stored_as(part.stored_name), part.stored_rows).float()
            if self._is_same(part):
                found[part.positions] = values
            elif name == AVERAGE:
                found[part.positions] = self._moved_average(values.double(), part).float()
            else:
                found[part.positions] = rescaled_state(values, part.width, self.width)
        return found

    def sum_of_states(
        self, first: int, stop: int, name: str, stored_as: Callable[[str], str], *, by_row: bool
    ) -> torch.Tensor:
        """Return the sum of the ``state`` of ids ``[first, stop)``, ``(1, w')`` or ``(1,)``.

        It is about that of a row that all of them share, whose gradient is the sum of theirs.
        """
        rows = self.source.num_embeddings
        shared = rows if self.source.shared_row is None else self.source.shared_row
        total = torch.zeros(1 if by_row else (1, self.width))
        for start in range(first, min(stop, shared), _BLOCK_ROWS):
            ids = torch.arange(start, min(start + _BLOCK_ROWS, stop, shared))
            total += self._stored_state(ids, name, stored_as, by_row=by_row).sum(dim=0)
        if stop > shared:
            share = (stop - max(first, shared)) / (rows - shared)
            total += share * self._stored_state(torch.tensor([shared]), name, stored_as, by_row=by_row)
        return total

    def _is_same(self, part: LocatedRows) -> bool:
        if part.projection is None or self.projection is None:
            return part.projection is self.projection
        return part.projection_name is not None and part.projection_name == self.same_as

    def _moved_average(self, gradients: torch.Tensor, part: LocatedRows) -> torch.Tensor:
        """Return gradients of rows as those that they would have in the new width: g·W2'ᵀ for g·W2ᵀ."""
        if part.projection is not None:
            gradients = gradients @ least_squares_inverse(part.projection.double()).t()
        return gradients if self.projection is None else gradients @ self.projection.double().t()

    @cached_property
    def _inverse(self) -> torch.Tensor | None:
        return None if self.projection is None else least_squares_inverse(self.projection.double())


def vectors_of(source: TableSource, first: int, stop: int) -> Iterator[torch.Tensor]:
    """Yield the vectors of ids ``[first, stop)`` of a table in blocks ``(n, d)`` float64."""
    plain = RefittedRows(source, source.embedding_dim)
    for start in range(first, stop, _BLOCK_ROWS):
        yield plain.rows(torch.arange(start, min(start + _BLOCK_ROWS, stop))).double()


def gram_of(source: TableSource, first: int, stop: int) -> torch.Tensor:
    """Return the Gram matrix ``(d, d)`` float64 of the vectors of ids ``[first, stop)`` of a table."""
    d = source.embedding_dim
    gram = torch.zeros(d, d, dtype=torch.float64)
    for vectors in vectors_of(source, first, stop):
        gram.addmm_(vectors.T, vectors)
    return gram


def closest_projection(gram: torch.Tensor, initial: torch.Tensor) -> torch.Tensor:
    """Return the W2 ``(w, d)``, w < d, with which rows of w columns lose least of vectors with a Gram matrix.

    Its rows are the directions in which the vectors are longest, scaled to the mean norm of those of ``initial``. If
    all vectors are zero, it is ``initial``.
    """
    if not bool(gram.any()):
        return initial
    _, directions = torch.linalg.eigh(gram)
    longest = directions.flip(1)[:, : len(initial)].T
    return (longest * (float(initial.double().norm()) / math.sqrt(len(initial)))).to(initial.dtype)


def even_projection(initial: torch.Tensor) -> torch.Tensor:
    """Return the W2 ``(w, d)``, w >= d, closest to ``initial`` that has the same gain for all vectors.

    A random W2 of few more than d rows has hardly any gain in some directions, in which vectors would be lost.
    """
    left, _, right = torch.linalg.svd(initial.double(), full_matrices=False)
    return (left @ right * (float(initial.double().norm()) / math.sqrt(initial.shape[1]))).to(initial.dtype)


def check_source(source: TableSource, num_embeddings: int, embedding_dim: int) -> None:
    """Raise UserError unless a table on disk has the rows of a model's table and vectors of its width."""
    for name, found, wanted in (
        ("rows", source.num_embeddings, num_embeddings),
        ("columns as served", source.embedding_dim, embedding_dim),
    ):
        if found != wanted:
            raise UserError(
                f"{source.location}: table {source.name!r} has {found:,} {name}, and {wanted:,} in the model"
            )
