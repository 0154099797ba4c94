"""From TorchRec's plan to the sharded module: which exchange each table takes, and what of the plan is changed."""

from collections.abc import Mapping
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torchrec.distributed.comm import get_topology_group_world_size
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingEnv2D, ShardingType
from torchrec.optim import Adam

from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.sharded.collectives import codecs_of, value_bytes
from mlet_dist.embeddings.sharded.exchange_choice import (
    COMM_OPS,
    EXCHANGES,
    EXCHANGES_OF,
    Exchange,
    ExchangeChoice,
    TableTraffic,
    choose_exchange,
)
from mlet_dist.embeddings.sharded.module import ShardedMultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.sharded.placement import (
    BY_BLOCKS,
    HOST_KERNELS,
    check_node,
    check_plan,
    check_rows_dtype,
    keep_gradients_dense,
    keep_replicated_if_too_small,
    place_blocks,
    spread_blocks,
)


class MultiLayerEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """Shards a MultiLayerEmbeddingBagCollection: W1 with a fused optimizer, W2 replicated.

    W1 is row_wise, table_row_wise, table_wise or data_parallel, as the planner says, or its constraints. Whatever it
    says, a small table of which some rank would hold no row stays data_parallel; on the CPU, for which fbgemm has no
    fused Adam, W1 with ``torchrec.optim.Adam`` in backward leaves a dense gradient for ``LazyAdam``; and with
    ``unique_rows`` the tables' first blocks lie on different ranks.

    Args:
        exchange: how vectors cross the network, for all tables or by table; ``auto``, also of tables that a mapping
            lacks, chooses for each (``choose_exchange``). ``reduce_scatter`` projects sums of bags before TorchRec's
            collective, which of table_wise tables is an all-to-all; ``unique_rows`` serves row_wise tables alone.
        pooling_factors: ids a bag of each table, on average; 1 where none is given. With ``local_batch_size`` it
            decides on ``auto``, and on the CPU which tables share a kernel: speed, not results.
        local_batch_size: bags a feature on one rank.
        *torchrec_arguments, **torchrec_keywords: as of TorchRec's sharder; ``qcomm_codecs_registry`` is what vectors
            and their gradients are rounded to on the network, under every exchange (``exchange_codecs``).

    Attributes:
        chosen: exchange and reason of each table that is not replicated, of the collections that it has sharded.

    Raises:
        ValueError: an unknown exchange, or ``fused_params`` that have lookups return anything but float32.
    """

    def __init__(
        self,
        *torchrec_arguments: Any,
        exchange: ExchangeChoice | Mapping[str, ExchangeChoice] = "auto",
        pooling_factors: Mapping[str, float] | None = None,
        local_batch_size: int = 512,
        **torchrec_keywords: Any,
    ) -> None:
        super().__init__(*torchrec_arguments, **torchrec_keywords)
        for where, each in {"": exchange}.items() if isinstance(exchange, str) else exchange.items():
            if each not in ("auto", *EXCHANGES):
                of = f" of table {where!r}" if where else ""
                raise ValueError(f"exchange{of} is {each!r}; it must be one of auto, {', '.join(EXCHANGES)}")
        output = (self.fused_params or {}).get("output_dtype", SparseType.FP32)
        if output.name != SparseType.FP32.name:
            raise ValueError(
                f"fused_params: output_dtype is {output.name}; W2 is applied to FP32. Rows are stored in half with "
                "data_type FP16, and sent in half with qcomm_codecs_registry"
            )
        self._exchange = exchange
        self._pooling_factors = dict(pooling_factors or {})
        self.local_batch_size = local_batch_size
        self.chosen: dict[str, tuple[Exchange, str]] = {}

    def shard(
        self,
        module: MultiLayerEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedMultiLayerEmbeddingBagCollection:
        """Shard ``module`` by ``params``, which is changed in place to the plan that runs (``plan.py``).

        Raises:
            ValueError: a table's rows are sharded unevenly or its columns split, its plan is one that the exchange or
                its dtype rules out, or the ranks are in 2D.
        """
        if isinstance(env, ShardingEnv2D):
            raise ValueError("multi-layer tables cannot be sharded in 2D (DMPCollection); use DistributedModelParallel")
        by_nodes = {
            name: each for name, each in params.items() if each.sharding_type == ShardingType.TABLE_ROW_WISE.value
        }
        for name, sharding in by_nodes.items():
            check_node(name, sharding, get_topology_group_world_size(env.world_size))
        traffic = self.settle(
            module,
            params,
            env.world_size,
            on_cpu=device is not None and device.type == "cpu",
            spread=not env.output_dtensor,  # a DTensor takes rank r to hold the r-th block
        )
        order = getattr(self, "_sharded_module_order_overwrite", None)  # TorchRec 1.8 has it, 1.6 does not
        return ShardedMultiLayerEmbeddingBagCollection(
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            device=device,
            exchanges={name: self.chosen[name][0] for name in traffic},
            expected_rows={name: each.distinct_ids(env.world_size) / env.world_size for name, each in traffic.items()},
            fused_params=self.fused_params,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            **({} if order is None else {"sharded_module_order_overwrite": order}),
        )

    def settle(
        self,
        module: MultiLayerEmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        world_size: int,
        *,
        on_cpu: bool,
        spread: bool = True,
    ) -> dict[str, TableTraffic]:
        """Change the planner's plan to the one that runs, and choose exchanges (``chosen``); needs no process group.

        Returns:
            The traffic of each table that is not replicated.

        Raises:
            ValueError: as ``shard``.
        """
        tables = {table.name: table for table in module.embedding_bag_configs()}
        for name, table in tables.items():
            keep_replicated_if_too_small(table, params[name], world_size, on_cpu)
            check_plan(table, params[name], self.asked(name), on_cpu=on_cpu)
        chosen = {
            name: self.choose(table, params[name].sharding_type, world_size)
            for name, table in tables.items()
            if params[name].sharding_type != ShardingType.DATA_PARALLEL.value
        }
        self.chosen |= chosen
        for sharding in params.values():
            if sharding.sharding_type in BY_BLOCKS:
                place_blocks(sharding)
        if spread:
            spread_blocks([params[name] for name, (exchange, _) in chosen.items() if exchange == "unique_rows"])
        if on_cpu:
            keep_gradients_dense([params[name] for name in chosen if _is_adam(module.embedding_bags[name].weight)])
        for name, table in tables.items():
            check_rows_dtype(table, params[name])
            if params[name].compute_kernel != EmbeddingComputeKernel.FUSED_UVM_CACHING.value:
                params[name].cache_params = None
        return {name: self.traffic(tables[name]) for name in chosen}

    def asked(self, table: str) -> ExchangeChoice:
        """What was asked for a table."""
        return self._exchange if isinstance(self._exchange, str) else self._exchange.get(table, "auto")

    def choose(self, table: MultiLayerEmbeddingBagConfig, sharding_type: str, world_size: int) -> tuple[Exchange, str]:
        """The exchange of a table that is sharded in this way, and why."""
        asked = self.asked(table.name)
        if sharding_type != ShardingType.ROW_WISE.value:
            if asked == "after":
                return "after", "asked for"
            before = EXCHANGES_OF[sharding_type][-1]
            if asked == before:
                return before, "asked for"
            projected = "" if table.hidden_dim is None else "are projected before they "
            return before, f"sums {projected}cross the network"
        if asked != "auto":
            return asked, "asked for"
        sizes = {each: value_bytes(codecs_of(self.qcomm_codecs_registry, COMM_OPS[each])) for each in EXCHANGES}
        return choose_exchange(self.traffic(table), world_size, sizes)

    def traffic(self, table: MultiLayerEmbeddingBagConfig) -> TableTraffic:
        """What the sharder knows of a table's batches."""
        return TableTraffic(
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            pooling_factor=self._pooling_factors.get(table.name, 1.0),
            num_features=len(table.feature_names),
            local_batch_size=self.local_batch_size,
        )

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Those that the exchange serves, on every device; TorchRec's own sharder offers row_wise on CUDA alone."""
        if self._exchange == "unique_rows":
            return [ShardingType.ROW_WISE.value, ShardingType.DATA_PARALLEL.value]
        return [*EXCHANGES_OF, ShardingType.DATA_PARALLEL.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Fused kernels, whose rows may lie in the host's memory on CUDA; dense ones for what is replicated."""
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return [EmbeddingComputeKernel.DENSE.value]
        fused = [EmbeddingComputeKernel.FUSED.value]
        return fused if compute_device_type == "cpu" else [*fused, *HOST_KERNELS]

    @property
    def module_type(self) -> type[MultiLayerEmbeddingBagCollection]:
        return MultiLayerEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedMultiLayerEmbeddingBagCollection]:
        return ShardedMultiLayerEmbeddingBagCollection


def _is_adam(rows: torch.Tensor) -> bool:
    # What apply_optimizer_in_backward leaves on a parameter.
    return any(issubclass(kind, Adam | torch.optim.Adam) for kind in getattr(rows, "_optimizer_classes", []))
