"""`mlet evaluate`: metrics of a run or an export, on any number of ranks."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from mlet_dist.errors import print_warning
from mlet_dist.export.evaluated_model import EvaluatedModel
from mlet_dist.models.nested_widths import NestedWidths
from mlet_dist.training.evaluation import count_first_ids, evaluate, evaluation_loader
from mlet_dist.training.label_metrics import undefined_aucs
from mlet_dist.training.run_checkpoints import LAST, CheckpointChoice


def evaluate_path(
    target: Path,
    data: DataPath,
    split: str,
    batch_size: int = 8192,
    device: str = "auto",
    choice: CheckpointChoice = LAST,
) -> dict[str, Any]:
    """Return ``auc``, ``logloss``, ``rows`` and ``positive_rate`` of a run or an export on a split of a data set.

    A model that was trained at several widths has AUC and LogLoss of each smaller one, as ``logloss_dim4``.
    With several labels each of them has these and ``normalized_entropy``, as ``click_auc``; ``rows`` is that of all
    rows.
    ``out_of_vocabulary`` is each feature's share of the split's ids that are, for features that have any. ``step`` is
    that of the checkpoint of a run.

    Raises:
        UserError: as ``EvaluatedModel.open``, or all rows of the training split have the same label and ``split`` is
            ``train``.
    """
    opened = EvaluatedModel.open(target, data, split, choice)
    schema, spec = DatasetSchema.load(data), opened.spec
    counts: SplitCounts = of_features(schema.id_counts, [feature.name for feature in spec.sparse])
    warnings = check_classes(data, schema, [split])
    with opened.on_ranks(device, batch_size) as (model, worker):
        loader = evaluation_loader(data, split, spec, batch_size, worker)
        if spec.known_ids(schema):
            counts = {split: _as_known(counts.get(split, {}), count_first_ids(loader, worker))}
        warnings += out_of_vocabulary_warnings(data, counts, [split])
        if worker.is_first:
            for each in warnings:
                print_warning(each)
        found = evaluate(model, loader, worker, split, NestedWidths.of(spec, model))
        if worker.is_first:
            for each in undefined_aucs(found, spec.labels, f"{data}: {split}"):
                print_warning(each)
    shares = out_of_vocabulary_shares(counts, split)
    return {"target": str(target), **opened.step, "split": split, **found, "out_of_vocabulary": shares}


def _as_known(counts: Mapping[str, IdCounts], first_ids: Mapping[str, int]) -> dict[str, IdCounts]:
    """Return the counts of a split with the ids that are out of the model's vocabulary, which has grown since."""
    return {
        name: each if each.out_of_vocabulary is None else replace(each, out_of_vocabulary=first_ids[name])
        for name, each in counts.items()
    }
