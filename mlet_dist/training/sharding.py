"""Plans and shards a model whose tables are on the meta device, as TorchRec's DistributedModelParallel."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.comm import intra_and_cross_node_pg
from torchrec.distributed.planner import Topology
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import CacheParams, ShardingType
from torchrec.modules.embedding_configs import PoolingType

from mlet_dist.config.sharding_section import ShardingConfig
from mlet_dist.embeddings import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.planning.cost_model import Device
from mlet_dist.embeddings.row_ranges import segments_of
from mlet_dist.embeddings.sharded.collectives import exchange_codecs
from mlet_dist.embeddings.sharded.exchange_choice import ExchangeChoice
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig
from mlet_dist.errors import UserError
from mlet_dist.machine_limits import memory_bytes
from mlet_dist.models.build import row_tables
from mlet_dist.training.model_plan import ModelPlan, plan_model
from mlet_dist.training.process_group import Worker
from mlet_dist.training.replicated_gradients import DeferredDataParallel

_AS_BY_DEFAULT = ShardingConfig()


@dataclass(frozen=True)
class Sharding:
    """The ``sharding`` section of a config as TorchRec's objects.

    Attributes:
        sharder: the sharder, with exchanges, codecs and the batches' sizes.
        constraints: the planner's constraints, by table.
        replicated_bytes: the largest W1, in bytes, that may be data_parallel.
        dense_columns: of the model, for the costs of its dense layers; None if it is not known.
        copies: how many times its network gets each row.
    """

    sharder: MultiLayerEmbeddingBagCollectionSharder
    constraints: dict[str, ParameterConstraints]
    replicated_bytes: float
    dense_columns: int | None = None
    copies: int = 1

    @classmethod
    def of(
        cls,
        config: ShardingConfig,
        model: nn.Module,
        local_batch_size: int,
        pooling_factors: Mapping[str, float] | None = None,
        dense_columns: int | None = None,
        copies: int = 1,
    ) -> "Sharding":
        """Build from the ``sharding`` section, for the tables of ``model``."""
        tables = row_tables(model)
        settings = {table.name: config.of_table(table.name) for table in tables}
        exchanges = {
            segment.table: _exchange_of(config, segment.table, sequences=table.pooling == PoolingType.NONE)
            for table in tables
            for segment in segments_of([table])
        }
        sharder = MultiLayerEmbeddingBagCollectionSharder(
            exchange=exchanges,
            pooling_factors=_pooling_factors(tables, pooling_factors or {}),
            local_batch_size=local_batch_size,
            qcomm_codecs_registry=exchange_codecs(config.forward_comm, config.backward_comm, local_batch_size),
        )
        constraints = {
            name: ParameterConstraints(
                sharding_types=None if own.sharding_types is None else list(own.sharding_types),
                compute_kernels=list(own.compute_kernels or ()),
                cache_params=CacheParams(load_factor=own.cache_load_factor),
            )
            for name, own in settings.items()
        }
        return cls(sharder, constraints, config.data_parallel_up_to_mb * 1e6, dense_columns, copies)

    def plan(self, model: nn.Module, topology: Topology, device: Device | None = None) -> ModelPlan:
        """Plan the model; see ``plan_model``."""
        return plan_model(
            model,
            self.sharder,
            topology,
            device,
            self.constraints,
            self.replicated_bytes,
            self.dense_columns,
            self.copies,
        )


def shard_model(
    model: nn.Module,
    worker: Worker,
    local_batch_size: int,
    config: ShardingConfig = _AS_BY_DEFAULT,
    pooling_factors: Mapping[str, float] | None = None,
    dense_columns: int | None = None,
    copies: int = 1,
) -> tuple[DistributedModelParallel, ModelPlan]:
    """Plan the model and shard every W1; ``ReplicatedGradients`` combines the other gradients. A collective call.

    Args:
        model: the model, with tables on the meta device.
        worker: this rank.
        local_batch_size: rows of a batch on one rank.
        config: the ``sharding`` section.
        pooling_factors: average ids per bag of each table; 1 for a table without an entry.
        dense_columns: of the model, for the plan's estimate of its dense layers; None estimates them by their sizes.
        copies: how many times the network gets each row (``ModelConfig.copies_of_rows``).

    Raises:
        UserError: no plan fits the device's memory, none meets the constraints, or nodes have different numbers of
            ranks; raised on every rank.
    """
    _check_nodes(worker)
    sharding = Sharding.of(config, model, local_batch_size, pooling_factors, dense_columns, copies)
    on_cuda = worker.device.type == "cuda"
    topology = Topology(
        world_size=worker.world_size,
        local_world_size=worker.local_world_size,
        compute_device=worker.device.type,
        # TorchRec's defaults describe one kind of host: 32 GB per GPU and 128 GB per rank.
        hbm_cap=torch.cuda.get_device_properties(worker.device).total_memory if on_cuda else None,
        ddr_cap=memory_bytes()[0] // worker.local_world_size,
    )
    planned = _plan_on_rank_0(model, sharding, topology, worker)
    sharded = DistributedModelParallel(
        model,
        device=worker.device,
        plan=planned.plan,
        sharders=[sharding.sharder, sharding.sharder.of_sequences()],
        data_parallel_wrapper=DeferredDataParallel(),
    )
    if any(each["sharding_type"] == ShardingType.TABLE_ROW_WISE.value for each in planned.entries()):
        # TorchRec created the process groups within and across nodes with torch's default timeout of 30 minutes.
        for group in intra_and_cross_node_pg(worker.device):
            _set_pg_timeout(worker.timeout, group)
    return sharded, planned


def _exchange_of(config: ShardingConfig, table: str, *, sequences: bool) -> ExchangeChoice:
    """Return the exchange that is requested for a table; that of all tables is one of those that are not sequences."""
    if not sequences:
        return config.of_table(table).exchange or config.exchange
    own = config.tables.get(table)
    return "auto" if own is None or own.exchange is None else own.exchange


def _pooling_factors(tables: Sequence[MultiLayerEmbeddingBagConfig], factors: Mapping[str, float]) -> dict[str, float]:
    """Return the average ids per bag of each table that stores rows; a bag of a pool has the ids of one range."""
    found = {}
    for table in tables:
        of_bags = [
            factors.get(segment.table, 1.0) * segment.share
            for segment in segments_of([table])
            for _ in segment.features
        ]
        found[table.name] = sum(of_bags) / len(of_bags)
    return found


def _plan_on_rank_0(model: nn.Module, sharding: Sharding, topology: Topology, worker: Worker) -> ModelPlan:
    """Plan on rank 0, by its memory, and broadcast the plan or the error to all ranks."""
    result: list[Any] = [None, None]
    if worker.is_first:
        try:
            planned = sharding.plan(model, topology)
            result = [
                (planned.plan, planned.tables, planned.dense, planned.reasons, sharding.sharder.chosen),
                None,
            ]
        except UserError as error:
            result = [None, str(error)]
    dist.broadcast_object_list(result)
    if result[1] is not None:
        raise UserError(result[1])
    plan, tables, dense, reasons, sharding.sharder.chosen = result[0]
    return ModelPlan(plan, sharding.sharder, tables, dense, reasons)


def _check_nodes(worker: Worker) -> None:
    """Raise UserError unless all nodes have as many ranks, since TorchRec forms groups by LOCAL_WORLD_SIZE."""
    sizes: list[Any] = [None] * worker.world_size
    dist.all_gather_object(sizes, worker.local_world_size)
    for rank, size in enumerate(sizes):
        if size != sizes[0]:
            raise UserError(
                f"the node of rank 0 has {sizes[0]} ranks and that of rank {rank} has {size}; start as many ranks on "
                "every node"
            )
