"""`mlet plan`: the plan of TorchRec's planner and its cost, on hardware that need not be there."""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mlet_dist.config.config_file import Config
from mlet_dist.embeddings.planning.cost_model import Device, Memory, StepTime
from mlet_dist.embeddings.planning.dense_cost import DenseCost
from mlet_dist.embeddings.planning.plan_cost import (
    Ranks,
    Tables,
    fullest_memory,
    group_identical_ranks,
    memory_of_rank,
    slowest_step,
)
from mlet_dist.embeddings.planning.step_collectives import step_collectives
from mlet_dist.errors import UserError
from mlet_dist.models.build import row_tables, with_tables_prefix
from mlet_dist.models.row_widths import Counts
from mlet_dist.models.spec import ModelSpec
from mlet_dist.planner.budgets import budget_report
from mlet_dist.planner.configurations import Case, configurations
from mlet_dist.planner.expected_step import ExpectedStep, expected_step
from mlet_dist.planner.suggestions import suggestions
from mlet_dist.training.compressed_tables import lookup_counts, with_row_ranges
from mlet_dist.training.model_plan import DoesNotFit, ModelPlan, describe_plan

_SAME_MEMORY = 0.01  # relative difference up to which ranks are one entry


def make_plan(
    config: Config,
    spec: ModelSpec,
    pooling_factors: dict[str, float],
    device: Device,
    world_size: int,
    local_world_size: int,
    lookups: Mapping[str, Counts] = MappingProxyType({}),
) -> dict[str, Any]:
    """Plan one run; this needs neither the hardware nor a process group.

    Args:
        config: the settings; compression reads the counts of the data set's ids.
        spec: the model, before compression.
        pooling_factors: the mean ids of a bag, by table.
        device: the hardware of each rank.
        lookups: how often the data set looks up each row, by table, where it is known.

    Returns:
        Plain data: ``tables`` (as in a run's plan.json), ``ranks`` (with one entry for ranks of nearly the same
        memory), ``configurations``, ``predicted_step_ms`` (``predicted_step``), ``collectives`` (of a step of the
        plan), ``summary`` (the lines that a run prints of its plan) and the device; for
        compressed tables also ``compression``: a ``budget_report``, and ``summary`` (the lines that a run prints).
        ``shortage`` is null, or if the tables do not fit, a text: which rank lacks how much memory, and which settings
        fit. The plan is then the one that spreads rows most evenly.

    Raises:
        UserError: a constraint of the config on a table cannot be met, or compression is impossible.
    """
    try:
        spec = with_tables_prefix(spec)
    except ValueError as error:
        raise UserError(f"--tables: {error}") from None
    counts = lookup_counts(spec, config)
    spec, lines = with_row_ranges(spec, config, counts)
    case = Case(
        config, spec, pooling_factors, Ranks(world_size, local_world_size, device.kind == "cpu"), device, counts
    )
    shortage = None
    try:
        planned = case.plan()
    except DoesNotFit as error:
        planned = error.planned
        numbered = "; ".join(f"({number}) {text}" for number, text in enumerate(suggestions(case), 1))
        shortage = f"{error}; what fits: {numbered or 'nothing that was tried'}"
    tables = row_tables(case.model())
    measured = expected_step(planned, tables, lookups, device)
    # Whether tables fit is decided without counts, and memory that does not is that of the decision.
    in_memory = measured if shortage is None else ExpectedStep()
    found = [_configuration(*each, device, measured, in_memory) for each in configurations(case, planned)]
    _, time = slowest_step(measured.costs(planned.tables), planned.dense, device, measured.busiest)
    return {
        "world_size": world_size,
        "local_world_size": local_world_size,
        "batch_size": config.data.batch_size,
        "device": _plain_device(device),
        "shortage": shortage,
        "summary": describe_plan(planned),
        "ranks": _grouped_ranks(in_memory.costs(planned.tables), planned.dense),
        "configurations": found,
        "checkpoint_copy": _checkpoint_copy(planned, device, local_world_size),
        "predicted_step_ms": predicted_step(time, device),
        "busiest_owner": measured.busiest if measured.lookups else None,
        "collectives": _collectives(planned, device),
        "tables": planned.entries(),
        **({"compression": budget_report(case) | {"summary": lines}} if spec.row_ranges else {}),
    }


def _grouped_ranks(planned: Tables, dense: DenseCost) -> list[dict[str, Any]]:
    """Return one entry for ranks with the same tables and, within 1 %, the same memory: that of the fullest of them."""
    found: list[tuple[frozenset[str], Memory, int, list[int]]] = []
    groups = [(memory_of_rank(planned, dense, group[0]), group) for group in group_identical_ranks(planned)]
    for memory, group in sorted(groups, key=lambda each: -each[0].total):
        held = {name: rows[group[0]] for name, (_, rows) in planned.items() if rows[group[0]]}
        for tables, fullest, _, ranks in found:
            if tables == held.keys() and fullest.total - memory.total <= _SAME_MEMORY * fullest.total:
                ranks.extend(group)
                break
        else:
            found.append((frozenset(held), memory, sum(held.values()), list(group)))
    return [
        {
            "ranks": _ranges(ranks),
            "count": len(ranks),
            "tables": len(tables),
            "rows": rows,
            **{kind: size for kind, size in vars(memory).items() if kind != "gradients"},
            "total": memory.total,
        }
        for tables, memory, rows, ranks in found
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Return numbers as ranges, such as ``0-6, 8``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _checkpoint_copy(planned: ModelPlan, device: Device, local_world_size: int) -> dict[str, Any]:
    """Return the host memory that the copy for a checkpoint takes, and whether it fits beside what is there already."""
    memories = [
        memory_of_rank(planned.tables, planned.dense, group[0]) for group in group_identical_ranks(planned.tables)
    ]
    on_cpu = device.kind == "cpu"
    usable = device.usable_memory if on_cpu else device.usable_host_memory
    needed = max(each.checkpoint_copy + (each.total if on_cpu else each.host) for each in memories)
    copy = max(each.checkpoint_copy for each in memories)
    return {"bytes_per_rank": copy, "bytes_per_node": copy * local_world_size, "fits": needed <= usable}


def predicted_step(time: StepTime, device: Device) -> dict[str, float | None]:
    """Return the milliseconds of a step: ``total``, the parts that it is the sum of, and ``lower_bound``.

    ``memory`` includes sorting ids and the link between host and device; ``host`` is the host's own work. Measured
    rates have no lower bound, which is null then.
    """
    parts = {
        "total": time.total,
        "latency": time.latency,
        "network": time.network,
        "memory": time.memory + time.sorting + time.host,
        "compute": time.compute,
        "host": time.floor,
        "skew": time.skew,
    }
    bound = 1e3 * time.lower_bound if device.at_peak else None
    return {**{name: 1e3 * seconds for name, seconds in parts.items()}, "lower_bound": bound}


def _plain_device(device: Device) -> dict[str, Any]:
    found = {field.name: getattr(device, field.name) for field in dataclasses.fields(device)}
    found["collectives"] = device.collectives.backend
    return found | {"usable_memory": device.usable_memory}


def _collectives(planned: ModelPlan, device: Device) -> list[dict[str, Any]]:
    """Return the collectives of a step, with their latency."""
    dense = planned.dense
    groups = [cost.group for cost, _ in planned.tables.values()]
    return [
        {**dataclasses.asdict(each), "latency_ms": 1e3 * each.latency(device.collectives)}
        for each in step_collectives(groups, dense.world_size, dense.local_world_size)
    ]


def _configuration(
    name: str, tables: Tables, dense: DenseCost, device: Device, measured: ExpectedStep, in_memory: ExpectedStep
) -> dict[str, Any]:
    """Return the memory and the cost of a step of one configuration."""
    memory = fullest_memory(in_memory.costs(tables), dense)
    step, time = slowest_step(measured.costs(tables), dense, device, measured.busiest)
    return {
        "name": name,
        "memory": memory.total,
        "host_memory": memory.host,
        "fits": memory.total <= device.usable_memory and memory.host <= device.usable_host_memory,
        "vector_bytes": step.vector_bytes,
        "index_bytes": step.index_bytes,
        "weight_bytes": step.weight_bytes,
        # Keys of JSON results do not change: "held" is a rank's part as an owner of rows, "home" that as a requester.
        "node_held": step.node_owner_bytes,
        "node_home": step.node_requester_bytes,
        "network_held": step.network_owner_bytes,
        "network_home": step.network_requester_bytes,
        "memory_bytes": step.memory_bytes,
        "host_bytes": step.host_bytes,
        "flops": step.flops,
        "sent_bytes": step.sent_bytes,
        "network_s": time.network,
        "memory_s": time.memory + time.sorting,
        "host_s": time.host,
        "compute_s": time.compute,
        "latency_s": time.latency,
        "host_floor_s": time.floor,
        "skew_s": time.skew,
        "step_s": time.total,
        "bound": time.bound,
    }
