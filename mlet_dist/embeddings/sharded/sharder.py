"""The sharder: it chooses each table's exchange, adapts TorchRec's plan, and builds the sharded module."""

from collections.abc import Mapping
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import nn
from torchrec.distributed.comm import get_topology_group_world_size
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.types import ParameterSharding, ShardingEnv, ShardingEnv2D, ShardingType
from torchrec.modules.embedding_configs import PoolingType
from torchrec.optim import Adam

from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.multi_layer_tables import MultiLayerTables
from mlet_dist.embeddings.row_ranges import segments_of
from mlet_dist.embeddings.sequence_collection import MultiLayerEmbeddingCollection
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
    BLOCK_SHARDING_TYPES,
    HOST_KERNELS,
    check_moving_rows,
    check_node_placement,
    check_plan,
    check_rows_dtype,
    place_blocks,
    place_buckets,
    replicate_if_too_small,
    stagger_blocks,
    use_dense_kernels,
)
from mlet_dist.embeddings.sharded.sequence_module import ShardedMultiLayerEmbeddingCollection
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig


class MultiLayerEmbeddingBagCollectionSharder(EmbeddingBagCollectionSharder):
    """Shards a MultiLayerEmbeddingBagCollection: W1 with a fused optimizer, W2 replicated on every rank.

    W1 is row_wise, table_row_wise, table_wise or data_parallel, as the plan requires, with these exceptions:

    - A small table that would leave some rank without rows becomes data_parallel.
    - On a CPU fbgemm has no fused Adam. With ``torchrec.optim.Adam`` in backward, W1 gets a dense gradient there, for
      ``LazyAdam``.
    - Under ``unique_rows`` the tables' first blocks are placed on different ranks.

    Args:
        exchange: the exchange of all tables, or by table. ``auto``, also the default for tables missing from a mapping,
            chooses one per table (``choose_exchange``). ``reduce_scatter`` projects sums of bags before TorchRec's
            collective, which for table_wise tables is an all-to-all. ``unique_rows`` supports row_wise tables only.
        pooling_factors: the average number of ids per bag by table, 1 by default. With ``local_batch_size`` it
            determines the choice of ``auto`` and, on a CPU, which tables share a kernel. It affects speed, not results.
        local_batch_size: bags per feature on one rank.
        *torchrec_arguments: positional arguments of TorchRec's sharder.
        **torchrec_keywords: keyword arguments of TorchRec's sharder. ``qcomm_codecs_registry`` rounds vectors and their
            gradients on the network under every exchange (``exchange_codecs``).

    Attributes:
        chosen: exchange and reason of each table that is not data_parallel, for all collections sharded so far.

    Raises:
        ValueError: an exchange is unknown, or ``fused_params`` set an output_dtype other than FP32.
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
                f"fused_params: output_dtype is {output.name}; it must be FP32, to which W2 is applied. To store rows "
                "in half precision use data_type FP16; to send vectors in half precision use qcomm_codecs_registry"
            )
        self._exchange = exchange
        self._pooling_factors = dict(pooling_factors or {})
        self.local_batch_size = local_batch_size
        self.chosen: dict[str, tuple[Exchange, str]] = {}

    def shard(
        self,
        module: MultiLayerTables,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedMultiLayerEmbeddingBagCollection:
        """Shard ``module`` by the plan ``params``, which is changed in place as ``finalize_plan`` describes.

        Raises:
            ValueError: a table's plan is not supported (see ``placement``), ``env`` is two-dimensional, or it asks for
                DTensors of an adaptive collection.
        """
        if isinstance(env, ShardingEnv2D):
            raise ValueError("multi-layer tables cannot be sharded in 2D (DMPCollection); use DistributedModelParallel")
        if env.output_dtensor and module.adaptive is not None:
            raise ValueError("tables whose rows move between widths cannot be DTensors; leave output_dtensor out")
        by_nodes = {
            name: each for name, each in params.items() if each.sharding_type == ShardingType.TABLE_ROW_WISE.value
        }
        for name, sharding in by_nodes.items():
            check_node_placement(name, sharding, get_topology_group_world_size(env.world_size))
        traffic = self.finalize_plan(
            module,
            params,
            env.world_size,
            on_cpu=device is not None and device.type == "cpu",
            stagger=not env.output_dtensor,  # a DTensor assumes that rank r has the r-th block
        )
        exchanges = {name: self.chosen[name][0] for name in traffic}
        expected = {name: each.distinct_ids(env.world_size) / env.world_size for name, each in traffic.items()}
        for table in module.row_tables():
            if table.pooling == PoolingType.NONE and table.name not in traffic:  # replicated
                exchanges[table.name], expected[table.name] = "unique_rows", self.traffic(table).distinct_ids()
        order = getattr(self, "_sharded_module_order_overwrite", None)  # TorchRec 1.8 has it, 1.6 does not
        return self.sharded_module_type(
            module=module,
            table_name_to_parameter_sharding=params,
            env=env,
            device=device,
            exchanges=exchanges,
            expected_rows=expected,
            fused_params=self.fused_params,
            qcomm_codecs_registry=self.qcomm_codecs_registry,
            module_fqn=module_fqn,
            **({} if order is None else {"sharded_module_order_overwrite": order}),
        )

    def finalize_plan(
        self,
        module: MultiLayerTables,
        params: dict[str, ParameterSharding],
        world_size: int,
        *,
        on_cpu: bool,
        stagger: bool = True,
    ) -> dict[str, TableTraffic]:
        """Adapt the planner's plan, in place, and choose exchanges (``chosen``); needs no process group.

        Args:
            module: the collection to shard.
            params: TorchRec's plan by table.
            world_size: R.
            on_cpu: whether the ranks compute on a CPU.
            stagger: whether to place the first blocks of unique_rows tables on different ranks (``stagger_blocks``).

        Returns:
            The traffic of each table that is not data_parallel.

        Raises:
            ValueError: a table's plan is not supported.
        """
        tables = {table.name: table for table in module.row_tables()}
        for name, table in tables.items():
            if not table.segments:
                replicate_if_too_small(table, params[name], world_size, on_cpu)
            check_plan(table, params[name], self.requested_exchange(table), on_cpu=on_cpu)
        chosen = {
            name: self.exchange_for(table, params[name].sharding_type, world_size, on_cpu=on_cpu)
            for name, table in tables.items()
            if params[name].sharding_type != ShardingType.DATA_PARALLEL.value
        }
        self.chosen |= chosen
        for sharding in params.values():
            if sharding.sharding_type in BLOCK_SHARDING_TYPES:
                place_blocks(sharding)
        if stagger:
            staggered = [name for name, (exchange, _) in chosen.items() if exchange == "unique_rows"]
            stagger_blocks([params[name] for name in staggered if not tables[name].num_buckets])
        if on_cpu:
            use_dense_kernels([params[name] for name in chosen if _is_adam(module.row_weight(name))])
        for name, table in tables.items():
            if table.num_buckets:
                place_buckets(table, params[name])
                check_moving_rows(table, params[name], _optimizers(module.row_weight(name)))
            check_rows_dtype(table, params[name])
            if params[name].compute_kernel != EmbeddingComputeKernel.FUSED_UVM_CACHING.value:
                params[name].cache_params = None
        return {name: self.traffic(tables[name]) for name in chosen}

    def requested_exchange(self, table: MultiLayerEmbeddingBagConfig) -> ExchangeChoice:
        """Return the exchange that the user requested for a table.

        A pool of row ranges needs unique_rows, and so does a table whose rows are not pooled.

        Raises:
            ValueError: another exchange was requested for such a table.
        """

        def requested(name: str) -> ExchangeChoice:
            return self._exchange if isinstance(self._exchange, str) else self._exchange.get(name, "auto")

        if not table.segments and table.pooling != PoolingType.NONE:
            return requested(table.name)
        what = "has row ranges, whose vectors" if table.segments else "is not pooled, and its rows"
        for name in dict.fromkeys(segment.table for segment in segments_of([table])):
            if (found := requested(name)) not in ("auto", "unique_rows"):
                raise ValueError(
                    f"table {name!r} {what} only exchange unique_rows brings together; {found!r} is requested: use "
                    "'auto' or 'unique_rows'"
                )
        return "unique_rows"

    def exchange_for(
        self, table: MultiLayerEmbeddingBagConfig, sharding_type: str, world_size: int, *, on_cpu: bool
    ) -> tuple[Exchange, str]:
        """Return the exchange of a table under a sharding type, and the reason in a few words."""
        requested = self.requested_exchange(table)
        if table.pooling == PoolingType.NONE:
            return "unique_rows", "vectors that are not pooled travel once for each distinct id"
        sizes = {each: value_bytes(codecs_of(self.qcomm_codecs_registry, COMM_OPS[each])) for each in EXCHANGES}
        return choose_exchange(
            requested,
            sharding_type,
            self.traffic(table),
            world_size,
            sizes,
            has_projection=table.hidden_dim is not None,
            on_cpu=on_cpu,
        )

    def traffic(self, table: MultiLayerEmbeddingBagConfig) -> TableTraffic:
        """Return the sizes of a table and its batch."""
        return TableTraffic(
            num_embeddings=table.num_embeddings,
            embedding_dim=table.embedding_dim,
            pooling_factor=self._pooling_factors.get(table.name, 1.0),
            num_features=len(table.feature_names),
            local_batch_size=self.local_batch_size,
        )

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return the sharding types that the exchange supports. TorchRec's sharder offers row_wise on CUDA only."""
        if self._exchange == "unique_rows":
            return [ShardingType.ROW_WISE.value, ShardingType.DATA_PARALLEL.value]
        return [*EXCHANGES_OF, ShardingType.DATA_PARALLEL.value]

    def compute_kernels(self, sharding_type: str, compute_device_type: str) -> list[str]:
        """Return the fused kernels, on CUDA also those with rows in host memory; the dense one for data_parallel."""
        if sharding_type == ShardingType.DATA_PARALLEL.value:
            return [EmbeddingComputeKernel.DENSE.value]
        fused = [EmbeddingComputeKernel.FUSED.value]
        return fused if compute_device_type == "cpu" else [*fused, *HOST_KERNELS]

    def of_sequences(self) -> "MultiLayerEmbeddingCollectionSharder":
        """Return the sharder of a model's tables of sequences with the same settings and the same ``chosen``."""
        found = MultiLayerEmbeddingCollectionSharder(
            self.fused_params,
            self.qcomm_codecs_registry,
            exchange=self._exchange,
            pooling_factors=self._pooling_factors,
            local_batch_size=self.local_batch_size,
        )
        found.chosen = self.chosen
        return found

    def shardable_parameters(self, module: MultiLayerTables) -> dict[str, nn.Parameter]:
        """Return the W1 of each table that stores rows."""
        return {table.name: module.row_weight(table.name) for table in module.row_tables()}

    @property
    def module_type(self) -> type[MultiLayerTables]:
        return MultiLayerEmbeddingBagCollection

    @property
    def sharded_module_type(self) -> type[ShardedMultiLayerEmbeddingBagCollection]:
        return ShardedMultiLayerEmbeddingBagCollection


class MultiLayerEmbeddingCollectionSharder(MultiLayerEmbeddingBagCollectionSharder):
    """Shards a MultiLayerEmbeddingCollection, whose rows are not pooled, as the other sharder shards the other one.

    Tables are row_wise, with exchange ``unique_rows``, or data_parallel. ``pooling_factors`` are the average numbers of
    ids of a sequence.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:
        """Return row_wise and data_parallel."""
        return [ShardingType.ROW_WISE.value, ShardingType.DATA_PARALLEL.value]

    @property
    def module_type(self) -> type[MultiLayerTables]:
        return MultiLayerEmbeddingCollection

    @property
    def sharded_module_type(self) -> type[ShardedMultiLayerEmbeddingBagCollection]:
        return ShardedMultiLayerEmbeddingCollection


def _is_adam(rows: torch.Tensor) -> bool:
    return any(issubclass(kind, Adam | torch.optim.Adam) for kind in _optimizers(rows))


def _optimizers(rows: torch.Tensor) -> list[type]:
    # apply_optimizer_in_backward sets this attribute on a parameter.
    return getattr(rows, "_optimizer_classes", [])
