"""`mlet plan`: TorchRec's plan, and what it costs, for hardware that need not be there."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torchrec.distributed.planner import Topology

from mlet_dist.config import Config
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.costs import Device, Memory, memory_of_rank
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import build_dlrm
from mlet_dist.models.spec import ModelSpec
from mlet_dist.planner.estimate import Case, configurations, fullest_rank, step_of
from mlet_dist.planner.ways_out import ways_out
from mlet_dist.training.optimizers import fuse_row_optimizer
from mlet_dist.training.sharding import ModelPlan, describe_plan, plan_model

_ALIKE = 0.01


def make_plan(
    config: Config,
    spec: ModelSpec,
    pooling_factors: dict[str, float],
    device: Device,
    world_size: int,
    local_world_size: int,
) -> dict[str, Any]:
    """Plan one run; needs neither the hardware nor a process group.

    Returns:
        Plain data: ``tables`` (as in a run's plan.json), ``ranks`` (ranks that hold much the same, in one entry),
        ``configurations``, ``summary`` (lines as at the start of a run) and the device.

    Raises:
        UserError: the tables do not fit; it says which, by how much, and what would make them fit.
    """
    case = Case(
        spec=spec,
        pooling_factors=pooling_factors,
        optimizer=config.optimizer.name,
        exchange=config.sharding.exchange,
        batch_size=config.data.batch_size,
        world_size=world_size,
        local_world_size=local_world_size,
        device=device,
    )
    try:
        planned = _plan(config, case)
    except UserError as error:
        ways = ways_out(case)
        numbered = "; ".join(f"({number}) {way}" for number, way in enumerate(ways, 1))
        raise UserError(f"{error}; what fits: {numbered or 'nothing that was tried'}") from None
    return {
        "world_size": world_size,
        "local_world_size": local_world_size,
        "batch_size": case.batch_size,
        "device": {**dataclasses.asdict(device), "usable_memory": device.usable_memory},
        "summary": describe_plan(planned),
        "ranks": _folded(planned, world_size),
        "configurations": [_configuration(name, each) for name, each in configurations(case)],
        "tables": planned.entries(),
    }


def _plan(config: Config, case: Case) -> ModelPlan:
    model = build_dlrm(case.spec, tables_device=torch.device("meta"))
    fuse_row_optimizer(model, config.optimizer)
    sharder = MultiLayerEmbeddingBagCollectionSharder(
        exchange=case.exchange, pooling_factors=case.pooling_factors, local_batch_size=case.local_batch_size
    )
    device = case.device
    topology = Topology(
        world_size=case.world_size,
        local_world_size=case.local_world_size,
        compute_device=device.kind,
        hbm_cap=int(device.memory),
        ddr_cap=int(device.memory),
        hbm_mem_bw=device.memory_bandwidth / 1e3,
        ddr_mem_bw=device.memory_bandwidth / 1e3,
        intra_host_bw=device.node_bandwidth / 1e3,
        inter_host_bw=device.network_bandwidth / 1e3,
    )
    return plan_model(model, sharder, topology, device)


def _folded(planned: ModelPlan, world_size: int) -> list[dict[str, Any]]:
    """Ranks of the same tables and, within 1 %, of the same memory in one entry: the fullest of them."""
    found: list[tuple[frozenset[str], Memory, int, list[int]]] = []
    memories = {rank: memory_of_rank(planned.tables, planned.dense, rank) for rank in range(world_size)}
    for rank in sorted(memories, key=lambda each: -memories[each].total):
        held = {name: rows[rank] for name, (_, rows) in planned.tables.items() if rows[rank]}
        for tables, memory, _, ranks in found:
            if tables == held.keys() and memory.total - memories[rank].total <= _ALIKE * memory.total:
                ranks.append(rank)
                break
        else:
            found.append((frozenset(held), memories[rank], sum(held.values()), [rank]))
    return [
        {
            "ranks": _ranges(ranks),
            "count": len(ranks),
            "tables": len(tables),
            "rows": rows,
            **dataclasses.asdict(memory),
            "total": memory.total,
        }
        for tables, memory, rows, ranks in found
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """``0-6, 8``."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _configuration(name: str, case: Case) -> dict[str, Any]:
    dense = case.dense()
    memory = fullest_rank(case, dense).total
    step, time = step_of(case, dense)
    return {
        "name": name,
        "memory": memory,
        "fits": memory <= case.device.usable_memory,
        **dataclasses.asdict(step),
        "sent_bytes": step.vector_bytes + step.index_bytes + step.weight_bytes,
        "network_s": time.network,
        "memory_s": time.memory,
        "compute_s": time.compute,
        "step_s": time.total,
        "bound": time.bound,
    }
