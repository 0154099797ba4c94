"""Where the export job reads: the tables of a run's newest checkpoint, or of an export, by blocks of rows."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mlet_dist.embeddings.multi_layer import check_layers_fit
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import TABLES_PREFIX
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.checkpoint.choosing import newest_finished
from mlet_dist.training.checkpoint.loading import MODEL_KEY
from mlet_dist.training.checkpoint.tensor_files import TensorFiles
from mlet_dist.training.run_directory import RunDirectory


@dataclass(frozen=True)
class TableSource:
    """One table: W (n, d), as it is stored or as the product of W1 (n, k) and W2 (k, d).

    Attributes:
        name: of the table.
        state_name: of W in a plain model's state dict, and of W1 in the trained one's.
        num_embeddings, hidden_dim, embedding_dim: n, k and d; k is None for a single layer.
        projection: W2, float32; None for a single layer.
        rows_dtype: of W1, or of W where there is a single layer.
    """

    name: str
    state_name: str
    num_embeddings: int
    hidden_dim: int | None
    embedding_dim: int
    projection: torch.Tensor | None
    rows_dtype: torch.dtype
    _files: TensorFiles
    _stored_name: str

    @property
    def stored_bytes(self) -> int:
        """Of W1 and W2, or of W, as they are stored."""
        projection = 0 if self.projection is None else self.projection.numel() * self.projection.element_size()
        return self.num_embeddings * self.row_bytes + projection

    @property
    def row_bytes(self) -> int:
        """Of one row of W1, or of W."""
        return (self.hidden_dim or self.embedding_dim) * self.rows_dtype.itemsize

    def read_stored(self, start: int, stop: int) -> torch.Tensor:
        """Rows of W1, or of W where there is a single layer, ``(stop - start, k or d)`` as they are stored.

        Raises:
            UserError: a file is missing or damaged.
        """
        rows = torch.empty(stop - start, self.hidden_dim or self.embedding_dim, dtype=self.rows_dtype)
        self.read_into(start, rows)
        return rows

    def read_into(self, start: int, rows: torch.Tensor) -> None:
        """Fill ``rows``, contiguous, with those from ``start`` on, as ``read_stored`` gives them."""
        self._files.read_rows(self._stored_name, start, rows)

    def through(self, files: TensorFiles) -> "TableSource":
        """The same table, read through other files."""
        return replace(self, _files=files)


@dataclass(frozen=True)
class Source:
    """A run or an export, open for reading.

    Attributes:
        path: as the user gave it.
        checkpoint: the name of the run's checkpoint.
        digest: SHA-256 of what identifies all that is in it.
        spec: of the model as it was trained.
        config, summary: the run's, plain values.
        tables: by name.
        dense: state names of all else in the model.
        files: what is read; not for several threads at once.
    """

    path: Path
    checkpoint: str
    digest: str
    spec: ModelSpec
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    tables: Mapping[str, TableSource]
    dense: tuple[str, ...]
    files: TensorFiles

    @classmethod
    def of_run(cls, run: Path) -> "Source":
        """The newest checkpoint of a finished run; what is read of it is checked as it is read.

        Raises:
            UserError: the run never finished, or a tensor is missing or of another shape than its model's.
        """
        directory = RunDirectory(run)
        config, spec, summary = directory.load()
        checkpoint, manifest = newest_finished(directory.checkpoint_store(config))
        files = TensorFiles(checkpoint.location, checkpoint.open, manifest.files)
        prefix = f"{MODEL_KEY}."
        names = [name.removeprefix(prefix) for name in files.tensors if name.startswith(prefix)]
        return cls(
            path=run,
            checkpoint=checkpoint.name,
            digest=hashlib.sha256(manifest.render()).hexdigest(),
            spec=spec,
            config=config.to_dict(),
            summary=summary,
            tables={each.name: _table(spec, each.name, each.num_embeddings, files) for each in spec.sparse},
            dense=tuple(name for name in names if not name.startswith(TABLES_PREFIX)),
            files=files,
        )

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UserError unless one of ``dense`` has this name and this shape."""
        if name not in self.dense:
            raise UserError(f"{self.files.location}: holds no tensor {name!r}, which the model has")
        found = self.files.tensors[f"{MODEL_KEY}.{name}"].shape
        if found != shape:
            raise UserError(f"{self.files.location}: {name!r} is {found} there and {shape} in the model")

    def load_dense(self, name: str) -> torch.Tensor:
        """One of ``dense``."""
        return self.files.load(f"{MODEL_KEY}.{name}")


def _table(spec: ModelSpec, name: str, num_embeddings: int, files: TensorFiles) -> TableSource:
    state_name = f"{TABLES_PREFIX}embedding_bags.{name}.weight"
    stored_name = f"{MODEL_KEY}.{state_name}"
    hidden_dim, embedding_dim = spec.model.hidden_dim, spec.model.embedding_dim
    projection = None
    if stored_name not in files.tensors:
        raise UserError(f"{files.location}: holds no tensor {state_name!r}, which the model has")
    found = files.tensors[stored_name]
    if hidden_dim is not None:
        projection = files.load(f"{MODEL_KEY}.{TABLES_PREFIX}projections.{name}.weight").float()
        try:
            check_layers_fit(name, torch.Size(found.shape), projection.size())
        except ValueError as error:
            raise UserError(f"{files.location}: {error}") from None
    expected = (num_embeddings, hidden_dim or embedding_dim)
    if found.shape != expected or (projection is not None and projection.shape[1] != embedding_dim):
        raise UserError(f"{files.location}: {state_name!r} is {found.shape} there and {expected} in the model")
    return TableSource(
        name, state_name, num_embeddings, hidden_dim, embedding_dim, projection, found.dtype, files, stored_name
    )
