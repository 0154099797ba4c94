"""Decoded rows in memory, column by column. ``mlet synth`` uses them, too, so this module does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SingleValued:
    """Consecutive features with one id per row: (rows, features) int32, laid out by row or by column."""

    ids: npt.NDArray[np.int32]

    def slice(self, start: int, stop: int) -> "SingleValued":
        return SingleValued(self.ids[start:stop])

    def take(self, index: IntArray) -> "SingleValued":
        return SingleValued(self.ids.take(index, axis=0))

    def join(self, others: Sequence["SingleValued"]) -> "SingleValued":
        return SingleValued(np.concatenate([self.ids, *(other.ids for other in others)]))


@dataclass(frozen=True)
class MultiValued:
    """One feature with any number of ids per row: row i has the ids and weights [offsets[i], offsets[i + 1]).

    Attributes:
        offsets: (rows + 1,) int64; the first need not be 0.
        ids: (N,) int32.
        weights: (N,) float32, or None if the feature is not weighted.
    """

    offsets: IntArray
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] | None

    def slice(self, start: int, stop: int) -> "MultiValued":
        return MultiValued(self.offsets[start : stop + 1], self.ids, self.weights)

    def take(self, index: IntArray) -> "MultiValued":
        starts, lengths = self.offsets[index], self.offsets[index + 1] - self.offsets[index]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.repeat(starts - offsets[:-1], lengths) + np.arange(offsets[-1])
        return MultiValued(offsets, self.ids[positions], None if self.weights is None else self.weights[positions])

    def join(self, others: Sequence["MultiValued"]) -> "MultiValued":
        parts = [self, *others]
        ends = list(accumulate((part.offsets[-1] - part.offsets[0] for part in parts), initial=0))
        offsets = [part.offsets[:-1] - part.offsets[0] + end for part, end in zip(parts, ends, strict=False)]
        return MultiValued(
            np.concatenate([*offsets, ends[-1:]]),
            np.concatenate([part.in_range(part.ids) for part in parts]),
            None if self.weights is None else np.concatenate([part.in_range(part.weights) for part in parts]),
        )

    def in_range(self, values: npt.NDArray[Any] | None) -> npt.NDArray[Any]:
        """Return the part of ``ids`` or ``weights`` that belongs to these rows."""
        assert values is not None
        return values[self.offsets[0] : self.offsets[-1]]


@dataclass(frozen=True)
class Rows:
    """Rows of a split.

    Attributes:
        labels: (rows,) float32; with several labels (rows, labels), NaN where a row lacks one.
        dense: (rows, num_dense) float32.
        sparse: the sparse features, in the order of the KeyedJaggedTensor's keys.
        weights: (rows,) float32, the weights of the rows; None if all have the same.
    """

    labels: npt.NDArray[np.float32]
    dense: npt.NDArray[np.float32]
    sparse: tuple[SingleValued | MultiValued, ...]
    weights: npt.NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def slice(self, start: int, stop: int) -> "Rows":
        """Return rows ``[start, stop)`` as a view."""
        sparse = tuple(column.slice(start, stop) for column in self.sparse)
        weights = None if self.weights is None else self.weights[start:stop]
        return Rows(self.labels[start:stop], self.dense[start:stop], sparse, weights)

    def take(self, index: IntArray) -> "Rows":
        """Return the rows at these positions, in this order."""
        sparse = tuple(column.take(index) for column in self.sparse)
        weights = None if self.weights is None else self.weights[index]
        return Rows(self.labels[index], self.dense.take(index, axis=0), sparse, weights)

    def join(self, others: Sequence["Rows"]) -> "Rows":
        """Return these rows followed by the others."""
        if not others:
            return self
        columns = zip(self.sparse, *(other.sparse for other in others), strict=True)
        return Rows(
            np.concatenate([self.labels, *(other.labels for other in others)]),
            np.concatenate([self.dense, *(other.dense for other in others)]),
            tuple(first.join(rest) for first, *rest in columns),
            None if self.weights is None else np.concatenate([self.weights, *(other.weights for other in others)]),
        )
