"""The cases of benchmarks/step.py, and their batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from torchrec import KeyedJaggedTensor

from mlet_dist.config.model_section import ModelConfig
from mlet_dist.data.loading.loader import Batch, DataLoader
from mlet_dist.data.schema import DatasetSchema, SparseFeature
from mlet_dist.models.spec import ModelSpec

BATCHES = (64, 128, 1024, 4096, 16384)
RANKS = (1, 2, 4)
IDS = ("uniform", "zipf", "real")
OPTIMIZERS = ("sgd", "adagrad")
DEFAULT = (
    "128-1-real-sgd",
    "128-1-uniform-sgd",
    "128-1-real-adagrad",
    "4096-1-real-sgd",
    "4096-1-zipf-adagrad",
    "16384-1-zipf-sgd",
    "64-2-real-sgd",
    "128-2-real-sgd",
    "4096-2-real-sgd",
    "4096-2-zipf-sgd",
    "4096-2-uniform-adagrad",
    "128-4-real-sgd",
    "1024-4-zipf-sgd",
)
"""The cases that run by default, in under ten minutes on two cores. 64 rows on each of 2 ranks are a batch of 128."""

_DISTINCT_BATCHES = 8
_DENSE_COLUMNS = 13
_MADE_SIZES = (12000, 9000, 8000, 6500, 5000, 4000, 3500, 3000, 2500, 2000, 1500, 1200, 1000, 800, 600, 500, 400)


@dataclass(frozen=True)
class Case:
    """One configuration of the benchmark; ``batch_size`` is that of a rank."""

    batch_size: int
    ranks: int
    ids: str
    optimizer: str

    @property
    def name(self) -> str:
        """The name by which ``--case`` selects it."""
        return f"{self.batch_size}-{self.ranks}-{self.ids}-{self.optimizer}"


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model, which all cases share.

    Attributes:
        data: a prepared data set for real ids; None makes batches that resemble a sample of Criteo-Kaggle.
        num_tables, num_embeddings: of uniform and Zipf ids.
        hidden_dim, embedding_dim: k and d.
        bottom_mlp, top_mlp: the hidden layers.
    """

    data: Path | None
    num_tables: int
    num_embeddings: int
    hidden_dim: int
    embedding_dim: int
    bottom_mlp: tuple[int, ...]
    top_mlp: tuple[int, ...]


def all_cases() -> list[Case]:
    """Return every case, which ``--list`` prints."""
    return [Case(*each) for each in product(BATCHES, RANKS, IDS, OPTIMIZERS)]


def spec_of(case: Case, sizes: Sizes, *, single_layer: bool) -> ModelSpec:
    """Return the model of a case, with multi-layer or single-layer tables."""
    model = ModelConfig(
        embedding_dim=sizes.embedding_dim,
        hidden_dim=None if single_layer else sizes.hidden_dim,
        bottom_mlp=sizes.bottom_mlp,
        top_mlp=sizes.top_mlp,
    )
    if case.ids == "real" and sizes.data is not None:
        schema = DatasetSchema.load(sizes.data)
        return ModelSpec(model, schema.dense, schema.sparse, seed=0)
    rows = [sizes.num_embeddings] * sizes.num_tables
    if case.ids == "real":
        rows = [*_MADE_SIZES, *([20] * sizes.num_tables)][: sizes.num_tables]
    tables = tuple(SparseFeature(f"C{index}", number) for index, number in enumerate(rows, start=1))
    return ModelSpec(model, tuple(f"I{index}" for index in range(1, _DENSE_COLUMNS + 1)), tables, seed=0)


def batches_of(case: Case, sizes: Sizes, rank: int) -> list[Batch]:
    """Return a few complete batches of a rank, in memory: the loader is no part of what is measured."""
    if case.ids == "real" and sizes.data is not None:
        return _read_batches(case, sizes.data, rank)
    generator = torch.Generator().manual_seed(rank)
    spec = spec_of(case, sizes, single_layer=True)
    return [_made_batch(case, spec, generator) for _ in range(_DISTINCT_BATCHES)]


def _read_batches(case: Case, data: Path, rank: int) -> list[Batch]:
    loader = DataLoader(
        data,
        "train",
        batch_size=case.batch_size * case.ranks,
        rank=rank,
        world_size=case.ranks,
        dense_features=None,
        sparse_features=None,
    )
    found: list[Batch] = []
    batches: Iterator[Batch] = iter(loader)
    for batch in batches:
        if batch.global_rows == case.batch_size * case.ranks:
            found.append(batch)
        if len(found) == _DISTINCT_BATCHES:
            break
    if not found:
        raise SystemExit(f"{data}: the train split has fewer than the {case.batch_size * case.ranks} rows of a batch")
    return found


def _made_batch(case: Case, spec: ModelSpec, generator: torch.Generator) -> Batch:
    size, features = case.batch_size, spec.sparse
    values = []
    for feature in features:
        if case.ids == "uniform":
            values.append(torch.randint(0, feature.num_embeddings, (size,), generator=generator))
        else:
            weights = torch.arange(1, feature.num_embeddings + 1, dtype=torch.float64).pow(-1.05)
            values.append(torch.multinomial(weights, size, replacement=True, generator=generator))
    sparse = KeyedJaggedTensor(
        [feature.name for feature in features],
        torch.cat(values),
        lengths=torch.ones(size * len(features), dtype=torch.int64),
        stride=size,
        length_per_key=[size] * len(features),
        offset_per_key=[size * index for index in range(len(features) + 1)],
    )
    dense = torch.rand(size, len(spec.dense), generator=generator)
    labels = torch.randint(0, 2, (size,), generator=generator).float()
    return Batch(dense, sparse, labels, size, size * case.ranks)
