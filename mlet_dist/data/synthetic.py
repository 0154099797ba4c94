"""Criteo-shaped data with a known best possible AUC, for demonstrations, tests and benchmarks.

Ids follow a power law. A label is drawn from a planted model of the kind that factorisation machines and DLRM learn:

    logit = bias + 0.5·z(sum_j w_j·dense_j) + 1.2·z(sum_f a_f[id_f]) + 0.8·z(sum_{f<g} <v_f[id_f], v_g[id_g]>)

where z scales to mean 0 and deviation 1, and rare ids have small a and v: what can be learnt is in the frequent ones.
"""

import gzip
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

from mlet_dist.data.formats import CRITEO_DENSE as DENSE
from mlet_dist.data.formats import CRITEO_SPARSE as SPARSE
from mlet_dist.data.parts import PartWriter
from mlet_dist.data.schema import MAX_NUM_EMBEDDINGS, DatasetSchema, SparseFeature
from mlet_dist.data.table import LABEL
from mlet_dist.errors import UserError
from mlet_dist.progress import Progress
from mlet_dist.staging import staged_directory

FloatArray = npt.NDArray[np.float64]

# Distinct values of C1-C26 in Criteo-Kaggle; the tables keep their order of sizes.
CRITEO_VALUES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
MIN_NUM_EMBEDDINGS = 4

POSITIVE_RATE = 0.25
DENSE_WEIGHT, ID_WEIGHT, INTERACTION_WEIGHT = 0.5, 1.2, 0.8
LATENT_DIM = 4
FREQUENT_IDS = 30  # up to about this rank an id's effect is full

# Fixed, because each chunk has a random stream of its own: other chunks would be other data.
CHUNK_ROWS = 1 << 16
AUC_BINS = 1 << 16
_MODEL_STREAM, _PILOT_STREAM, _ROWS_STREAM = range(3)


def synthesize(
    out: Path,
    *,
    rows: int,
    seed: int = 0,
    num_embeddings: int = 10_000,
    alpha: float = 1.05,
    format: Literal["parquet", "tsv"] = "parquet",
) -> dict[str, Any]:
    """Write a synthetic data set, or raw logs that ``prepare_criteo`` takes; the same seed gives the same bytes.

    Args:
        out: the directory to make.
        rows: how many rows in all splits together.
        seed: chooses the planted model and the rows.
        num_embeddings: size of the largest table; the others are smaller, roughly as in Criteo.
        alpha: exponent of the power law that the ids follow; 0 is uniform.
        format: ``parquet`` writes a prepared data set, whose ids are by rank of popularity and have no vocabulary;
            ``tsv`` writes ``part-00000.tsv.gz`` in Criteo's raw format, with the same rows.

    Returns:
        ``rows``, ``positive_rate`` and ``auc_ceiling``, the AUC of the true probabilities over all rows.

    Raises:
        UserError: an argument is out of range, or ``out`` is taken.
    """
    if rows < 1:
        raise UserError(f"rows is {rows}; it must be at least 1")
    if seed < 0:
        raise UserError(f"seed is {seed}; it must not be negative")
    if not MIN_NUM_EMBEDDINGS <= num_embeddings <= MAX_NUM_EMBEDDINGS:
        raise UserError(
            f"num_embeddings is {num_embeddings}; it must be at least {MIN_NUM_EMBEDDINGS} and at most "
            f"{MAX_NUM_EMBEDDINGS}"
        )
    if not 0 <= alpha < float("inf"):
        raise UserError(f"alpha is {alpha}; it must be 0 or more")
    if format not in ("parquet", "tsv"):
        raise UserError(f"format is {format!r}; it must be parquet or tsv")
    auc = _StreamingAuc()
    with staged_directory(out) as directory, Progress("synthesize", rows, "rows") as progress:
        model = _PlantedModel(seed, _table_sizes(num_embeddings), alpha)
        if format == "parquet":
            _write_data_set(directory, model, rows, auc, progress)
        else:
            _write_tsv(directory, model, rows, auc, progress)
    return {"rows": rows, "positive_rate": auc.positive_rate(), "auc_ceiling": auc.auc()}


def _table_sizes(largest: int) -> tuple[int, ...]:
    """Criteo's sizes on a logarithmic scale squeezed so that the smallest stays 3 values and the largest fits."""
    scale = np.log(np.array(CRITEO_VALUES) / 3) / np.log(max(CRITEO_VALUES) / 3)
    return tuple(int(size) for size in 1 + np.round(3 * ((largest - 1) / 3) ** scale))


@dataclass(frozen=True)
class _Rows:
    """A chunk: dense (m, 13) int64 with -1 where missing; ids (26, m) int32 from 1 on; labels (m,) int8."""

    dense: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int8]

    @property
    def transformed(self) -> npt.NDArray[np.float32]:
        """(m, 13): log(1 + x), missing = 0, as ``CriteoReader`` does."""
        return np.log1p(np.maximum(self.dense, 0)).astype(np.float32)


class _PlantedModel:
    """The distribution of the rows and the true probability of their labels.

    Args:
        seed: chooses all of it.
        sizes: num_embeddings of each table.
        alpha: exponent of the ids' power law.
    """

    def __init__(self, seed: int, sizes: tuple[int, ...], alpha: float) -> None:
        rng = np.random.default_rng([seed, _MODEL_STREAM])
        self.sizes = sizes
        self.vocabulary_id = hashlib.sha256(json.dumps([seed, float(alpha), sizes]).encode()).hexdigest()
        self._seed = seed
        self._missing = rng.uniform(0, 0.4, len(DENSE))
        self._dense_scale = rng.uniform(0.5, 6, len(DENSE))
        self._dense_effect = rng.normal(size=len(DENSE))
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

    def chunk(self, index: int) -> tuple[_Rows, FloatArray]:
        """Rows ``[index·CHUNK_ROWS, (index+1)·CHUNK_ROWS)`` and the probabilities (CHUNK_ROWS,) of label 1."""
        return self._draw(np.random.default_rng([self._seed, _ROWS_STREAM, index]))

    def _draw(self, rng: np.random.Generator) -> tuple[_Rows, FloatArray]:
        dense = np.floor(np.exp(self._dense_scale * np.abs(rng.normal(size=(CHUNK_ROWS, len(DENSE)))) / 2)) - 1
        dense[rng.random(dense.shape) < self._missing] = -1
        ids = np.empty((len(self.sizes), CHUNK_ROWS), dtype=np.int32)
        for table, cumulative in enumerate(self._cumulative):
            ids[table] = 1 + np.searchsorted(cumulative, rng.random(CHUNK_ROWS), side="right")
        rows = _Rows(dense.astype(np.int64), ids, np.zeros(CHUNK_ROWS, dtype=np.int8))
        probability = self._probability(self._terms(rows))
        rows.labels[:] = rng.random(CHUNK_ROWS) < probability
        return rows, probability

    def _terms(self, rows: _Rows) -> FloatArray:
        """(m, 3): the dense, the per-id and the interaction term, standardised once calibrated."""
        total, squares = np.zeros((2, rows.labels.size, LATENT_DIM))
        effect = np.zeros(rows.labels.size)
        for table, ids in enumerate(rows.ids):
            latent = self._latent[table][ids - 1]
            total += latent
            squares += latent**2
            effect += self._id_effect[table][ids - 1]
        interaction = ((total**2 - squares) / 2).sum(axis=1)
        dense = rows.transformed.astype(np.float64) @ self._dense_effect
        return (np.stack([dense, effect, interaction], axis=1) - self._terms_mean) / self._terms_deviation

    def _probability(self, terms: FloatArray) -> FloatArray:
        logit = self._bias + terms @ np.array([DENSE_WEIGHT, ID_WEIGHT, INTERACTION_WEIGHT])
        return 1 / (1 + np.exp(-logit))

    def _calibrate(self) -> None:
        """Standardise the terms and choose the bias on a pilot chunk that is not part of the data."""
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


def _chunks(model: _PlantedModel, rows: int, auc: "_StreamingAuc", progress: Progress) -> Iterator[_Rows]:
    for index, start in enumerate(range(0, rows, CHUNK_ROWS)):
        chunk, probability = model.chunk(index)
        size = min(CHUNK_ROWS, rows - start)
        auc.add(probability[:size], chunk.labels[:size])
        yield _Rows(chunk.dense[:size], chunk.ids[:, :size], chunk.labels[:size])
        progress.update(size)


def _write_data_set(directory: Path, model: _PlantedModel, rows: int, auc: "_StreamingAuc", progress: Progress) -> None:
    writer = PartWriter(directory, rows, LABEL)
    for chunk in _chunks(model, rows, auc, progress):
        columns = {LABEL: chunk.labels}
        columns |= dict(zip(DENSE, np.ascontiguousarray(chunk.transformed.T), strict=True))
        writer.write(pa.table(columns | dict(zip(SPARSE, chunk.ids, strict=True))))
    DatasetSchema(
        source="synthetic",
        label=LABEL,
        dense=DENSE,
        sparse=tuple(SparseFeature(name, size) for name, size in zip(SPARSE, model.sizes, strict=True)),
        malformed=0,
        parts={split: tuple(parts) for split, parts in writer.parts.items()},
        vocabulary_id=model.vocabulary_id,
    ).save(directory)


def _write_tsv(directory: Path, model: _PlantedModel, rows: int, auc: "_StreamingAuc", progress: Progress) -> None:
    options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    # Multiplying by an odd number permutes the 32-bit integers, so a table's values stay distinct.
    values = [
        pa.array([f"{(id * 2654435761 + table * 40503) % 2**32:08x}" for id in range(1, size)])
        for table, size in enumerate(model.sizes)
    ]
    with (
        (directory / "part-00000.tsv.gz").open("wb") as raw,
        # Neither name nor time in the header: the same seed gives the same bytes.
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as text,
    ):
        for chunk in _chunks(model, rows, auc, progress):
            columns = {LABEL: pa.array(chunk.labels)}
            columns |= {name: pa.array(x, mask=x < 0) for name, x in zip(DENSE, chunk.dense.T, strict=True)}
            columns |= {name: values[t].take(pa.array(chunk.ids[t] - 1)) for t, name in enumerate(SPARSE)}
            pyarrow.csv.write_csv(pa.table(columns), text, write_options=options)


class _StreamingAuc:
    """AUC over any number of rows from histograms of the probabilities of the positives and the negatives."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, AUC_BINS), dtype=np.int64)

    def add(self, probability: FloatArray, labels: npt.NDArray[np.int8]) -> None:
        bins = np.minimum((probability * AUC_BINS).astype(np.int64), AUC_BINS - 1)
        for label in (0, 1):
            self._counts[label] += np.bincount(bins[labels == label], minlength=AUC_BINS)

    def positive_rate(self) -> float:
        return float(self._counts[1].sum() / self._counts.sum())

    def auc(self) -> float:
        """Probability that a positive ranks above a negative, ties counting half; nan where one kind is absent."""
        negatives, positives = self._counts
        pairs = negatives.sum() * positives.sum()
        below = np.cumsum(negatives) - negatives
        return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else float("nan")
