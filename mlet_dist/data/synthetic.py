"""Synthetic data in the shape of Criteo's logs, of any size and with a known best possible AUC (``mlet synth``)."""

import gzip
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from mlet_dist.atomic_directory import staged_directory
from mlet_dist.data.loading.prefetch import map_ahead
from mlet_dist.data.loading.rows import MultiValued
from mlet_dist.data.parquet_parts import PartWriter, split_bounds
from mlet_dist.data.prepare.raw_formats import CRITEO_DENSE as DENSE
from mlet_dist.data.prepare.raw_formats import CRITEO_SPARSE as SPARSE
from mlet_dist.data.prepare.raw_formats import LABEL, criteo
from mlet_dist.data.preprocessing import Preprocessing, dense_rules, label_rules, sparse_rules
from mlet_dist.data.schema import MAX_NUM_EMBEDDINGS, DatasetSchema, SparseFeature
from mlet_dist.data.synthetic_model import CHUNK_ROWS, FloatArray, Ids, ListDistribution, SyntheticModel, SyntheticRows
from mlet_dist.errors import UserError
from mlet_dist.progress import Progress

# Numbers of distinct values of C1-C26 in Criteo-Kaggle; the synthetic tables keep their order.
CRITEO_VALUES = (
    *(1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194),
    *(27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15, 286181, 105, 142572),
)
MIN_NUM_EMBEDDINGS = 4
MAX_MEAN_LENGTH = 100
AUC_BINS = 1 << 16
_THREADS = 2


def synthesize(
    out: Path,
    *,
    rows: int,
    seed: int = 0,
    num_embeddings: int = 10_000,
    alpha: float = 1.05,
    multi_valued: Mapping[str, float] | None = None,
    weighted: Collection[str] = (),
    format: Literal["parquet", "tsv"] = "parquet",
) -> dict[str, Any]:
    """Write a synthetic data set, or raw logs for ``prepare_criteo``; the same seed gives the same bytes.

    Args:
        out: directory to create.
        rows: number of rows of all splits together.
        seed: seed of the ground-truth model and of the rows.
        num_embeddings: size of the largest table; the others are smaller, roughly as in Criteo.
        alpha: exponent of the power law that the ids follow; 0 is uniform.
        multi_valued: features of C1-C26 that hold lists of ids, with the mean length of each one's lists.
        weighted: features of ``multi_valued`` whose ids have weights.
        format: ``parquet`` writes a prepared data set without vocabularies, in which ids are ranks of popularity;
            ``tsv`` writes the same rows to ``part-00000.tsv.gz`` in Criteo's raw format.

    Returns:
        ``rows`` and ``positive_rate``, and the AUC and LogLoss of the true probabilities on all rows, which no model
        passes but by luck: ``auc_ceiling`` and ``logloss_floor``.

    Raises:
        UserError: an argument is out of range, or ``out`` is not empty.
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
    lists = _lists(multi_valued or {}, weighted)
    if lists and format == "tsv":
        raise UserError("format is tsv, which holds one id a row; write multi-valued features as parquet")
    best = _StreamingQuality()
    with staged_directory(out) as directory, Progress("synthesize", rows, "rows") as progress:
        model = SyntheticModel(seed, len(DENSE), _table_sizes(num_embeddings), alpha, lists)
        if format == "parquet":
            _write_data_set(directory, model, lists, rows, best, progress)
        else:
            _write_tsv(directory, model, rows, best, progress)
    return {
        "rows": rows,
        "positive_rate": best.positive_rate(),
        "auc_ceiling": best.auc(),
        "logloss_floor": best.logloss(),
    }


def _table_sizes(largest: int) -> tuple[int, ...]:
    """Return Criteo's table sizes, scaled logarithmically so that the smallest keeps 3 values and the largest fits."""
    scale = np.log(np.array(CRITEO_VALUES) / 3) / np.log(max(CRITEO_VALUES) / 3)
    return tuple(int(size) for size in 1 + np.round(3 * ((largest - 1) / 3) ** scale))


def _lists(multi_valued: Mapping[str, float], weighted: Collection[str]) -> dict[int, ListDistribution]:
    for name, mean in multi_valued.items():
        if name not in SPARSE:
            raise UserError(f"multi_valued names {name!r}; the features are {SPARSE[0]} to {SPARSE[-1]}")
        if not 0 < mean <= MAX_MEAN_LENGTH:
            raise UserError(
                f"multi_valued: the mean length of {name} is {mean}; it must be above 0, at most {MAX_MEAN_LENGTH}"
            )
    for name in weighted:
        if name not in multi_valued:
            raise UserError(f"weighted names {name!r}, which is not multi-valued; give the mean length of its lists")
    return {SPARSE.index(name): ListDistribution(mean, name in weighted) for name, mean in multi_valued.items()}


def _chunks(model: SyntheticModel, rows: int, best: "_StreamingQuality", progress: Progress) -> Iterator[SyntheticRows]:
    """Yield ``rows`` rows chunk by chunk, drawn ahead by threads, and add them to ``best`` and ``progress``."""
    starts = range(0, rows, CHUNK_ROWS)
    with closing(map_ahead(model.chunk, range(len(starts)), threads=_THREADS, ahead=_THREADS + 1)) as chunks:
        for start, (chunk, probability) in zip(starts, chunks, strict=True):
            size = min(CHUNK_ROWS, rows - start)
            best.add(probability[:size], chunk.labels[:size])
            yield chunk.first(size)
            progress.update(size)


def _write_data_set(
    directory: Path,
    model: SyntheticModel,
    lists: Mapping[int, ListDistribution],
    rows: int,
    best: "_StreamingQuality",
    progress: Progress,
) -> None:
    writer = PartWriter(directory, rows, LABEL)
    trained = 0  # rows of the training split so far
    train_rows, lengths = split_bounds(rows)["train"][1], dict.fromkeys(lists, 0)
    for chunk in _chunks(model, rows, best, progress):
        columns = {LABEL: pa.array(chunk.labels)}
        columns |= dict(zip(DENSE, map(pa.array, np.ascontiguousarray(chunk.transformed.T)), strict=True))
        for name, ids in zip(SPARSE, chunk.ids, strict=True):
            columns |= _columns(name, ids)
        writer.write(pa.table(columns))
        counted = min(len(chunk.labels), train_rows - trained)
        for table in lists:
            lengths[table] += len(pc.list_flatten(columns[SPARSE[table]].slice(0, counted)))
        trained += counted
    DatasetSchema(
        source="synthetic",
        label=LABEL,
        dense=DENSE,
        sparse=tuple(
            SparseFeature(name, size, True, lists[table].weighted, lengths[table] / train_rows)
            if table in lists
            else SparseFeature(name, size)
            for table, (name, size) in enumerate(zip(SPARSE, model.sizes, strict=True))
        ),
        malformed=0,
        parts={split: tuple(parts) for split, parts in writer.parts.items()},
        preprocessing=_preprocessing(model.vocabulary_id),
        vocabulary_id=model.vocabulary_id,
    ).save(directory)


def _preprocessing(vocabulary_id: str) -> Preprocessing:
    """Return that of ``mlet prepare criteo``, which the columns imitate, with the ids of the synthetic model."""
    spec = criteo()
    return Preprocessing(
        label=label_rules(spec.label),
        dense={dense.name: dense_rules(dense) for dense in spec.dense},
        sparse={sparse.name: sparse_rules(sparse, vocabulary_id) for sparse in spec.sparse},
    )


def _columns(name: str, ids: Ids) -> dict[str, pa.Array]:
    if not isinstance(ids, MultiValued):
        return {name: pa.array(ids)}
    offsets = pa.array(ids.offsets.astype(np.int32))
    columns = {name: pa.ListArray.from_arrays(offsets, pa.array(ids.ids))}
    if ids.weights is not None:
        columns[f"{name}.weight"] = pa.ListArray.from_arrays(offsets, pa.array(ids.weights))
    return columns


def _write_tsv(
    directory: Path, model: SyntheticModel, rows: int, best: "_StreamingQuality", progress: Progress
) -> None:
    options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    # Multiplying by an odd number permutes the 32-bit integers, so a table's values stay distinct.
    values = [
        pa.array([f"{(id * 2654435761 + table * 40503) % 2**32:08x}" for id in range(1, size)])
        for table, size in enumerate(model.sizes)
    ]
    with (
        (directory / "part-00000.tsv.gz").open("wb") as raw,
        # The gzip header holds neither name nor time, so that the same seed gives the same bytes.
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", compresslevel=1, mtime=0) as text,
    ):
        for chunk in _chunks(model, rows, best, progress):
            columns = {LABEL: pa.array(chunk.labels)}
            columns |= {name: pa.array(x, mask=x < 0) for name, x in zip(DENSE, chunk.dense.T, strict=True)}
            for name, of_table, ids in zip(SPARSE, values, chunk.ids, strict=True):
                assert not isinstance(ids, MultiValued)
                columns[name] = of_table.take(pa.array(ids - 1))
            pyarrow.csv.write_csv(pa.table(columns), text, write_options=options)


class _StreamingQuality:
    """The LogLoss of any number of rows, and their AUC, from histograms of probabilities by label."""

    def __init__(self) -> None:
        self._counts = np.zeros((2, AUC_BINS), dtype=np.int64)
        self._log_likelihood = 0.0

    def add(self, probability: FloatArray, labels: npt.NDArray[np.int8]) -> None:
        bins = np.minimum((probability * AUC_BINS).astype(np.int64), AUC_BINS - 1)
        for label in (0, 1):
            self._counts[label] += np.bincount(bins[labels == label], minlength=AUC_BINS)
        self._log_likelihood += float(np.log(np.where(labels == 1, probability, 1 - probability)).sum())

    def positive_rate(self) -> float:
        return float(self._counts[1].sum() / self._counts.sum())

    def logloss(self) -> float:
        return float(-self._log_likelihood / self._counts.sum())

    def auc(self) -> float:
        """Return the probability that a positive ranks above a negative (a tie counts half), NaN if one is absent."""
        negatives, positives = self._counts
        pairs = negatives.sum() * positives.sum()
        below = np.cumsum(negatives) - negatives
        return float((positives * (below + negatives / 2)).sum() / pairs) if pairs else float("nan")
