"""From a DLRM whose tables are on the meta device to TorchRec's DistributedModelParallel."""

import os
from collections.abc import Mapping

import torch
from torch import distributed as dist
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import QuantizedCommCodecs
from torchrec.models.dlrm import DLRM

from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.codecs import codecs_of
from mlet_dist.embeddings.exchange import COMM_OPS, ExchangeChoice
from mlet_dist.errors import UserError
from mlet_dist.training.distributed import Worker


def shard_model(
    model: DLRM,
    worker: Worker,
    local_batch_size: int,
    exchange: ExchangeChoice = "auto",
    codecs: dict[str, QuantizedCommCodecs] | None = None,
) -> tuple[DistributedModelParallel, list[str]]:
    """Plan with TorchRec's planner, shard every W1 row-wise and wrap what is replicated in DDP.

    Args:
        local_batch_size: rows of a batch on one rank, by which ``auto`` chooses.
        exchange: ``sharding.exchange`` of the config.
        codecs: what vectors and their gradients are rounded to on the network (``embeddings/codecs.py``).

    Returns:
        The model, and what was planned: a line for each way in which tables are kept, with the reason.

    Raises:
        UserError: the planner finds no plan that fits the memory of the device and of the host.
    """
    sharder = MultiLayerEmbeddingBagCollectionSharder(
        exchange=exchange, local_batch_size=local_batch_size, qcomm_codecs_registry=codecs
    )
    on_cuda = worker.device.type == "cuda"
    topology = Topology(
        world_size=worker.world_size,
        local_world_size=worker.local_world_size,
        compute_device=worker.device.type,
        # TorchRec's defaults are those of one kind of host: 32 GB a GPU, 128 GB a rank.
        hbm_cap=torch.cuda.get_device_properties(worker.device).total_memory if on_cuda else None,
        ddr_cap=_host_memory() // worker.local_world_size,
    )
    planner = EmbeddingShardingPlanner(topology=topology, batch_size=local_batch_size)
    try:
        plan = planner.collective_plan(model, [sharder], dist.group.WORLD)
    except PlannerError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the tables do not fit {worker.world_size} ranks on {worker.device.type}: {reason}") from None
    tables = model.sparse_arch.embedding_bag_collection.embedding_bag_configs()
    sizes = {table.name: table.num_embeddings for table in tables}
    sharded = DistributedModelParallel(model, device=worker.device, plan=plan, sharders=[sharder])
    lines = _describe(sizes, sharder.chosen)
    if codecs is not None and sharder.chosen:
        lines.append(_describe_codecs(codecs_of(codecs, COMM_OPS["unique_rows"])))
    kernels = {table.compute_kernel for module in plan.plan.values() for table in module.values()}
    if kernels == {EmbeddingComputeKernel.DENSE.value} and sharder.chosen:
        lines.append("all rows leave a dense gradient: fbgemm has this optimizer's fused kernel for CUDA alone")
    return sharded, lines


def _describe(sizes: Mapping[str, int], chosen: Mapping[str, tuple[str, str]]) -> list[str]:
    ways: dict[str, list[str]] = {}
    for table in sizes:
        way = f"row_wise, {chosen[table][0]}" if table in chosen else "data_parallel"
        ways.setdefault(way, []).append(table)
    lines = []
    for way, tables in ways.items():
        largest = max(tables, key=lambda table: sizes[table])
        reason = chosen[largest][1] if largest in chosen else "too few rows for a share on every rank"
        others = f" and {len(tables) - 1} more" if len(tables) > 1 else ""
        lines.append(f"{way}: {largest} ({sizes[largest]:,} rows){others}; {reason}")
    return lines


def _describe_codecs(codecs: QuantizedCommCodecs) -> str:
    forward, backward = (
        str(codec.quantized_dtype).removeprefix("torch.") for codec in (codecs.forward, codecs.backward)
    )
    return f"vectors cross the network as {forward}, their gradients as {backward}"


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
