"""Open the tables of a run's checkpoint, an export or the output of `mlet factorize`, to read ranges of rows."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch

from mlet_dist.checkpoint.load import MODEL_KEY, latest_finished
from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors, DcpFiles
from mlet_dist.embeddings.row_order import is_spread
from mlet_dist.errors import UserError
from mlet_dist.export.export_directory import ExportDirectory
from mlet_dist.export.outputs import open_output
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from mlet_dist.stored_tables.open_tables import open_factors, open_tables
from mlet_dist.stored_tables.table_source import TableSource
from mlet_dist.training.run_checkpoints import LAST, CheckpointChoice, find_checkpoint, is_checkpoint
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.urls import no_such_directory

_IN_CHECKPOINTS = f"{MODEL_KEY}."


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
    def open(cls, path: Path, choice: CheckpointChoice = LAST) -> "Tables":
        """Open a checkpoint of a run, an export or factors.

        Raises:
            UserError: ``path`` is none of these, or it is incomplete or damaged, or a tensor is missing or has another
                shape than in the model; or a checkpoint is chosen, and ``path`` is no run.
        """
        if ExportDirectory(path).exists():
            check_is_run(path, choice, "an export")
            return _open_export(path)
        run = RunDirectory(path)
        if run.config.exists() or run.marker.exists() or is_checkpoint(path):
            return ModelSource.of_run(path, choice)
        check_is_run(path, choice, "no run")
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
    def open(cls, path: Path, choice: CheckpointChoice = LAST) -> "ModelSource":
        """Open a checkpoint of a run, or factors with the dense layers of their model.

        Raises:
            UserError: ``path`` is neither, or as for ``Tables.open``.
        """
        if ExportDirectory(path).exists():
            raise UserError(f"{path}: is an export already; name the run that it was made from")
        if not path.is_dir():
            raise UserError(f"{path}: {no_such_directory(path)}; expected a run or the output of `mlet factorize`")
        found = Tables.open(path, choice)
        if not isinstance(found, ModelSource):
            raise UserError(
                f"{path}: holds only tables and no dense layers; train a model from them with "
                f"train.initial_weights={path}, and export that run"
            )
        return found

    @classmethod
    def of_run(cls, run: Path, choice: CheckpointChoice = LAST) -> "ModelSource":
        """Open a checkpoint of a run, as ``find_checkpoint`` finds it; checksums are verified as the files are read.

        Raises:
            UserError: there is no such checkpoint, or a tensor is missing or has another shape than in the model.
        """
        found = find_checkpoint(run, choice)
        return cls.of_checkpoint(run, found.checkpoint, found.manifest, found.spec, found.config, found.summary)

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
            tables=open_tables(spec, files, _IN_CHECKPOINTS, spread=is_spread(manifest.about)),
            dense=_dense_of(files, _IN_CHECKPOINTS, spec.table_prefixes),
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
    return kinds if path.exists() else no_such_directory(path)


def check_is_run(path: Path, choice: CheckpointChoice, kind: str) -> None:
    """Raise UserError if a checkpoint is chosen of what is no run, but of this ``kind``."""
    if choice:
        option = "--best" if choice.best else "--step"
        raise UserError(f"{path}: is {kind}; {option} chooses a checkpoint of a run")


def _open_export(path: Path) -> Tables:
    """Open the tables of an export's first float32 output."""
    directory = ExportDirectory(path)
    spec, manifest = directory.load()
    name = next((each for each in ("dcp", "safetensors") if each in manifest["outputs"]), "dcp")
    where, entries = directory.output(name, manifest)
    files = open_output(where, entries, manifest["outputs"][name]["format"])
    return Tables(
        path,
        open_tables(spec, files, "", spread=False),
        _dense_of(files, "", spec.table_prefixes),
        spec,
        manifest["config"],
        files,
    )


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
    tables = open_factors(manifest.about, files, _IN_CHECKPOINTS)
    dense = _dense_of(files, _IN_CHECKPOINTS, (TABLES_PREFIX,))
    return Tables(path, tables, dense, None, {}, files)


def _dense_of(files: ChunkedTensors, prefix: str, table_prefixes: tuple[str, ...]) -> dict[str, str]:
    """Return the tensors that belong neither to a table nor to an optimizer: state name -> name in ``files``."""
    names = {name.removeprefix(prefix): name for name in files.tensors if name.startswith(prefix)}
    return {name: stored for name, stored in names.items() if not name.startswith(table_prefixes)}
