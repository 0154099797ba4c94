"""The distribution that synthetic rows are drawn from, with the true probability of each label.

Ids follow a power law. Labels are drawn from a ground-truth model of the kind that factorisation machines and DLRM
learn:

    logit = bias + 0.5·z(sum_j w_j·dense_j) + 1.2·z(sum_f a_f) + 0.8·z(sum_{f<g} <v_f, v_g>)

a_f and v_f are the effect and the latent vector of feature f's id; for a list of ids they are (weighted) sums. z
standardises to mean 0 and standard deviation 1. Rare ids have small a and v, so that most of what can be learnt is in
the frequent ones.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlet_dist.data.loading.rows import MultiValued

FloatArray = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32] | MultiValued

POSITIVE_RATE = 0.25
DENSE_WEIGHT, ID_WEIGHT, INTERACTION_WEIGHT = 0.5, 1.2, 0.8
LATENT_DIM = 4
FREQUENT_IDS = 30  # the popularity rank at which an id's effect has fallen to one half

# Must not change: each chunk has its own random stream, so another chunk size would give other data.
CHUNK_ROWS = 1 << 16
_MODEL_STREAM, _PILOT_STREAM, _ROWS_STREAM = range(3)


@dataclass(frozen=True)
class ListDistribution:
    """The lists of a multi-valued feature: lengths are Poisson(``mean``); weights, if any, are uniform in [0, 2)."""

    mean: float
    weighted: bool


@dataclass(frozen=True)
class SyntheticRows:
    """A chunk of m rows.

    Attributes:
        dense: (m, num_dense) int64, -1 where missing.
        ids: for each table (m,) int32, or the lists of a multi-valued feature; ids start at 1.
        labels: (m,) int8.
    """

    dense: npt.NDArray[np.int64]
    ids: tuple[Ids, ...]
    labels: npt.NDArray[np.int8]

    @property
    def transformed(self) -> npt.NDArray[np.float32]:
        """``dense`` as ``mlet prepare`` transforms it: log(1 + x), 0 where missing; (m, num_dense) float32."""
        return np.log1p(np.maximum(self.dense, 0)).astype(np.float32)

    def first(self, rows: int) -> "SyntheticRows":
        """Return the first ``rows`` rows."""
        ids = tuple(each.slice(0, rows) if isinstance(each, MultiValued) else each[:rows] for each in self.ids)
        return SyntheticRows(self.dense[:rows], ids, self.labels[:rows])


class SyntheticModel:
    """The distribution of the rows, and the ground-truth probability of their labels.

    Args:
        seed: seed of the model and of the rows.
        num_dense: number of dense columns.
        sizes: num_embeddings of each table.
        alpha: exponent of the ids' power law.
        lists: the tables with lists of ids, by table number.
    """

    def __init__(
        self, seed: int, num_dense: int, sizes: tuple[int, ...], alpha: float, lists: Mapping[int, ListDistribution]
    ) -> None:
        rng = np.random.default_rng([seed, _MODEL_STREAM])
        self.sizes = sizes
        self.vocabulary_id = hashlib.sha256(json.dumps([seed, float(alpha), sizes]).encode()).hexdigest()
        self._seed, self._lists = seed, lists
        self._missing = rng.uniform(0, 0.4, num_dense)
        self._dense_scale = rng.uniform(0.5, 6, num_dense)
        self._dense_effect = rng.normal(size=num_dense)
        self._cumulative: list[FloatArray] = []
        self._id_effect: list[FloatArray] = []
        self._latent: list[FloatArray] = []
        for size in sizes:
            rank = np.arange(1, size, dtype=np.float64)
            cumulative = np.cumsum(rank**-alpha)
            strength = 1 / (1 + rank / FREQUENT_IDS)
            self._cumulative.append(cumulative / cumulative[-1])
            self._id_effect.append(rng.normal(size=size - 1) * strength)
            self._latent.append(rng.normal(size=(size - 1, LATENT_DIM)) * strength[:, None])
        self._terms_mean, self._terms_deviation, self._bias = np.zeros(3), np.ones(3), 0.0
        self._calibrate()

    def chunk(self, index: int) -> tuple[SyntheticRows, FloatArray]:
        """Return rows ``[index·CHUNK_ROWS, (index+1)·CHUNK_ROWS)`` and the probability of label 1 of each."""
        return self._draw(np.random.default_rng([self._seed, _ROWS_STREAM, index]))

    def _draw(self, rng: np.random.Generator) -> tuple[SyntheticRows, FloatArray]:
        shape = (CHUNK_ROWS, len(self._missing))
        dense = np.floor(np.exp(self._dense_scale * np.abs(rng.normal(size=shape)) / 2)) - 1
        dense[rng.random(shape) < self._missing] = -1
        ids = tuple(self._draw_ids(table, rng) for table in range(len(self.sizes)))
        rows = SyntheticRows(dense.astype(np.int64), ids, np.zeros(CHUNK_ROWS, dtype=np.int8))
        probability = self._probability(self._terms(rows))
        rows.labels[:] = rng.random(CHUNK_ROWS) < probability
        return rows, probability

    def _draw_ids(self, table: int, rng: np.random.Generator) -> Ids:
        lists = self._lists.get(table)
        if lists is None:
            return self._power_law(table, rng.random(CHUNK_ROWS))
        offsets = np.concatenate([[0], np.cumsum(rng.poisson(lists.mean, CHUNK_ROWS))])
        ids = self._power_law(table, rng.random(offsets[-1]))
        weights = (2 * rng.random(offsets[-1])).astype(np.float32) if lists.weighted else None
        return MultiValued(offsets, ids, weights)

    def _power_law(self, table: int, uniform: FloatArray) -> npt.NDArray[np.int32]:
        return (1 + np.searchsorted(self._cumulative[table], uniform, side="right")).astype(np.int32)

    def _terms(self, rows: SyntheticRows) -> FloatArray:
        """Return the dense, the per-id and the interaction term: (m, 3); standardised once the model is calibrated."""
        total, squares = np.zeros((2, rows.labels.size, LATENT_DIM))
        effect = np.zeros(rows.labels.size)
        for table, ids in enumerate(rows.ids):
            latent = _pooled(self._latent[table], ids)
            total += latent
            squares += latent**2
            effect += _pooled(self._id_effect[table], ids)
        interaction = ((total**2 - squares) / 2).sum(axis=1)
        dense = rows.transformed.astype(np.float64) @ self._dense_effect
        return (np.stack([dense, effect, interaction], axis=1) - self._terms_mean) / self._terms_deviation

    def _probability(self, terms: FloatArray) -> FloatArray:
        logit = self._bias + terms @ np.array([DENSE_WEIGHT, ID_WEIGHT, INTERACTION_WEIGHT])
        return 1 / (1 + np.exp(-logit))

    def _calibrate(self) -> None:
        """Fit the terms' mean and deviation, then the bias, on a pilot chunk that is not part of the data."""
        rows, _ = self._draw(np.random.default_rng([self._seed, _PILOT_STREAM]))
        terms = self._terms(rows)
        self._terms_mean, self._terms_deviation = terms.mean(axis=0), terms.std(axis=0)
        terms = self._terms(rows)
        low, high = -20.0, 20.0
        for _ in range(50):
            self._bias = (low + high) / 2
            if self._probability(terms).mean() > POSITIVE_RATE:
                high = self._bias
            else:
                low = self._bias


def _pooled(values: FloatArray, ids: Ids) -> FloatArray:
    """Look a table's values (size - 1, …) up at each row's id, or sum them over its list of ids: (m, …)."""
    if not isinstance(ids, MultiValued):
        return values[ids - 1]
    found = values[ids.ids - 1]
    if ids.weights is not None:
        found = (found.T * ids.weights).T
    sums = np.concatenate([np.zeros_like(found, shape=(1, *found.shape[1:])), np.cumsum(found, axis=0)])
    return sums[ids.offsets[1:]] - sums[ids.offsets[:-1]]
