"""The model of a run or an export, opened for a split of a data set and loaded by any number of ranks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torchrec.distributed import DistributedModelParallel

from mlet_dist.checkpoint.load import load_model, require_complete
from mlet_dist.data.location import DataPath
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError, print_warning
from mlet_dist.export.export_directory import ExportDirectory
from mlet_dist.export.outputs import open_output
from mlet_dist.export.serving.raw_inputs import carried_preprocessing, data_set_of, preprocessing_of
from mlet_dist.export.source import check_is_run, describe_unknown
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.stored_tables.open_tables import open_tables
from mlet_dist.training.process_group import COLLECTIVE_TIMEOUT, Worker, join_ranks
from mlet_dist.training.refitted_tables import RefittedTables
from mlet_dist.training.run_checkpoints import LAST, CheckpointChoice, RunCheckpoint, find_checkpoint, is_checkpoint
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.sharding import shard_model


@dataclass(frozen=True)
class EvaluatedModel:
    """A run or an export whose model takes the inputs of a data set.

    Attributes:
        target: as given by the user.
        spec: the model.
        warnings: about what could not be compared of the data set and that of the model.
    """

    target: Path
    spec: ModelSpec
    warnings: tuple[str, ...]
    _source: "RunCheckpoint | _Export"

    @classmethod
    def open(cls, target: Path, data: DataPath, split: str, choice: CheckpointChoice = LAST) -> "EvaluatedModel":
        """Find the model, as ``find`` does, and check that it takes the inputs of a data set that has the split.

        Raises:
            UserError: as ``find``, or the data set does not fit the model.
        """
        return cls.find(target, choice).checked_for(data, split)

    @classmethod
    def find(cls, target: Path, choice: CheckpointChoice = LAST) -> "EvaluatedModel":
        """Find the model.

        Args:
            target: directory of a run, of one of its checkpoints, or of an export.
            choice: the checkpoint of a run.

        Raises:
            UserError: ``target`` is none of these, or is damaged or lacks the checkpoint that is chosen.
        """
        export = ExportDirectory(target)
        source: RunCheckpoint | _Export
        if export.exists():
            spec, manifest = export.load()
            check_is_run(target, choice, "an export")
            source = _Export(export, manifest)
        elif RunDirectory(target).config.exists() or is_checkpoint(target):
            source = find_checkpoint(target, choice)
            spec = source.spec
        else:
            problem = describe_unknown(target, "neither a run nor an export")
            raise UserError(f"{target}: {problem}; expected the directory of a run or an export")
        return cls(target, spec, (), source)

    def checked_for(self, data: DataPath, split: str) -> "EvaluatedModel":
        """Return the model with warnings for a data set; raise UserError if it does not fit, or lacks the split."""
        schema = DatasetSchema.load(data)
        warning = self.spec.check_data(schema, data)
        schema.check_split(data, split)
        return replace(self, warnings=() if warning is None else (f"{self.target}: {warning}",))

    def preprocessing(self) -> LikeDataset:
        """Return what makes the inputs of the model from raw rows.

        Raises:
            UserError: the export carries nothing of the kind, or the data set of the run cannot be read or has changed.
        """
        if isinstance(self._source, _Export):
            return carried_preprocessing(self._source.directory, self._source.manifest, self.spec)
        return preprocessing_of(self.spec, data_set_of(self._source.config, self.target))

    @property
    def step(self) -> dict[str, int]:
        """The ``step`` of a run's checkpoint; empty for an export."""
        return {} if isinstance(self._source, _Export) else {"step": self._source.checkpoint.step}

    @contextmanager
    def on_ranks(
        self, device: str, batch_size: int, timeout: timedelta = COLLECTIVE_TIMEOUT
    ) -> Iterator[tuple[DistributedModelParallel, Worker]]:
        """Join the ranks, and yield the sharded model, loaded, and this rank. A collective call.

        Args:
            device: auto, cpu or cuda.
            batch_size: rows of a global batch.
            timeout: the time in which every rank must take part in a collective.

        Raises:
            UserError: a file is missing or damaged, on any rank, or the tables do not fit the memory.
        """
        with join_ranks(device, timeout) as worker:
            if worker.is_first:
                for each in self.warnings:
                    print_warning(each)
            spec, source = self.spec, self._source
            if isinstance(source, _Export):
                _check_files(source, worker)
            model, _ = shard_model(
                build_training_model(spec, tables_device=torch.device("meta")),
                worker,
                -(-batch_size // worker.world_size),
                pooling_factors=spec.pooling_factors,
                dense_columns=len(spec.dense),
            )
            if isinstance(source, _Export):
                source.load(model, spec)
            else:
                _load_checkpoint(model, source)
            yield model, worker


@dataclass(frozen=True)
class _Export:
    directory: ExportDirectory
    manifest: dict[str, Any]

    def load(self, model: DistributedModelParallel, spec: ModelSpec) -> None:
        """Load the float32 tables and the dense layers."""
        served, _ = self.directory.output("dcp", self.manifest)
        output: Mapping[str, Any] = self.manifest["outputs"]["dcp"]
        files = open_output(served, output["files"], output["format"])
        tables = RefittedTables(spec, open_tables(spec, files, "", spread=False), files)
        load_model(model, served, key=None, without=spec.table_prefixes)
        tables.load(model)


def _load_checkpoint(model: DistributedModelParallel, source: RunCheckpoint) -> None:
    checkpoint = require_complete(source.checkpoint).checkpoint
    tables = RefittedTables.of_rows_by_id(checkpoint, source.manifest)
    load_model(model, checkpoint.location, without=() if tables is None else source.spec.table_prefixes)
    if tables is not None:
        tables.load(model)


def _check_files(export: _Export, worker: Worker) -> None:
    """Verify the files of an export, each rank its share; damage that one rank finds is raised on all ranks."""
    own = None
    try:
        export.directory.check_files("dcp", export.manifest, share=slice(worker.rank, None, worker.world_size))
    except UserError as error:
        own = str(error)
    found: list[str | None] = [None] * worker.world_size
    dist.all_gather_object(found, own)
    damage = next(filter(None, found), None)
    if damage is not None:
        raise UserError(damage)
