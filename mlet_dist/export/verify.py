"""The proof that an export serves what was trained: the same rows through both models, logit by logit."""

import math
from pathlib import Path
from typing import Any

import torch

from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.export.manifest import ExportDirectory
from mlet_dist.models.dlrm import build_dlrm, build_plain_dlrm
from mlet_dist.progress import Progress
from mlet_dist.training.checkpoint.choosing import newest_checkpoint
from mlet_dist.training.checkpoint.loading import load_model
from mlet_dist.training.distributed import Worker
from mlet_dist.training.evaluation import evaluation_loader, predict
from mlet_dist.training.metrics import BinaryMetrics
from mlet_dist.training.run_directory import RunDirectory

_ALONE = Worker(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))


def verify_export(export: Path, run: Path, data: Path, split: str = "test", tolerance: float = 1e-5) -> dict[str, Any]:
    """Compare the factorised model of a run with the plain TorchRec model of its export, on every row of a split.

    One process, on the CPU, both models unsharded.

    Returns:
        ``ok`` (no logit differs by more than ``tolerance``), ``max_abs_logit_diff``, ``worst_row`` (its number in the
        split), ``rows``, ``auc_run``, ``auc_export``, ``logloss_run``, ``logloss_export``.

    Raises:
        UserError: a directory is not what it should be, the two do not belong together, or a checksum is wrong.
    """
    config, trained, _ = RunDirectory(run).load()
    served, manifest = ExportDirectory(export).load()
    if (served.dense, served.sparse) != (trained.dense, trained.sparse):
        raise UserError(f"{export}: its inputs or table sizes are not those of {run}; it was exported from another run")
    schema = DatasetSchema.load(data)
    trained.check_data(schema, data)

    factorised = build_dlrm(trained, tables_device=torch.device("cpu"))
    load_model(factorised, newest_checkpoint(RunDirectory(run).checkpoint_store(config)).location)
    plain = build_plain_dlrm(served)
    _check_names(plain, manifest, export)
    ExportDirectory(export).check_files("dcp", manifest)
    load_model(plain, ExportDirectory(export).model, key=None)

    batch_size = config.data.eval_batch_size
    pairs = zip(
        predict(factorised, evaluation_loader(data, split, trained, batch_size, _ALONE), _ALONE),
        predict(plain, evaluation_loader(data, split, trained, batch_size, _ALONE), _ALONE),
        strict=True,
    )
    of_run, of_export = BinaryMetrics(_ALONE.device), BinaryMetrics(_ALONE.device)
    worst, worst_row, rows = -1.0, -1, 0
    with Progress("verify", schema.rows[split], "rows") as progress:
        for (logits_run, labels), (logits_export, _) in pairs:
            # NaN counts as infinitely far, so that a broken table cannot pass.
            difference = (logits_run.double() - logits_export.double()).abs().nan_to_num(nan=math.inf)
            largest, index = difference.max(dim=0)
            if float(largest) > worst:
                worst, worst_row = float(largest), rows + int(index)
            rows += len(labels)
            of_run.update(logits_run, labels)
            of_export.update(logits_export, labels)
            progress.update(len(labels))
    found_run, found_export = of_run.compute(), of_export.compute()
    return {
        "ok": worst <= tolerance,
        "max_abs_logit_diff": worst,
        "tolerance": tolerance,
        "worst_row": worst_row,
        "rows": rows,
        "auc_run": found_run["auc"],
        "auc_export": found_export["auc"],
        "logloss_run": found_run["logloss"],
        "logloss_export": found_export["logloss"],
    }


def _check_names(model: torch.nn.Module, manifest: dict[str, Any], export: Path) -> None:
    try:
        named = {entry["state_name"] for entry in [*manifest["tables"], *manifest["dense"]]}
    except (KeyError, TypeError) as error:
        raise UserError(f"{export}: broken manifest: {error!r}; export again") from None
    if named != set(model.state_dict()):
        name = min(named ^ set(model.state_dict()))
        raise UserError(f"{export}: the manifest and the model disagree about {name!r}; export again")
