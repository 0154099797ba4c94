"""Where tables are read by blocks of rows: a run's newest checkpoint, an export, or what `mlet factorize` made."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from mlet_dist.checkpoint.load import MODEL_KEY, newest_finished
from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors, TensorFiles
from mlet_dist.embeddings.collection import check_layers_fit
from mlet_dist.errors import UserError
from mlet_dist.export.export_directory import ExportDirectory
from mlet_dist.export.outputs import open_output
from mlet_dist.models.dlrm import TABLES_PREFIX
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.run_directory import RunDirectory

_IN_CHECKPOINTS = f"{MODEL_KEY}."


@dataclass(frozen=True)
class TableSource:
    """One table: W (n, d), as it is stored or as the product of W1 (n, k) and W2 (k, d).

    Attributes:
        name: of the table.
        state_name: of W in a plain model's state dict, and of W1 in the trained one's.
        num_embeddings, hidden_dim, embedding_dim: n, k and d; k is None for a single layer.
        projection: W2, float32; None for a single layer.
        rows_dtype: of W1, or of W where there is a single layer.
        stored_name: of the same in the files.
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
        self.read_into(start, rows)
        return rows

    def read_into(self, start: int, rows: torch.Tensor) -> None:
        """Fill ``rows``, contiguous, with those from ``start`` on, as ``read_stored`` gives them."""
        self._files.read_rows(self.stored_name, start, rows)

    def through(self, files: ChunkedTensors) -> "TableSource":
        """The same table, read through other files."""
        return replace(self, _files=files)


@dataclass(frozen=True)
class Tables:
    """Tables, and what is known of the model around them, open for reading; closed as a context manager.

    Attributes:
        path: as the user gave it.
        tables: by name.
        dense: all else in the model: state name -> name in ``files``.
        spec: of the model with these tables; None where the tables came from elsewhere.
        config: the run's, plain values; empty where there was none.
        files: what is read; not for several threads at once.
    """

    path: Path
    tables: Mapping[str, TableSource]
    dense: Mapping[str, str]
    spec: ModelSpec | None
    config: Mapping[str, Any]
    files: ChunkedTensors

    @classmethod
    def open(cls, path: Path) -> "Tables":
        """What lies at ``path``: a run, an export or factors.

        Raises:
            UserError: none of them is there, it is not whole, or a tensor is missing or of another shape than its
                model's.
        """
        if ExportDirectory(path).is_there():
            return _of_export(path)
        run = RunDirectory(path)
        if run.config.exists() or run.marker.exists():
            return Source.of_run(path)
        return _of_factors(path)

    def load_dense(self, name: str) -> torch.Tensor:
        """One of ``dense``."""
        return self.files.load(self.dense[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


@dataclass(frozen=True)
class Source(Tables):
    """All of a trained model: what can be exported.

    Attributes:
        checkpoint: the name of the checkpoint that is read.
        digest: SHA-256 of what identifies all that is in it.
        summary: the run's, plain values; empty where there was none.
    """

    spec: ModelSpec
    files: TensorFiles
    checkpoint: str
    digest: str
    summary: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> "Source":
        """What lies at ``path``: a run, or factors that came with their model.

        Raises:
            UserError: neither is there, or as ``Tables.open``.
        """
        if ExportDirectory(path).is_there():
            raise UserError(f"{path}: an export already; name the run that it is of")
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; expected what `mlet train` or `mlet factorize` made")
        found = Tables.open(path)
        if not isinstance(found, Source):
            raise UserError(
                f"{path}: holds tables alone, and no model; train one from them with train.initial_weights={path}, and "
                "take that run"
            )
        return found

    @classmethod
    def of_run(cls, run: Path) -> "Source":
        """The newest checkpoint of a finished run; what is read of it is checked as it is read.

        Raises:
            UserError: the run never finished, or a tensor is missing or of another shape than its model's.
        """
        directory = RunDirectory(run)
        config, spec, summary = directory.load()
        checkpoint, manifest = newest_finished(directory.checkpoint_store(config))
        return cls.of_checkpoint(run, checkpoint, manifest, spec, config.to_dict(), summary)

    @classmethod
    def of_checkpoint(
        cls,
        path: Path,
        checkpoint: Checkpoint,
        manifest: Manifest,
        spec: ModelSpec,
        config: Mapping[str, Any],
        summary: Mapping[str, Any],
    ) -> "Source":
        """A checkpoint of the model ``spec``."""
        files = TensorFiles(checkpoint.location, checkpoint.open, manifest.files)
        return cls(
            path=path,
            tables=_tables_of(spec, files, _IN_CHECKPOINTS),
            dense=_dense_of(files, _IN_CHECKPOINTS),
            spec=spec,
            config=config,
            files=files,
            checkpoint=checkpoint.name,
            digest=hashlib.sha256(manifest.render()).hexdigest(),
            summary=summary,
        )

    def check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise UserError unless one of ``dense`` has this name and this shape."""
        if name not in self.dense:
            raise UserError(f"{self.files.location}: holds no tensor {name!r}, which the model has")
        found = self.files.tensors[self.dense[name]].shape
        if found != shape:
            raise UserError(f"{self.files.location}: {name!r} is {found} there and {shape} in the model")


def _of_export(path: Path) -> Tables:
    """The plain tables of an export, from the first of its outputs that holds them in float32."""
    directory = ExportDirectory(path)
    spec, manifest = directory.load()
    name = next((each for each in ("dcp", "safetensors") if each in manifest["outputs"]), "dcp")
    where, entries = directory.output(name, manifest)
    files = open_output(where, entries, manifest["outputs"][name]["format"])
    return Tables(path, _tables_of(spec, files, ""), _dense_of(files, ""), spec, manifest["config"], files)


def _of_factors(path: Path) -> Tables:
    """What `mlet factorize` made; what is read of it is checked as it is read."""
    store = CheckpointStore(path)
    if not store.checkpoints():
        missing = "no such directory" if not path.exists() else "neither a run, an export nor factors"
        raise UserError(f"{path}: {missing}; expected what `mlet train`, `mlet export` or `mlet factorize` made")
    checkpoint, manifest = newest_finished(store)
    if "factorized" not in manifest.about:
        raise UserError(f"{checkpoint}: a checkpoint, but not one of `mlet factorize`; name its run's directory")
    spec = manifest.about["spec"]
    if spec is not None:
        model = ModelSpec.from_dict(spec, str(checkpoint))
        found = Source.of_checkpoint(path, checkpoint, manifest, model, {}, {})
        return found if found.dense else Tables(path, found.tables, {}, model, {}, found.files)
    files = TensorFiles(checkpoint.location, checkpoint.open, manifest.files)
    tables = {
        each["name"]: _table(each["name"], each["shape"], each["hidden_dim"], files, _IN_CHECKPOINTS)
        for each in manifest.about["factorized"]["tables"]
    }
    return Tables(path, tables, _dense_of(files, _IN_CHECKPOINTS), None, {}, files)


def _tables_of(spec: ModelSpec, files: ChunkedTensors, prefix: str) -> dict[str, TableSource]:
    k, d = spec.model.hidden_dim, spec.model.embedding_dim
    return {each.name: _table(each.name, (each.num_embeddings, d), k, files, prefix) for each in spec.sparse}


def _dense_of(files: ChunkedTensors, prefix: str) -> dict[str, str]:
    """What is neither a table nor of an optimizer, by state name."""
    names = {name.removeprefix(prefix): name for name in files.tensors if name.startswith(prefix)}
    return {name: stored for name, stored in names.items() if not name.startswith(TABLES_PREFIX)}


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
        name, state_name, num_embeddings, hidden_dim, embedding_dim, projection, found.dtype, stored_name, files
    )
