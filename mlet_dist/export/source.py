"""Where tables are read by blocks of rows: a run's newest checkpoint, an export, or what `mlet factorize` made."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mlet_dist.embeddings.multi_layer import check_layers_fit
from mlet_dist.errors import UserError
from mlet_dist.export.manifest import ExportDirectory
from mlet_dist.models.dlrm import TABLES_PREFIX
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.checkpoint.choosing import newest_finished
from mlet_dist.training.checkpoint.chunked import ChunkedTensors
from mlet_dist.training.checkpoint.loading import MODEL_KEY
from mlet_dist.training.checkpoint.store import CheckpointStore
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
    _files: ChunkedTensors
    stored_name: str

    @property
    def location(self) -> str:
        """Of the files, as messages call it."""
        return str(self._files.location)

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
        self._files.read_rows(self.stored_name, start, rows)
        return rows


@dataclass(frozen=True)
class Source:
    """Tables, and what is known of the model around them, open for reading; closed as a context manager.

    Attributes:
        path: as the user gave it.
        checkpoint: the name of the directory that is read.
        spec: of the model as it was trained; None for factors of tables that came from elsewhere.
        config, summary: the run's, plain values; empty where there was none.
        tables: by name.
        dense: state names of all else in the model.
        files: what is read; not for several threads at once.
        prefix: of the state names in ``files``.
    """

    path: Path
    checkpoint: str
    spec: ModelSpec | None
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    tables: Mapping[str, TableSource]
    dense: tuple[str, ...]
    files: ChunkedTensors
    prefix: str

    @classmethod
    def open(cls, path: Path) -> "Source":
        """What lies at ``path``, whichever of the three it is.

        Raises:
            UserError: none of them is there, or as ``of_run``, ``of_export`` and ``of_factors``.
        """
        if ExportDirectory(path).manifest.exists():
            return cls.of_export(path)
        if RunDirectory(path).config.exists():
            return cls.of_run(path)
        if any(not each.is_being_written for each in CheckpointStore(path).checkpoints()):
            return cls.of_factors(path)
        missing = "no such directory" if not path.exists() else "neither a run, an export nor factors"
        raise UserError(f"{path}: {missing}; expected what `mlet train`, `mlet export` or `mlet factorize` made")

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
        return cls._of(run, checkpoint.name, spec, config.to_dict(), summary, files, f"{MODEL_KEY}.")

    @classmethod
    def of_factors(cls, path: Path) -> "Source":
        """What `mlet factorize` made; what is read of it is checked as it is read.

        Raises:
            UserError: it is not whole, or of something else.
        """
        checkpoint, manifest = newest_finished(CheckpointStore(path))
        if "factorized" not in manifest.about:
            raise UserError(f"{checkpoint}: a checkpoint, but not one of `mlet factorize`; name its run's directory")
        spec = manifest.about["spec"]
        files = TensorFiles(checkpoint.location, checkpoint.open, manifest.files)
        if spec is not None:
            spec = ModelSpec.from_dict(spec, str(checkpoint))
            return cls._of(path, checkpoint.name, spec, {}, {}, files, f"{MODEL_KEY}.")
        tables = {
            each["name"]: _table(each["name"], each["shape"], each["hidden_dim"], files, f"{MODEL_KEY}.")
            for each in manifest.about["factorized"]["tables"]
        }
        dense = _dense_names(files, f"{MODEL_KEY}.")
        return cls(path, checkpoint.name, None, {}, {}, tables, dense, files, f"{MODEL_KEY}.")

    @classmethod
    def of_export(cls, path: Path) -> "Source":
        """The plain tables of an export.

        Raises:
            UserError: it is no export, or a tensor is missing or of another shape than its model's.
        """
        directory = ExportDirectory(path)
        spec, manifest = directory.load()
        model = directory.model
        files = TensorFiles(model, lambda name: (model / name).open("rb"))
        run = manifest["run"]
        return cls._of(path, model.name, spec, manifest["config"], run, files, "")

    def model(self) -> ModelSpec:
        """The model around the tables.

        Raises:
            UserError: there is none, or its dense layers are missing: these are tables alone.
        """
        if self.spec is None or not self.dense:
            raise UserError(
                f"{self.path}: holds tables alone, and no model; train one from them with "
                f"train.initial_weights={self.path}, and take that run"
            )
        return self.spec

    def load_dense(self, name: str) -> torch.Tensor:
        """One of ``dense``."""
        return self.files.load(f"{self.prefix}{name}")

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()

    @classmethod
    def _of(
        cls,
        path: Path,
        checkpoint: str,
        spec: ModelSpec,
        config: Mapping[str, Any],
        summary: Mapping[str, Any],
        files: ChunkedTensors,
        prefix: str,
    ) -> "Source":
        k, d = spec.model.hidden_dim, spec.model.embedding_dim
        tables = {each.name: _table(each.name, (each.num_embeddings, d), k, files, prefix) for each in spec.sparse}
        return cls(path, checkpoint, spec, config, summary, tables, _dense_names(files, prefix), files, prefix)


def _dense_names(files: ChunkedTensors, prefix: str) -> tuple[str, ...]:
    names = [name.removeprefix(prefix) for name in files.tensors if name.startswith(prefix)]
    return tuple(name for name in names if not name.startswith(TABLES_PREFIX))


def _table(name: str, shape: Sequence[int], hidden_dim: int | None, files: ChunkedTensors, prefix: str) -> TableSource:
    """Table ``name`` of ``files``, whose W must be of ``shape``, (n, d)."""
    state_name = f"{TABLES_PREFIX}embedding_bags.{name}.weight"
    stored_name = f"{prefix}{state_name}"
    num_embeddings, embedding_dim = shape
    projection = None
    if stored_name not in files.tensors:
        raise UserError(f"{files.location}: holds no tensor {state_name!r}, which the model has")
    found = files.tensors[stored_name]
    if hidden_dim is not None:
        projection = files.load(f"{prefix}{TABLES_PREFIX}projections.{name}.weight").float()
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
