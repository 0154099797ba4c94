"""A model's plan: TorchRec's, as it will run, what it costs, and why."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import QuantizedCommCodecs, ShardingPlan
from torchrec.models.dlrm import DLRM

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.planning.cost_model import Device
from mlet_dist.embeddings.planning.explanation import sharding_reasons
from mlet_dist.embeddings.planning.plan_cost import (
    DenseCost,
    Ranks,
    alike,
    memory_of_rank,
    optimizer_of,
    shortage,
    table_costs,
)
from mlet_dist.embeddings.planning.planner import device_of, home_memory, multi_layer_planner
from mlet_dist.embeddings.planning.search_space import Constraints, evenest, table_constraints
from mlet_dist.embeddings.planning.table_cost import UVM, UVM_CACHING, TableCost
from mlet_dist.embeddings.sharded.collectives import codecs_of
from mlet_dist.embeddings.sharded.exchange_choice import COMM_OPS
from mlet_dist.embeddings.sharded.placement import REPLICATED_BYTES
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import TABLES_PREFIX, dense_cost

_UNLIMITED = 1 << 60
_DENSE = EmbeddingComputeKernel.DENSE.value


@dataclass(frozen=True)
class ModelPlan:
    """TorchRec's plan as it will run, and what it costs.

    Attributes:
        plan: for DistributedModelParallel.
        sharder: with which it was made.
        tables: each table's cost and its rows by rank.
        dense: the layers beside the tables.
        reasons: why each table has its sharding type.
    """

    plan: ShardingPlan
    sharder: MultiLayerEmbeddingBagCollectionSharder
    tables: dict[str, tuple[TableCost, list[int]]]
    dense: DenseCost
    reasons: dict[str, str]

    def entries(self) -> list[dict[str, Any]]:
        """A record a table; ``rows_per_rank`` are [first rank, last rank, rows of each], without ranks of no rows."""
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
    """No plan fits; ``planned`` is the one that spreads tables most evenly."""

    def __init__(self, message: str, planned: ModelPlan) -> None:
        super().__init__(message)
        self.planned = planned


def plan_model(
    model: DLRM,
    sharder: MultiLayerEmbeddingBagCollectionSharder,
    topology: Topology,
    device: Device | None = None,
    constraints: Constraints | None = None,
    replicated_bytes: float = REPLICATED_BYTES,
) -> ModelPlan:
    """Plan with TorchRec's planner and the estimates of ``embeddings.planning``; in one process, without a group.

    Args:
        model: tables on the meta device, whose rows know their optimizer.
        device: hardware of a rank; None takes the topology's.
        constraints: TorchRec's, by table; they win over ``table_constraints``.
        replicated_bytes: of a table's rows, up to which it may be data_parallel.

    Raises:
        DoesNotFit: the planner finds no plan that fits; it says which table and how much is missing.
        UserError: the constraints cannot be met, or the plan that they ask for is one that cannot run.
    """
    tables = model.sparse_arch.embedding_bag_collection
    configs, ranks, device = tables.embedding_bag_configs(), Ranks.of(topology), device or device_of(topology)
    asked = constraints or {}
    optimizer = optimizer_of(next(iter(tables.embedding_bags.values())).weight)
    dense = dense_cost(model, sharder.local_batch_size, optimizer, ranks.world_size, ranks.local_world_size)
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
            plan = planner.plan(model, [sharder])
        params = plan.plan[TABLES_PREFIX.rstrip(".")]
        try:
            sharder.settle(tables, params, ranks.world_size, on_cpu=ranks.on_cpu)
        except ValueError as error:
            raise UserError(str(error)) from None
        costs = table_costs(tables, params, sharder, ranks)
        reasons = sharding_reasons(tables, costs, asked, limited, sharder, ranks, device)
        return ModelPlan(plan, sharder, costs, dense, reasons)

    try:
        # Buffers of rows are not known yet; they leave less to the activations, so this is enough.
        reserved = dense.memory(home_memory(tables, sharder, ranks).buffers)
        return settled(topology, limited, reserved.total)
    except PlannerError:
        unlimited = Topology(
            ranks.world_size,
            topology.compute_device,
            hbm_cap=_UNLIMITED,
            ddr_cap=_UNLIMITED,
            local_world_size=topology.local_world_size,
        )
        found = settled(unlimited, {name: evenest(each) for name, each in limited.items()}, 0)
    if fits(found, device):
        return found
    missing = shortage(found.tables, dense, device.memory, device.host_memory)
    where = "one rank" if ranks.world_size == 1 else f"{ranks.world_size:,} ranks"
    raise DoesNotFit(f"the tables do not fit {where} on {topology.compute_device}: {missing}", found)


def fits(planned: ModelPlan, device: Device) -> bool:
    """Whether every rank's device and host have the room."""
    memories = [memory_of_rank(planned.tables, planned.dense, ranks[0]) for ranks in alike(planned.tables)]
    return all(each.total <= device.usable_memory and each.host <= device.usable_host_memory for each in memories)


def describe_plan(planned: ModelPlan) -> list[str]:
    """A line for each way in which tables are kept, with the reasons for the largest."""
    entries = {each["table"]: each for each in planned.entries()}
    ways: dict[str, list[str]] = {}
    for name, entry in entries.items():
        kernel = entry["compute_kernel"] if entry["compute_kernel"] in (UVM, UVM_CACHING) else None
        way = ", ".join(filter(None, (entry["sharding_type"], entry["exchange"], kernel)))
        ways.setdefault(way, []).append(name)
    lines = [_describe_way(way, names, planned, entries) for way, names in ways.items()]
    codecs = planned.sharder.qcomm_codecs_registry
    if codecs and planned.sharder.chosen:
        lines.append(_describe_codecs(codecs_of(codecs, COMM_OPS["unique_rows"])))
    if {entry["compute_kernel"] for entry in entries.values()} == {_DENSE} and planned.sharder.chosen:
        lines.append("all rows leave a dense gradient: fbgemm has this optimizer's fused kernel for CUDA alone")
    return lines


@contextmanager
def _without_false_warnings() -> Iterator[None]:
    """TorchRec warns of each data_parallel table that its sharding spec is missing; such tables have none."""
    logging.getLogger().addFilter(_is_wanted)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(_is_wanted)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Sharding spec not found")


def _describe_way(way: str, names: Sequence[str], planned: ModelPlan, entries: Mapping[str, Mapping[str, Any]]) -> str:
    sizes = {name: planned.tables[name][0].traffic.num_embeddings for name in names}
    largest = max(names, key=lambda name: sizes[name])
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    reasons = [entries[largest]["reason"], entries[largest]["exchange_reason"]]
    said = "; ".join(dict.fromkeys(filter(None, reasons)))
    return f"{way}: {largest} ({sizes[largest]:,} rows){others}; {said}"


def _describe_codecs(codecs: QuantizedCommCodecs) -> str:
    forward, backward = (
        str(codec.quantized_dtype).removeprefix("torch.") for codec in (codecs.forward, codecs.backward)
    )
    return f"vectors cross the network as {forward}, their gradients as {backward}"


def _runs(rows: Sequence[int]) -> list[list[int]]:
    """[first rank, last rank, rows of each] of ranks in a row that hold as many."""
    runs: list[list[int]] = []
    for rank, held in enumerate(rows):
        if runs and runs[-1][1] == rank - 1 and runs[-1][2] == held:
            runs[-1][1] = rank
        elif held:
            runs.append([rank, rank, held])
    return runs
