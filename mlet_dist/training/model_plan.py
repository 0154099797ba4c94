"""A model's sharding plan, with the cost of each table and the reasons for its sharding type."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import QuantizedCommCodecs, ShardingPlan

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.planning.cost_model import Device
from mlet_dist.embeddings.planning.dense_cost import DenseCost
from mlet_dist.embeddings.planning.explanation import sharding_reasons
from mlet_dist.embeddings.planning.plan_cost import (
    Ranks,
    group_identical_ranks,
    memory_of_rank,
    optimizer_of,
    shortage,
    table_costs,
)
from mlet_dist.embeddings.planning.planner import device_of, multi_layer_planner, requester_memory
from mlet_dist.embeddings.planning.search_space import Constraints, most_even_constraints, table_constraints
from mlet_dist.embeddings.planning.table_cost import UVM, UVM_CACHING, TableCost
from mlet_dist.embeddings.sharded.collectives import codecs_of
from mlet_dist.embeddings.sharded.exchange_choice import COMM_OPS
from mlet_dist.embeddings.sharded.placement import REPLICATED_BYTES
from mlet_dist.errors import UserError
from mlet_dist.models.build import multi_layer_tables, row_tables
from mlet_dist.models.network_cost import dense_cost, sequence_length

_UNLIMITED = 1 << 60
_DENSE = EmbeddingComputeKernel.DENSE.value


@dataclass(frozen=True)
class ModelPlan:
    """TorchRec's plan, adjusted to what will run, and its cost.

    Attributes:
        plan: the plan for DistributedModelParallel.
        sharder: the sharder that the plan was made with.
        tables: each table's cost, and its number of rows on each rank.
        dense: the cost of the dense layers.
        reasons: why each table has its sharding type.
    """

    plan: ShardingPlan
    sharder: MultiLayerEmbeddingBagCollectionSharder
    tables: dict[str, tuple[TableCost, list[int]]]
    dense: DenseCost
    reasons: dict[str, str]

    def entries(self) -> list[dict[str, Any]]:
        """Return a record per table; ``rows_per_rank`` lists [first rank, last rank, rows] of ranks with rows."""
        return [
            {
                "table": name,
                "sharding_type": cost.sharding_type,
                "compute_kernel": cost.kernel,
                "exchange": cost.exchange,
                "reason": self.reasons[name],
                "exchange_reason": None if cost.exchange is None else self.sharder.chosen[name][1],
                "rows_per_rank": _runs(rows),
            }
            for name, (cost, rows) in self.tables.items()
        ]


class DoesNotFit(UserError):
    """No plan fits; ``planned`` is the one that distributes the tables most evenly."""

    def __init__(self, message: str, planned: ModelPlan) -> None:
        super().__init__(message)
        self.planned = planned


def plan_model(
    model: nn.Module,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    topology: Topology,
    device: Device | None = None,
    constraints: Constraints | None = None,
    replicated_bytes: float = REPLICATED_BYTES,
    dense_columns: int | None = None,
    copies: int = 1,
) -> ModelPlan:
    """Plan with TorchRec's planner and the estimates of ``embeddings.planning``, without a process group.

    Args:
        model: a model with tables on the meta device and a fused optimizer on its rows.
        sharder: the sharder to plan for.
        topology: ranks, and their memory.
        device: the hardware of a rank; by default that of the topology.
        constraints: TorchRec's constraints by table, which override ``table_constraints``.
        replicated_bytes: the largest W1, in bytes, that may be data_parallel.
        dense_columns: as in ``dense_cost``.
        copies: how many times the network gets each row.

    Raises:
        DoesNotFit: no plan fits; the message names the table and the missing bytes.
        UserError: the constraints cannot be met, or only by a plan that cannot run.
    """
    collections, configs = multi_layer_tables(model), row_tables(model)
    ranks, device = Ranks.of(topology), device or device_of(topology)
    requested = constraints or {}
    first = next(iter(collections.values()))
    dense = dense_cost(
        model,
        dense_columns,
        copies * sharder.local_batch_size,
        optimizer_of(first.row_weight(first.row_tables()[0].name)),
        ranks.world_size,
        ranks.local_world_size,
        sequence_length(configs, {table.name: sharder.traffic(table).pooling_factor for table in configs}),
        on_cpu=ranks.on_cpu,
    )
    try:
        limited = table_constraints(configs, ranks, sharder, constraints, replicated_bytes)
    except ValueError as error:
        raise UserError(f"sharding: {error}") from None

    def settled(topology: Topology, constraints: Constraints, dense_bytes: float) -> ModelPlan:
        planner = multi_layer_planner(
            configs,
            topology,
            sharder,
            dense_bytes=dense_bytes,
            device=device,
            constraints=constraints,
            replicated_bytes=replicated_bytes,
        )
        with _without_false_warnings():
            plan = planner.plan(model, [sharder, sharder.of_sequences()])
        costs: dict[str, tuple[TableCost, list[int]]] = {}
        for path, tables in collections.items():
            try:
                sharder.finalize_plan(tables, plan.plan[path], ranks.world_size, on_cpu=ranks.on_cpu)
            except ValueError as error:
                raise UserError(str(error)) from None
            costs |= table_costs(tables, plan.plan[path], sharder, ranks)
        reasons: dict[str, str] = {}
        for tables in collections.values():
            reasons |= sharding_reasons(tables, costs, requested, limited, sharder, ranks, device)
        return ModelPlan(plan, sharder, costs, dense, reasons)

    try:
        # The buffers of owned rows are not known yet. They only reduce what the activations add, so this suffices.
        gradients = sum(requester_memory(tables, sharder, ranks).gradients for tables in collections.values())
        reserved = dense.memory(gradients)
        return settled(topology, limited, reserved.total)
    except PlannerError:
        unlimited = Topology(
            ranks.world_size,
            topology.compute_device,
            hbm_cap=_UNLIMITED,
            ddr_cap=_UNLIMITED,
            local_world_size=topology.local_world_size,
        )
        found = settled(unlimited, {name: most_even_constraints(each) for name, each in limited.items()}, 0)
    if fits(found, device):
        return found
    missing = shortage(found.tables, dense, device.memory, device.host_memory)
    where = "one rank" if ranks.world_size == 1 else f"{ranks.world_size:,} ranks"
    raise DoesNotFit(f"the tables do not fit {where} on {topology.compute_device}: {missing}", found)


def fits(planned: ModelPlan, device: Device) -> bool:
    """Return whether the plan fits the memory of every rank's device and host."""
    memories = [
        memory_of_rank(planned.tables, planned.dense, ranks[0]) for ranks in group_identical_ranks(planned.tables)
    ]
    return all(each.total <= device.usable_memory and each.host <= device.usable_host_memory for each in memories)


def describe_plan(planned: ModelPlan) -> list[str]:
    """Return a line for each sharding type, exchange and kernel in use, with the reasons for its largest table."""
    entries = {each["table"]: each for each in planned.entries()}
    groups: dict[str, list[str]] = {}
    for name, entry in entries.items():
        kernel = entry["compute_kernel"] if entry["compute_kernel"] in (UVM, UVM_CACHING) else None
        group = ", ".join(filter(None, (entry["sharding_type"], entry["exchange"], kernel)))
        groups.setdefault(group, []).append(name)
    lines = [_describe_group(group, names, planned, entries) for group, names in groups.items()]
    codecs = planned.sharder.qcomm_codecs_registry
    if codecs and planned.sharder.chosen:
        lines.append(_describe_codecs(codecs_of(codecs, COMM_OPS["unique_rows"])))
    if {entry["compute_kernel"] for entry in entries.values()} == {_DENSE} and planned.sharder.chosen:
        lines.append("all rows have dense gradients: fbgemm has a fused kernel for this optimizer only on CUDA")
    if planned.dense.note is not None:
        lines.append(planned.dense.note)
    return lines


@contextmanager
def _without_false_warnings() -> Iterator[None]:
    """Suppress TorchRec's warning that a data_parallel table has no sharding spec; such tables have none."""
    logging.getLogger().addFilter(_is_wanted)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Sharding spec not found")


def _describe_group(
    group: str, names: Sequence[str], planned: ModelPlan, entries: Mapping[str, Mapping[str, Any]]
) -> str:
    sizes = {name: planned.tables[name][0].traffic.num_embeddings for name in names}
    largest = max(names, key=lambda name: sizes[name])
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    reasons = [entries[largest]["reason"], entries[largest]["exchange_reason"]]
    reason = "; ".join(dict.fromkeys(filter(None, reasons)))
    return f"{group}: {largest} ({sizes[largest]:,} rows){others}; {reason}"


def _describe_codecs(codecs: QuantizedCommCodecs) -> str:
    forward, backward = (
        str(codec.quantized_dtype).removeprefix("torch.") for codec in (codecs.forward, codecs.backward)
    )
    return f"vectors are sent as {forward}, their gradients as {backward}"


def _runs(rows: Sequence[int]) -> list[list[int]]:
    """Return [first rank, last rank, rows of each] for runs of ranks with the same number of rows."""
    runs: list[list[int]] = []
    for rank, count in enumerate(rows):
        if runs and runs[-1][1] == rank - 1 and runs[-1][2] == count:
            runs[-1][1] = rank
        elif count:
            runs.append([rank, rank, count])
    return runs
