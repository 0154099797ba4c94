"""`mlet evaluate`: metrics of a run or an export, on any number of ranks."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist.checkpoint.load import latest_checkpoint, load_model
from mlet_dist.data.id_counts import (
    IdCounts,
    SplitCounts,
    of_features,
    out_of_vocabulary_shares,
    out_of_vocabulary_warnings,
)
from mlet_dist.data.label_classes import check_classes
from mlet_dist.data.location import DataPath
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError, print_warning
from mlet_dist.export.export_directory import ExportDirectory
from mlet_dist.export.outputs import open_output
from mlet_dist.export.source import describe_unknown
from mlet_dist.models.dlrm import TABLES_PREFIX, build_dlrm
from mlet_dist.stored_tables.open_tables import open_tables
from mlet_dist.training.evaluation import count_first_ids, evaluate, evaluation_loader, undefined_auc
from mlet_dist.training.process_group import Worker, join_ranks
from mlet_dist.training.refitted_tables import RefittedTables
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.sharding import shard_model


def evaluate_path(
    target: Path, data: DataPath, split: str, batch_size: int = 8192, device: str = "auto"
) -> dict[str, Any]:
    """Return ``auc``, ``logloss``, ``rows`` and ``positive_rate`` of a run or an export on a split of a data set.

    ``out_of_vocabulary`` is each feature's share of the split's ids that are, for features that have any.

    Raises:
        UserError: ``target`` is neither a run nor an export, or is damaged, or the data set does not fit the model, or
            all rows of the training split have the same label and ``split`` is ``train``.
    """
    export, run = ExportDirectory(target), RunDirectory(target)
    if export.exists():
        spec, manifest = export.load()
        served, _ = export.output("dcp", manifest)
        store = None
    elif run.config.exists():
        config, spec, _ = run.load()
        store = run.checkpoint_store(config)
    else:
        problem = describe_unknown(target, "neither a run nor an export")
        raise UserError(f"{target}: {problem}; expected the directory of a run or an export")
    schema = DatasetSchema.load(data)
    warning = spec.check_data(schema, data)
    schema.check_split(data, split)
    counts: SplitCounts = of_features(schema.id_counts, [feature.name for feature in spec.sparse])
    warnings = check_classes(data, schema, [split])
    with join_ranks(device) as worker:
        loader = evaluation_loader(data, split, spec, batch_size, worker)
        if spec.known_ids(schema):
            counts = {split: _as_known(counts.get(split, {}), count_first_ids(loader, worker))}
        warnings += out_of_vocabulary_warnings(data, counts, [split])
        if worker.is_first:
            for each in [*([f"{target}: {warning}"] if warning is not None else []), *warnings]:
                print_warning(each)
        if store is None:
            _check_files(export, manifest, worker)
        local_batch_size = -(-batch_size // worker.world_size)
        model, _ = shard_model(
            build_dlrm(spec, tables_device=torch.device("meta")),
            worker,
            local_batch_size,
            pooling_factors=spec.pooling_factors,
        )
        tables: RefittedTables | None
        if store is None:
            files = open_output(served, manifest["outputs"]["dcp"]["files"], manifest["outputs"]["dcp"]["format"])
            tables = RefittedTables(spec, open_tables(spec, files, "", spread=False), files)
            load_model(model, served, key=None, without=TABLES_PREFIX)
        else:
            checkpoint = latest_checkpoint(store)
            stored = checkpoint.manifest()
            run.check_own(checkpoint, stored.about)
            tables = RefittedTables.of_rows_by_id(checkpoint, stored)
            load_model(model, checkpoint.location, without=None if tables is None else TABLES_PREFIX)
        if tables is not None:
            tables.load(model)
        found = evaluate(model, loader, worker, split)
        undefined = undefined_auc(found, f"{data}: {split}")
        if undefined is not None and worker.is_first:
            print_warning(undefined)
    shares = out_of_vocabulary_shares(counts, split)
    return {"target": str(target), "split": split, **found, "out_of_vocabulary": shares}


def _as_known(counts: Mapping[str, IdCounts], first_ids: Mapping[str, int]) -> dict[str, IdCounts]:
    """Return the counts of a split with the ids that are out of the model's vocabulary, which has grown since."""
    return {
        name: each if each.out_of_vocabulary is None else replace(each, out_of_vocabulary=first_ids[name])
        for name, each in counts.items()
    }


def _check_files(export: ExportDirectory, manifest: dict[str, Any], worker: Worker) -> None:
    """Verify the files of an export, each rank its share; damage that one rank finds is raised on all ranks."""
    own = None
    try:
        export.check_files("dcp", manifest, share=slice(worker.rank, None, worker.world_size))
    except UserError as error:
        own = str(error)
    found: list[str | None] = [None] * worker.world_size
    dist.all_gather_object(found, own)
    damage = next(filter(None, found), None)
    if damage is not None:
        raise UserError(damage)
