"""Open the tables of a run's latest checkpoint, an export or the output of `mlet factorize`, to read ranges of rows."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from mlet_dist.checkpoint.load import MODEL_KEY, latest_finished
from mlet_dist.checkpoint.manifest import MANIFEST, Manifest
from mlet_dist.checkpoint.store import INCOMPLETE, Checkpoint, CheckpointStore
from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors, DcpFiles
from mlet_dist.embeddings.collection import check_layers_fit
from mlet_dist.embeddings.table_config import RowRange
from mlet_dist.errors import UserError
from mlet_dist.export.export_directory import ExportDirectory
from mlet_dist.export.outputs import open_output
from mlet_dist.models.dlrm import TABLES_PREFIX, build_dlrm
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.urls import no_such_directory

_IN_CHECKPOINTS = f"{MODEL_KEY}."


@dataclass(frozen=True)
class TableSource:
    """One table on disk: W (n, d) of a single layer, or W1 (n, k) and W2 (k, d).

    Attributes:
        name: of the table.
        state_name: name of W in the state dict of the served model, and of W1 in that of the trained model.
        num_embeddings, hidden_dim, embedding_dim: n, k and d; k is None for a single layer.
        projection: W2, float32; None for a single layer.
        rows_dtype: of W1, or of W for a single layer.
        stored_name: name of W1, or of W for a single layer, in the files.
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
        """Path or URL of the files, for messages."""
        return str(self._files.location)

    @property
    def stored_bytes(self) -> int:
        """Bytes of W1 and W2, or of W for a single layer, as stored."""
        projection = 0 if self.projection is None else self.projection.numel() * self.projection.element_size()
        return self.num_embeddings * self.row_bytes + projection

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of W1, or of W for a single layer, as stored."""
        return (self.hidden_dim or self.embedding_dim) * self.rows_dtype.itemsize

    def read_stored(self, start: int, stop: int) -> torch.Tensor:
        """Read rows ``[start, stop)`` of W1, or of W for a single layer: ``(stop - start, k or d)`` as stored.

        Raises:
            UserError: a file is missing or damaged.
        """
        rows = torch.empty(stop - start, self.hidden_dim or self.embedding_dim, dtype=self.rows_dtype)
        self.read_into(start, rows)
        return rows

    def read_into(self, start: int, rows: torch.Tensor) -> None:
        """Fill ``rows``, contiguous, with the rows from ``start`` on that ``read_stored`` would return."""
        self._files.read_rows(self.stored_name, start, rows)

    def with_files(self, files: ChunkedTensors) -> Self:
        """Return a copy that reads from other open files."""
        return replace(self, _files=files)


@dataclass(frozen=True)
class RangedTableSource(TableSource):
    """A table with row ranges, read as one of W1 ``(n, k)`` and W2 ``(k, d)`` with k the sum of the ranges' widths.

    The rows of a range have values in its own columns of W1 alone, and the W2 of the ranges lie below one another; that
    of a range of width d is the identity. The product is that of the ranges.

    Attributes:
        ranges: of the table.
        pools: for each range the name of its pool in the files, and its first row there; None if it is not stored.
    """

    ranges: tuple[RowRange, ...]
    pools: tuple[tuple[str, int] | None, ...]

    @property
    def stored_bytes(self) -> int:
        """Bytes of the ranges' rows and of their W2, as stored."""
        rows = sum(each.rows * each.width * self.rows_dtype.itemsize for each in self.ranges)
        projected = sum(each.width for each in self.ranges if each.width != self.embedding_dim)
        return rows + 4 * projected * self.embedding_dim

    def read_into(self, start: int, rows: torch.Tensor) -> None:
        """Fill ``rows`` with the rows from ``start`` on."""
        rows.zero_()
        first, column = 0, 0
        for each, pool in zip(self.ranges, self.pools, strict=True):
            begin, end = max(start, first), min(start + rows.shape[0], first + each.rows)
            if pool is not None and begin < end:
                name, offset = pool
                of_range = torch.empty(end - begin, each.width, dtype=self.rows_dtype)
                self._files.read_rows(name, offset + begin - first, of_range)
                rows[begin - start : end - start, column : column + each.width] = of_range
            first += each.rows
            column += each.width


@dataclass(frozen=True)
class Tables:
    """Tables open for reading, with what is known of their model. As a context manager, it closes the files.

    Attributes:
        path: as given by the user.
        tables: by name.
        dense: the model's other tensors: state name -> name in ``files``.
        spec: of the model with these tables; None if the tables come from another program.
        config: the run's settings as plain values; empty if there is no run.
        files: the open files; not thread-safe.
    """

    path: Path
    tables: Mapping[str, TableSource]
    dense: Mapping[str, str]
    spec: ModelSpec | None
    config: Mapping[str, Any]
    files: ChunkedTensors

    @classmethod
    def open(cls, path: Path) -> "Tables":
        """Open a run, an export or factors.

        Raises:
            UserError: ``path`` is none of these, or it is incomplete or damaged, or a tensor is missing or has another
                shape than in the model.
        """
        if ExportDirectory(path).exists():
            return _open_export(path)
        run = RunDirectory(path)
        if run.config.exists() or run.marker.exists():
            return ModelSource.of_run(path)
        return _open_factors(path)

    def load_dense(self, name: str) -> torch.Tensor:
        """Load one tensor of ``dense`` by its state name."""
        return self.files.load(self.dense[name])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.files.close()


@dataclass(frozen=True)
class ModelSource(Tables):
    """A complete trained model, which can be exported.

    Attributes:
        checkpoint: the name of the checkpoint that is read.
        digest: SHA-256 of the checkpoint's manifest, which contains the checksums of all its files.
        summary: the run's results as plain values; empty if there is no run.
    """

    spec: ModelSpec
    files: DcpFiles
    checkpoint: str
    digest: str
    summary: Mapping[str, Any]

    @classmethod
    def open(cls, path: Path) -> "ModelSource":
        """Open a run, or factors with the dense layers of their model.

        Raises:
            UserError: ``path`` is neither, or as for ``Tables.open``.
        """
        if ExportDirectory(path).exists():
            raise UserError(f"{path}: is an export already; name the run that it was made from")
        if not path.is_dir():
            raise UserError(f"{path}: {no_such_directory(path)}; expected a run or the output of `mlet factorize`")
        found = Tables.open(path)
        if not isinstance(found, ModelSource):
            raise UserError(
                f"{path}: holds only tables and no dense layers; train a model from them with "
                f"train.initial_weights={path}, and export that run"
            )
        return found

    @classmethod
    def of_run(cls, run: Path) -> "ModelSource":
        """Open the latest checkpoint of a finished run; checksums are verified as the files are read.

        Raises:
            UserError: the run never finished, or a tensor is missing or has another shape than in the model.
        """
        directory = RunDirectory(run)
        config, spec, summary = directory.load()
        checkpoint, manifest = latest_finished(directory.checkpoint_store(config))
        directory.check_own(checkpoint, manifest.about)
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
    ) -> "ModelSource":
        """Open a checkpoint of the model ``spec``."""
        files = DcpFiles(checkpoint.location, checkpoint.open, manifest.files)
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
            raise UserError(f"{self.files.location}: {name!r} is {found} in the checkpoint and {shape} in the model")


def describe_unknown(path: Path, kinds: str) -> str:
    """Return why a path is none of the ``kinds`` that a command takes, in words for a message."""
    if not path.exists():
        return no_such_directory(path)
    if (path / MANIFEST).exists() or (path / INCOMPLETE).exists():
        return (
            "one checkpoint of a run; only a whole run can be named here, whose latest checkpoint is taken (a run with "
            "train.resume set to this one continues from it)"
        )
    return kinds


def _open_export(path: Path) -> Tables:
    """Open the tables of an export's first float32 output."""
    directory = ExportDirectory(path)
    spec, manifest = directory.load()
    name = next((each for each in ("dcp", "safetensors") if each in manifest["outputs"]), "dcp")
    where, entries = directory.output(name, manifest)
    files = open_output(where, entries, manifest["outputs"][name]["format"])
    return Tables(path, _tables_of(spec, files, ""), _dense_of(files, ""), spec, manifest["config"], files)


def _open_factors(path: Path) -> Tables:
    """Open the output of `mlet factorize`; checksums are verified as the files are read."""
    store = CheckpointStore(path)
    if not store.checkpoints():
        problem = describe_unknown(path, "neither a run, an export nor factors")
        raise UserError(f"{path}: {problem}; expected the output of `mlet train`, `mlet export` or `mlet factorize`")
    checkpoint, manifest = latest_finished(store)
    if "factorized" not in manifest.about:
        raise UserError(f"{checkpoint}: is a checkpoint, but not of `mlet factorize`; name the directory of its run")
    spec = manifest.about["spec"]
    if spec is not None:
        model = ModelSpec.from_dict(spec, str(checkpoint))
        found = ModelSource.of_checkpoint(path, checkpoint, manifest, model, {}, {})
        return found if found.dense else Tables(path, found.tables, {}, model, {}, found.files)
    files = DcpFiles(checkpoint.location, checkpoint.open, manifest.files)
    tables = {
        each["name"]: _table(each["name"], each["shape"], each["hidden_dim"], files, _IN_CHECKPOINTS)
        for each in manifest.about["factorized"]["tables"]
    }
    return Tables(path, tables, _dense_of(files, _IN_CHECKPOINTS), None, {}, files)


def _tables_of(spec: ModelSpec, files: ChunkedTensors, prefix: str) -> dict[str, TableSource]:
    k, d = spec.model.hidden_dim, spec.model.embedding_dim
    pools = _pools_of(spec) if spec.row_ranges else {}
    return {
        each.name: _ranged_table(each.name, spec, pools, files, prefix)
        if each.name in spec.row_ranges
        else _table(each.name, (each.num_embeddings, d), k, files, prefix)
        for each in spec.tables
    }


def _pools_of(spec: ModelSpec) -> dict[str, tuple[str, tuple[int, int], int]]:
    """Return the pool of each segment: its state name, its shape, and the first row of the segment."""
    meta = torch.device("meta")
    stored = build_dlrm(spec, meta, dense_device=meta).sparse_arch.embedding_bag_collection.row_tables()
    return {
        segment.name: (
            f"{TABLES_PREFIX}embedding_bags.{table.name}.weight",
            (table.num_embeddings, table.row_width),
            segment.offset,
        )
        for table in stored
        for segment in table.segments
    }


def _ranged_table(
    name: str,
    spec: ModelSpec,
    pools: Mapping[str, tuple[str, tuple[int, int], int]],
    files: ChunkedTensors,
    prefix: str,
) -> TableSource:
    """Return a table with row ranges after checking the shapes of its pools and of every W2."""
    ranges, d = tuple(RowRange(*each) for each in spec.row_ranges[name]), spec.model.embedding_dim
    where: list[tuple[str, int] | None] = []
    projections, dtype = [], torch.float32
    for index, each in enumerate(ranges):
        if not each.width:
            where.append(None)
            continue
        state_name, shape, offset = pools[f"{name}:{index}"]
        pool = files.tensors.get(f"{prefix}{state_name}")
        if pool is None or pool.shape != shape:
            found = "missing" if pool is None else f"{pool.shape}"
            raise UserError(f"{files.location}: {state_name!r} is {found} in the files and {shape} in the model")
        where.append((f"{prefix}{state_name}", offset))
        dtype = pool.dtype
        if each.width == d:
            projections.append(torch.eye(d))
            continue
        projection = files.load(f"{prefix}{TABLES_PREFIX}projections.{name}:{index}.weight").float()
        if projection.shape != (each.width, d):
            raise UserError(
                f"{files.location}: the W2 of rows of {each.width} columns of table {name!r} is "
                f"{tuple(projection.shape)}, it must be {(each.width, d)}"
            )
        projections.append(projection)
    state_name = f"{TABLES_PREFIX}embedding_bags.{name}.weight"
    rows, width = sum(each.rows for each in ranges), sum(each.width for each in ranges)
    return RangedTableSource(
        name, state_name, rows, width, d, torch.cat(projections), dtype, "", files, ranges, tuple(where)
    )


def _dense_of(files: ChunkedTensors, prefix: str) -> dict[str, str]:
    """Return the tensors that belong neither to a table nor to an optimizer: state name -> name in ``files``."""
    names = {name.removeprefix(prefix): name for name in files.tensors if name.startswith(prefix)}
    return {name: stored for name, stored in names.items() if not name.startswith(TABLES_PREFIX)}


def _table(name: str, shape: Sequence[int], hidden_dim: int | None, files: ChunkedTensors, prefix: str) -> TableSource:
    """Return table ``name`` of ``files`` after checking that its W has ``shape`` (n, d)."""
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
        raise UserError(f"{files.location}: {state_name!r} is {found.shape} in the files and {expected} in the model")
    return TableSource(
        name, state_name, num_embeddings, hidden_dim, embedding_dim, projection, found.dtype, stored_name, files
    )
