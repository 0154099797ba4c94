"""The ``compression`` section of a config, applied to the model of a data set."""

import dataclasses
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist.config.config_file import Config
from mlet_dist.data.location import data_set_path
from mlet_dist.data.row_counts import count_ids
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.embeddings.planning.cost_model import Optimizer
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import TABLES_PREFIX
from mlet_dist.models.row_widths import Sizes, describe_ranges, static_ranges
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.state import Training


def training_bytes(training: Training, device: torch.device) -> int:
    """Return the bytes of all tables: rows, W2 and their optimizer state, summed over ranks. A collective call.

    What is replicated on all ranks is counted once.
    """
    state = training.model.state_dict()
    tensors = [tensor for name, tensor in state.items() if name.startswith(TABLES_PREFIX)]
    for name, own in training.optimizer.state_dict()["state"].items():
        if name.startswith(TABLES_PREFIX):
            tensors += [each for key, each in own.items() if key.rpartition(".")[2] != "step"]
    total = 0
    for tensor in tensors:
        if hasattr(tensor, "local_shards"):
            total += sum(shard.tensor.nbytes for shard in tensor.local_shards())
        elif dist.get_rank() == 0:
            total += tensor.nbytes
    found = torch.tensor(total, device=device)
    dist.all_reduce(found)
    return int(found)


def compression_summary(spec: ModelSpec, optimizer: Optimizer, size: int) -> dict[str, Any]:
    """Return what the summary of a run says about the size of its tables.

    Args:
        spec: the model.
        optimizer: the optimizer of the rows.
        size: the ``training_bytes``.
    """
    d = spec.model.embedding_dim
    row = Sizes(d, optimizer).row(d)
    summary: dict[str, Any] = {
        "training_bytes_peak": size,
        "single_layer_training_bytes": sum(table.num_embeddings * row for table in spec.tables),
    }
    if spec.row_ranges:
        summary["kept_share"] = {
            name: sum(rows for rows, width, _ in ranges if width) / sum(rows for rows, _, _ in ranges)
            for name, ranges in spec.row_ranges.items()
        }
    return summary


def with_row_ranges(spec: ModelSpec, config: Config) -> tuple[ModelSpec, list[str]]:
    """Return the spec with the row ranges that ``compression`` gives its tables, and lines that describe them.

    Raises:
        UserError: the budget is too small, ids are not sorted by frequency, or the data set cannot be read.
    """
    if config.compression.policy == "none":
        return spec, []
    data = data_set_path(config.data.path)
    schema, features = DatasetSchema.load(data), [feature.name for feature in spec.sparse]
    counts = {table.name: count_ids(data, schema, table.name, features) for table in spec.tables}
    for feature in spec.sparse:
        made = spec.preprocessing.sparse.get(feature.name, {}) if spec.preprocessing else {}
        if made.get("encoding") == "hash":
            raise UserError(
                f"compression.policy is {config.compression.policy}, but the ids of feature {feature.name!r} are "
                "hashes, which are not sorted by frequency; use `encoding: vocabulary` for it, or policy none"
            )
    compression = config.compression
    adaptive = compression.policy == "adaptive"
    sizes = Sizes(spec.model.embedding_dim, config.optimizer.name, BYTES_PER_ROW if adaptive else 0)
    ranges = static_ranges(counts, compression, spec.model, sizes, SMALLEST_NUMBER_OF_ROWS if adaptive else 1)
    size = sum(sizes.table(each) for each in ranges.values())
    single = sum(table.num_embeddings * sizes.row(sizes.embedding_dim) for table in spec.tables)
    lines = [
        f"compression  {size:,} bytes in training, {size / single:.1%} of those of single-layer tables (budget "
        f"{config.compression.budget:.1%})",
        f"compression  {describe_ranges(ranges, counts)}",
    ]
    moves: dict[str, Any] = {}
    if adaptive:
        warmup = compression.interval if compression.warmup is None else compression.warmup
        moves = dataclasses.asdict(
            AdaptiveRows(
                compression.interval, warmup, compression.decay, compression.hysteresis, compression.on_move
            )
        )
    plain = {name: tuple((each.rows, each.width, each.share) for each in of) for name, of in ranges.items()}
    return dataclasses.replace(spec, row_ranges=plain, adaptive=moves), lines
