"""The section `sharding` of a config: how tables are distributed over ranks."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlet_dist.config.parser import setting
from mlet_dist.config.table_settings import matching_entries

ShardingType = Literal["row_wise", "table_row_wise", "table_wise", "data_parallel"]
ComputeKernel = Literal["fused", "fused_uvm_caching", "fused_uvm"]
ExchangeChoice = Literal["auto", "after", "reduce_scatter", "unique_rows"]
CommPrecision = Literal["fp32", "fp16", "bf16"]
RowsDtype = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class TableShardingConfig:
    """Sharding of one table; null takes the setting of the same name for all tables."""

    sharding_types: tuple[ShardingType, ...] | None = setting(
        "sharding.sharding_types for this table.", None, min_length=1
    )
    compute_kernels: tuple[ComputeKernel, ...] | None = setting(
        "sharding.compute_kernels for this table.", None, min_length=1
    )
    cache_load_factor: float | None = setting("sharding.cache_load_factor for this table.", None, above=0, below=1)
    exchange: ExchangeChoice | None = setting("sharding.exchange for this table.", None)
    rows_dtype: RowsDtype | None = setting("sharding.rows_dtype for this table.", None)


@dataclass(frozen=True)
class ShardingConfig:
    """How tables are sharded over ranks and their vectors exchanged. `mlet plan` shows the result for any hardware."""

    sharding_types: tuple[ShardingType, ...] | None = setting(
        "List of TorchRec's sharding types that the planner may give to a table; it takes the fastest one that fits "
        "in memory. row_wise: rows spread over all ranks; table_row_wise: over the ranks of one node; table_wise: the "
        "whole table on one rank; data_parallel: a copy on every rank, with all-reduced gradients. null: all four.",
        None,
        min_length=1,
    )
    compute_kernels: tuple[ComputeKernel, ...] = setting(
        "List of the kernels that the planner may use, which decide where rows are stored. fused: in device memory; "
        "fused_uvm_caching (CUDA only): in host memory, with a cache on the device; fused_uvm (CUDA only): in host "
        "memory alone. Those after the first are used where device memory cannot hold the tables.",
        ("fused",),
        min_length=1,
    )
    cache_load_factor: float = setting(
        "Share of a table's rows that fused_uvm_caching can keep in its cache on the device; between 0 and 1.",
        0.2,
        above=0,
        below=1,
    )
    data_parallel_up_to_mb: float = setting(
        "Largest size of a table's W1, in MB (10^6 bytes), with which the planner may make the table data_parallel on "
        "several ranks. 0: only tables with too few rows for any other type.",
        16.0,
        at_least=0,
        at_most=1e6,
    )
    exchange: ExchangeChoice = setting(
        "Where W2 is applied, which decides what crosses the network. after: after the exchange, which sends vectors "
        "of k columns; reduce_scatter: before a reduce-scatter of pooled vectors of d columns; unique_rows: before an "
        "all-to-all of distinct rows of d columns; auto: for each table, the one that sends the fewest bytes; on a "
        "single rank, which sends none, unique_rows for large batches on a CPU, and otherwise after.",
        "auto",
    )
    forward_comm: CommPrecision = setting(
        "fp32, fp16 or bf16: the precision in which vectors cross the network, under every exchange. fp16 and bf16 "
        "halve the bytes; sums, W2 and all weights stay in fp32. On a single rank nothing is rounded.",
        "fp32",
    )
    backward_comm: CommPrecision = setting(
        "fp32, fp16 or bf16: the precision in which the gradients of vectors cross the network. fp16 has 3 bits more "
        "than bf16 and a narrow range: gradients are scaled by the rank's batch size for the transfer, and clamped.",
        "fp32",
    )
    rows_dtype: RowsDtype = setting(
        "fp32 or fp16: the precision in which ranks store W1 during training. fp16 halves W1, not the optimizer's "
        "state; exports are fp32. Updates of fp16 rows are rounded stochastically on CUDA, and to the nearest value "
        "on a CPU, where small updates are lost.",
        "fp32",
    )
    tables: dict[str, TableShardingConfig] = field(
        default_factory=dict,
        metadata={
            "meaning": "Settings of single tables, by name or pattern as in model.tables, that replace those of this "
            "section: sharding_types, compute_kernels, cache_load_factor, exchange and rows_dtype. Write {C3: "
            "{exchange: after}}, or sharding.tables.C3.exchange=after on the command line."
        },
    )

    def of_table(self, name: str) -> TableShardingConfig:
        """Return the settings of a table: its own, and those of all tables where it has none."""
        sections = *matching_entries(self.tables, name), self
        keys = [each.name for each in dataclasses.fields(TableShardingConfig)]
        given = {key: [getattr(each, key) for each in sections if getattr(each, key) is not None] for key in keys}
        return TableShardingConfig(**{key: values[0] for key, values in given.items() if values})

    def rows_dtypes(self, tables: Sequence[str]) -> dict[str, RowsDtype]:
        """Return the dtype in which the rows of each table are stored."""
        return {name: self.of_table(name).rows_dtype or self.rows_dtype for name in tables}
