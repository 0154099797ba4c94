"""`mlet predict`: the scores of a run or an export for every row of a split, or of raw files, as a Parquet file."""

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from mlet_dist.data.location import DataPath, data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.export.evaluated_model import EvaluatedModel
from mlet_dist.export.raw_data import SPLIT, is_raw, prepared_rows
from mlet_dist.export.scores_writer import written_scores
from mlet_dist.models.spec import ModelSpec
from mlet_dist.progress import Progress
from mlet_dist.training.evaluation import evaluation_loader, predict
from mlet_dist.training.process_group import Worker
from mlet_dist.training.run_checkpoints import LAST, CheckpointChoice

_RAW_TIMEOUT = timedelta(hours=6)  # ranks wait until rank 0 has prepared raw files


def predict_path(
    target: Path,
    data: str,
    split: str | None,
    out: Path,
    batch_size: int = 8192,
    device: str = "auto",
    choice: CheckpointChoice = LAST,
) -> dict[str, Any]:
    """Write the scores of a run or an export for all rows of a split, in the order of the data set, or of raw files.

    The file has the columns ``row`` (int64, from 0), ``label`` (but for raw files without one), ``logit``,
    ``probability`` and, for a data set whose rows have weights, ``weight`` (float32). Batches are written as they are
    computed; the file appears under its name when it is complete. With several labels there are ``label``, ``logit``
    and ``probability`` of each, as ``click_label``, which is null where a row lacks the label.

    Args:
        target: directory of a run, of one of its checkpoints, or of an export.
        data: path or URL of a data set; or of raw files, which may be a directory or a pattern.
        split: of a data set, by default test; None for raw files.
        out: the file.
        batch_size: rows of a global batch.
        device: auto, cpu or cuda.
        choice: the checkpoint of a run.

    Returns:
        ``target``, ``step`` of a run's checkpoint, ``split`` of a data set, ``out`` and ``rows``.

    Raises:
        UserError: as ``EvaluatedModel.open`` and ``prepared_rows``, the file exists, or it cannot be written.
    """
    if out.exists():
        raise UserError(f"{out}: exists; name another file, or remove it")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out}: {out.absolute().parent} is no directory; create it first")
    if not is_raw(data):
        place, split = data_set_path(data), split or SPLIT
        opened = EvaluatedModel.open(target, place, split, choice)
        with opened.on_ranks(device, batch_size) as (model, worker):
            rows = _predict_split(model, worker, opened.spec, place, split, out, batch_size)
        return {"target": str(target), **opened.step, "split": split, "out": str(out), "rows": rows}
    if split is not None:
        raise UserError(f"{data}: is no data set, and --split names a split of one; leave out --split for raw files")
    opened = EvaluatedModel.find(target, choice)
    with (
        opened.on_ranks(device, batch_size, _RAW_TIMEOUT) as (model, worker),
        prepared_rows(data, opened.preprocessing, out.absolute(), worker) as raw,
    ):
        rows = _predict_split(model, worker, opened.spec, raw.path, SPLIT, out, batch_size, raw.is_labelled)
    return {"target": str(target), **opened.step, "out": str(out), "rows": rows}


def _predict_split(
    model: nn.Module,
    worker: Worker,
    spec: ModelSpec,
    data: DataPath,
    split: str,
    out: Path,
    batch_size: int,
    is_labelled: bool = True,
) -> int:
    """Write the scores of a split, and return its number of rows. A collective call."""
    loader = evaluation_loader(data, split, spec, batch_size, worker)
    rows = DatasetSchema.load(data).rows[split]
    with Progress("predict", rows, "rows", disable=not worker.is_first) as progress:
        batches = _gathered(predict(model, loader, worker), loader.local_batch_size, worker)
        if worker.is_first:
            number = len(spec.labels)
            with written_scores(out, spec.labels) as writer:
                for batch in batches:
                    labels = batch[number : 2 * number].t() if is_labelled else None
                    writer.add(batch[:number].t(), labels, batch[-1] if len(batch) > 2 * number else None)
                    progress.update(batch.shape[1])
        else:
            for _ in batches:
                pass
    return rows


def _gathered(
    predicted: Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]], local_rows: int, worker: Worker
) -> Iterator[torch.Tensor]:
    """Yield logits, labels and weights of global batches on rank 0, and nothing elsewhere.

    They are ``(2 L, rows)`` float32, or ``(2 L + 1, rows)`` with weights. A rank's rows follow those of the rank before
    it. A collective call of all ranks for each batch.
    """
    for parts in predicted:
        own = torch.cat([part.reshape(len(part), -1).t() for part in parts if part is not None])
        padded = own.new_full((len(own), local_rows), torch.nan)
        padded[:, : own.shape[1]] = own
        count = torch.tensor([own.shape[1]], device=own.device)
        found = [torch.empty_like(padded) for _ in range(worker.world_size)] if worker.is_first else None
        counts = [torch.empty_like(count) for _ in range(worker.world_size)] if worker.is_first else None
        dist.gather(padded, found)
        dist.gather(count, counts)
        if found is not None and counts is not None:
            yield torch.cat([each[:, : int(rows)] for each, rows in zip(found, counts, strict=True)], dim=1).cpu()
