"""The ``compression`` section of a config, applied to the model of a data set."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist.checkpoint.writer import on_first_rank
from mlet_dist.config.compression_section import CompressionConfig
from mlet_dist.config.config_file import Config
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.data.location import data_set_path
from mlet_dist.data.row_counts import count_ids
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.embeddings.planning.cost_model import Optimizer
from mlet_dist.errors import UserError
from mlet_dist.models.row_widths import (
    Counts,
    Sizes,
    budget_bytes,
    largest_bytes,
    permitted_widths,
    shares_rows,
    static_ranges,
)
from mlet_dist.models.spec import ModelSpec
from mlet_dist.models.tables import table_prefixes
from mlet_dist.models.width_shares import describe_shares, total_lookups, width_shares
from mlet_dist.training.fused_optimizers import optimizer_state
from mlet_dist.training.state import Training


def training_bytes(training: Training, device: torch.device) -> int:
    """Return the bytes of all tables: rows, W2 and their optimizer state, summed over ranks. A collective call.

    What is replicated on all ranks is counted once.
    """
    state, prefixes = training.model.state_dict(), table_prefixes(training.model)
    tensors = [tensor for name, tensor in state.items() if name.startswith(prefixes)]
    for name, own in optimizer_state(training.optimizer).items():
        if name.startswith(prefixes):
            tensors += [each for key, each in own.items() if key != "step"]
    total = 0
    for tensor in tensors:
        if hasattr(tensor, "local_shards"):
            total += sum(shard.tensor.nbytes for shard in tensor.local_shards())
        elif dist.get_rank() == 0:
            total += tensor.nbytes
    found = torch.tensor(total, device=device)
    dist.all_reduce(found)
    return int(found)


def compression_summary(spec: ModelSpec, optimizer: Optimizer, size: int, kept: Mapping[str, float]) -> dict[str, Any]:
    """Return what the summary of a run says about the size of its tables.

    Args:
        spec: the model.
        optimizer: the optimizer of the rows.
        size: the ``training_bytes``.
        kept: of adaptive tables, the share of rows with columns.
    """
    sizes = Sizes(spec.model.embedding_dim, optimizer, own_dims=spec.embedding_dims)
    summary: dict[str, Any] = {
        "training_bytes_peak": size,
        "single_layer_training_bytes": sizes.single({table.name: table.num_embeddings for table in spec.tables}),
    }
    if spec.row_ranges:
        summary["kept_share"] = {
            name: sum(rows for rows, width, _ in ranges if width) / sum(rows for rows, _, _ in ranges)
            for name, ranges in spec.row_ranges.items()
        } | dict(kept)
    return summary


def lookup_counts(spec: ModelSpec, config: Config) -> dict[str, Counts]:
    """Return the lookups of each row by table, as the data set gives them; none without compression.

    Raises:
        UserError: ids of a table that may get several widths are not sorted by frequency, or the data set cannot be
            read.
    """
    if config.compression.policy == "none":
        return {}
    settings = {table.name: table.settings for table in spec.tables}
    for feature in spec.sparse:
        made = spec.preprocessing.sparse.get(feature.name, {}) if spec.preprocessing else {}
        name = feature.table_name
        if made.get("encoding") == "hash" and len(permitted_widths(name, config.compression, settings[name])) > 1:
            policy = config.compression.policy
            limits = f"one width for the whole table (compression.tables.{name}.min_width and max_width), "
            raise UserError(
                f"compression.policy is {policy}, but the ids of feature {feature.name!r} are hashes, which are not "
                f"sorted by frequency; use `encoding: vocabulary` for it, {limits if policy == 'static' else ''}"
                "or policy none"
            )
    data = data_set_path(config.data.path)
    schema, features = DatasetSchema.load(data), [feature.name for feature in spec.sparse]
    return {table.name: count_ids(data, schema, table.name, features) for table in spec.tables}


def with_row_ranges(
    spec: ModelSpec, config: Config, counts: Mapping[str, Counts] | None = None
) -> tuple[ModelSpec, list[str]]:
    """Return the spec with the row ranges that ``compression`` gives its tables, and lines that describe them.

    Args:
        spec: the model.
        config: the settings.
        counts: the ``lookup_counts``; None reads them.

    Raises:
        UserError: as for ``lookup_counts``, or the budget is too small.
    """
    if config.compression.policy == "none":
        return spec, []
    counts = lookup_counts(spec, config) if counts is None else counts
    compression = config.compression
    sizes = Sizes.of(spec.model, config.optimizer.name, compression, spec.embedding_dims)
    settings = {table.name: table.settings for table in spec.tables}
    ranges = static_ranges(counts, compression, settings, sizes)
    rows = {table.name: table.num_embeddings for table in spec.tables}
    size, single = sizes.trained(ranges), sizes.single(rows)
    budget, largest = budget_bytes(compression, single), largest_bytes(rows, compression, settings, sizes)
    lines = [
        f"compression  {size:,} bytes in training, {size / single:.1%} of those of single-layer tables (budget "
        f"{budget:,} bytes, {budget / single:.1%})",
        f"compression  {describe_shares(width_shares(ranges, total_lookups(counts)))}",
    ]
    if slots := sizes.bytes_per_row * sum(rows.values()):
        lines.append(f"compression  {slots:,} bytes of them are slots and utilities of all rows")
    most = {name: each.embedding_dim for name, each in settings.items()}
    if any(each.row_width > each.embedding_dim for each in settings.values()) and all(
        each.width <= most[name] for name, of_table in ranges.items() for each in of_table
    ):
        d = " or ".join(map(str, sorted(set(most.values()))))
        lines.append(f"compression  no row has more than {d} columns: with this budget it is a single-layer model")
    if largest <= budget:
        unit = "" if isinstance(compression.budget, str) else "; a budget without a unit is a share"
        lines.append(
            f"compression  nothing is compressed: with the largest width for all rows, tables take {largest:,} bytes, "
            f"which the budget allows{unit}"
        )
    plain = {name: tuple((each.rows, each.width, each.share) for each in of) for name, of in ranges.items()}
    return dataclasses.replace(
        spec, row_ranges=plain, adaptive=_moves(compression, spec.model), shared_rows=shares_rows(compression)
    ), lines


def compression_warnings(spec: ModelSpec, steps: int) -> list[str]:
    """Return a warning if rows of adaptive tables do not move in a run of this many steps."""
    if not spec.adaptive or spec.adaptive["warmup"] < steps:
        return []
    return [
        f"no row changes its width: the run has {steps:,} steps, and compression.warmup, by default that of "
        f"compression.interval, is {spec.adaptive['warmup']:,}"
    ]


def _moves(compression: CompressionConfig, model: ModelConfig) -> dict[str, Any]:
    """Return when and how rows move, the fields of AdaptiveRows; empty if they do not."""
    if compression.policy != "adaptive":
        return {}
    warmup = compression.interval if compression.warmup is None else compression.warmup
    return {
        "interval": compression.interval,
        "warmup": warmup,
        "decay": compression.decay,
        "hysteresis": compression.hysteresis,
        "on_move": compression.on_move,
        "chunk_width": None if compression.nested else model.of_all_tables.row_width // compression.chunks,
    }


def shared_row_ranges(spec: ModelSpec, config: Config) -> tuple[ModelSpec, list[str]]:
    """Return what ``with_row_ranges`` returns on rank 0, which alone reads the counts. A collective call.

    Raises:
        UserError: as for ``with_row_ranges``, on every rank.
    """
    if config.compression.policy == "none":
        return spec, []
    found: list[Any] = [None]

    def read() -> None:
        made, lines = with_row_ranges(spec, config)
        found[0] = {name: getattr(made, name) for name in ("row_ranges", "adaptive", "shared_rows")}, lines

    on_first_rank(read, f"{config.data.path}: the counts of ids cannot be read", None)
    dist.broadcast_object_list(found, src=0)
    fields, lines = found[0]
    return dataclasses.replace(spec, **fields), lines
