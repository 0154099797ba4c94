"""The click logs of ``compression_arms.py``: prepared data sets, and made streams in which popularity drifts.

``load`` reads the Parquet files of `mlet prepare` or `mlet synth` once and keeps the arrays beside ``--cache``.
``drifting`` draws a stream whose popular ids change over time, from a model whose probabilities are known.
"""

import hashlib
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Clicks:
    """Rows in the order of time: first those of the training split, then valid, then test.

    Attributes:
        dense: (m, num_dense) float32.
        ids: (m, num_tables) int64; ids count through all tables, so that every id is a row of one large table.
        labels: (m,) float32.
        sizes: the rows of each table.
        ends: the number of rows up to the end of train, valid and test.
        ceiling: LogLoss of the true probabilities on the test split, where they are known.
    """

    dense: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.float32]
    sizes: tuple[int, ...]
    ends: tuple[int, int, int]
    ceiling: float | None = None

    def counts(self, share: float = 1.0) -> npt.NDArray[np.int64]:
        """Return the lookups of each row in the first ``share`` of the training split."""
        return np.bincount(self.ids[: int(share * self.ends[0])].ravel(), minlength=sum(self.sizes))


def load(path: Path, cache: Path) -> Clicks:
    """Read a prepared data set, from the cache if it is there."""
    cached = cache / f"{path.name}-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}.npz"
    if not cached.exists():
        schema = json.loads((path / "schema.json").read_text())
        sparse = [each["name"] for each in schema["sparse"]]
        offsets = np.cumsum([0] + [each["num_embeddings"] for each in schema["sparse"]])
        tables = [pq.read_table(path / split) for split in SPLITS]
        dense, ids, labels = [], [], []
        for table in tables:
            columns = [table[name].to_numpy() for name in schema["dense"]] or [np.ones(table.num_rows)]
            dense.append(np.stack(columns, axis=1).astype(np.float32))
            ids.append(np.stack([table[name].to_numpy() for name in sparse], axis=1) + offsets[:-1])
            labels.append(table[schema["label"]].to_numpy().astype(np.float32))
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(
            cached,
            dense=np.concatenate(dense),
            ids=np.concatenate(ids).astype(np.int64),
            labels=np.concatenate(labels),
            sizes=np.diff(offsets),
            ends=np.cumsum([table.num_rows for table in tables]),
        )
    found = np.load(cached)
    train, valid, test = (int(end) for end in found["ends"])
    sizes = tuple(int(size) for size in found["sizes"])
    return Clicks(found["dense"], found["ids"], found["labels"], sizes, (train, valid, test))


def drifting(
    seed: int,
    rows: int = 200_000,
    num_ids: int = 4_000,
    features: int = 8,
    lifetime: float = 0.3,
    periods: int = 100,
    alpha: float = 1.1,
    latent_dim: int = 4,
) -> Clicks:
    """Draw a stream in which every id's popularity rank is redrawn at random times; 88% train, 4% valid, 8% test.

    An id's rank lasts for a time that is geometric with mean ``lifetime``, as a share of the stream. What an id does
    to the label never changes:

        logit = bias + z(dense · w) + 1.4·z(sum_f a_f) + 0.9·z(sum_{f<g} <v_f, v_g>)

    Args:
        seed: seed of the model and of the stream.
        rows: length of the stream.
        num_ids: rows of each table.
        features: number of tables.
        lifetime: mean time for which an id keeps its rank; ``inf`` for no drift.
        periods: number of times at which ranks may change.
        alpha: exponent of the power law of popularity.
        latent_dim: rank of the interactions.
    """
    rng = np.random.default_rng([seed, 7])
    popularity = np.arange(1, num_ids + 1, dtype=np.float64) ** -alpha
    cumulative = np.cumsum(popularity) / popularity.sum()
    ids = np.empty((rows, features), dtype=np.int64)
    id_of_rank = np.stack([rng.permutation(num_ids) for _ in range(features)])
    bounds = np.linspace(0, rows, periods + 1).astype(int)
    for start, end in itertools.pairwise(bounds):
        for feature in range(features):
            if start:
                moved = np.flatnonzero(rng.random(num_ids) < 1 / (lifetime * periods))
                id_of_rank[feature, moved] = id_of_rank[feature, rng.permutation(moved)]
            ranks = np.searchsorted(cumulative, rng.random(end - start), side="right")
            ids[start:end, feature] = id_of_rank[feature, np.minimum(ranks, num_ids - 1)]
    ids += num_ids * np.arange(features)
    dense = rng.normal(size=(rows, 4)).astype(np.float32)
    vectors = rng.normal(size=(features * num_ids, latent_dim))[ids]
    terms = np.stack(
        [
            dense @ rng.normal(size=4),
            rng.normal(size=features * num_ids)[ids].sum(axis=1),
            (vectors.sum(axis=1) ** 2 - (vectors**2).sum(axis=1)).sum(axis=1) / 2,
        ],
        axis=1,
    )
    logits = -1.5 + (terms - terms.mean(axis=0)) / terms.std(axis=0) @ np.array([0.6, 1.4, 0.9])
    probability = 1 / (1 + np.exp(-logits))
    labels = (rng.random(rows) < probability).astype(np.float32)
    train, valid = int(0.88 * rows), int(0.92 * rows)
    true, seen = probability[valid:], labels[valid:]
    ceiling = -float(np.mean(seen * np.log(true) + (1 - seen) * np.log(1 - true)))
    return Clicks(dense, ids, labels, (num_ids,) * features, (train, valid, rows), ceiling)
