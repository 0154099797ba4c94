"""The sharded module: TorchRec's sharded collection over W1, with W2 applied before or after each table's exchange.

In each step ``input_dist`` checks the batch and sends ids to the owner ranks, ``compute`` looks up rows of W1, and
``output_dist`` exchanges vectors and applies W2. ``compute`` also pools, except under unique_rows, where pooling is
part of ``output_dist``. The output is a KeyedTensor with values ``(b, sum of d)``.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.embedding_sharding import EmbeddingSharding, EmbeddingShardingInfo
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import (
    Awaitable,
    LazyAwaitable,
    ParameterSharding,
    QuantizedCommCodecs,
    ShardingEnv,
    ShardingType,
)
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import EmbeddingBagCollection, get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from mlet_dist.embeddings.collection import by_key
from mlet_dist.embeddings.initializers import LeftUndrawn, StoredRowInitializer
from mlet_dist.embeddings.input_check import smallest_tables
from mlet_dist.embeddings.multi_layer_tables import (
    MultiLayerTables,
    build_projections,
    check_loaded_shapes,
    projection_weights,
)
from mlet_dist.embeddings.projection import project
from mlet_dist.embeddings.row_ranges import segments_of
from mlet_dist.embeddings.sharded.adaptive_tables import AdaptiveTables, build_slot_map, locate_rows
from mlet_dist.embeddings.sharded.batch_agreement import BatchChecker, CheckResult
from mlet_dist.embeddings.sharded.collectives import gradient_factors, with_combined_gradients
from mlet_dist.embeddings.sharded.exchange_choice import Exchange
from mlet_dist.embeddings.sharded.placement import check_widths, first_row
from mlet_dist.embeddings.sharded.pooled import (
    AllToAllSharding,
    ExchangedShardingInfo,
    NodeReduceSharding,
    PaddedRowWiseSharding,
    PaddedTableRowWiseSharding,
    ProjectingDist,
    ReduceScatterSharding,
    ServedFeature,
    bag_sizes,
    mean_keys,
    normalize_by_bag_size,
)
from mlet_dist.embeddings.sharded.row_shardings import DistinctRowsSharding, UniqueRowsSharding
from mlet_dist.embeddings.sharded.stored_ids import look_up_stored
from mlet_dist.embeddings.sharded.unique_rows import UniqueRowsContext, UniqueRowsInputDist
from mlet_dist.embeddings.slot_initializer import SlotInitializer
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig


@dataclass
class CheckedContext(EmbeddingBagCollectionContext):
    """TorchRec's per-batch context, with the result of the input check."""

    check_result: CheckResult | None = None


class ShardedMultiLayerEmbeddingBagCollection(ShardedEmbeddingBagCollection):
    """TorchRec's sharded collection over the k-dimensional W1, with W2 applied as each table's exchange requires.

    W1 is updated by the optimizer that is fused into backward. W2 is an ordinary parameter, replicated on every rank,
    for an optimizer of the user's. Under every exchange backward leaves the gradient of the mean of the ranks' losses
    in W2's ``grad``, as DDP does for dense layers and TorchRec for W1.

    If ``module`` is on the meta device, the initial values depend on seed, table and row only; otherwise its values are
    copied. Rows with ``data_type`` FP16 are stored in half precision and looked up as float32; those of data_parallel
    tables stay float32.

    Args:
        module: the unsharded module.
        table_name_to_parameter_sharding: TorchRec's plan of the module.
        env: TorchRec's sharding environment.
        device: device of the shards.
        exchanges: exchange by table; ``after`` if missing. Of data_parallel tables only those that are not pooled have
            one, unique_rows, in which a rank requests its own rows.
        expected_rows: by unique_rows table, the expected number of distinct rows that a global batch requests from one
            rank.
        **torchrec_arguments: arguments of TorchRec's sharded collection.

    Raises:
        ValueError: the row width of a table is not a multiple of 4.
    """

    # By sharding type and exchange; combinations that are missing here use TorchRec's own shardings.
    shardings: ClassVar[Mapping[tuple[str, Exchange], Callable[..., EmbeddingSharding]]] = {
        (ShardingType.ROW_WISE.value, "after"): PaddedRowWiseSharding,
        (ShardingType.ROW_WISE.value, "reduce_scatter"): ReduceScatterSharding,
        (ShardingType.ROW_WISE.value, "unique_rows"): UniqueRowsSharding,
        (ShardingType.TABLE_ROW_WISE.value, "after"): PaddedTableRowWiseSharding,
        (ShardingType.TABLE_ROW_WISE.value, "reduce_scatter"): NodeReduceSharding,
        (ShardingType.TABLE_WISE.value, "all_to_all"): AllToAllSharding,
    }

    def __init__(
        self,
        module: MultiLayerTables,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        exchanges: Mapping[str, Exchange] | None = None,
        expected_rows: Mapping[str, float] | None = None,
        **torchrec_arguments: Any,
    ) -> None:
        tables, row_tables = module.table_configs(), module.row_tables()
        rows = module.rows()
        rows.exchanges = dict(exchanges or {})
        rows.expected_rows = dict(expected_rows or {})
        rows.exchanged_dims = {table.name: table.embedding_dim for table in row_tables}
        rows.segments = {table.name: tuple(segments_of([table])) for table in row_tables}
        rows.served = _served_features(tables, row_tables)
        rows.slots = build_slot_map(module, env, device)
        check_widths(row_tables, device)
        for config in rows.embedding_bag_configs():
            # Replicated rows have a dense gradient and a torch optimizer, both of which use the weight's dtype.
            if table_name_to_parameter_sharding[config.name].sharding_type == ShardingType.DATA_PARALLEL.value:
                config.data_type = DataType.FP32
        super().__init__(
            module=rows,
            table_name_to_parameter_sharding=table_name_to_parameter_sharding,
            env=env,
            device=device,
            **torchrec_arguments,
        )
        self.projections = build_projections(tables, module.seed, device, module.adaptive)
        self._row_tables = row_tables
        self.adaptive_tables: AdaptiveTables | None = None
        if rows.slots is not None:
            pools = [table for table in row_tables if table.num_buckets]
            self.adaptive_tables = AdaptiveTables(rows.slots, pools, self)
        self._exchanges = rows.exchanges
        self._order_of_key = {
            served.key: order
            for table in row_tables
            if (order := table.row_order) is not None
            for served in rows.served[table.name]
        }
        after = [table for table in row_tables if self._exchanges.get(table.name, "after") == "after"]
        self._projection_of_key_after = {
            served.key: table.name for table in after for served in rows.served[table.name]
        }
        for output_dist in self._output_dists:
            if isinstance(output_dist, ProjectingDist):
                output_dist.projections_of = self._projections_of
        shardings = self._embedding_shardings
        self._checker = self._build_checker(
            tables, codes_exchanged=any(isinstance(each, UniqueRowsSharding) for each in shardings)
        )
        for sharding in shardings:
            if isinstance(sharding, DistinctRowsSharding):
                sharding.checker = self._checker
        self._mean_keys = mean_keys(tables)
        self._projected_before = {
            segment.name
            for table, exchange in self._exchanges.items()
            if exchange != "after" and not self._is_replicated(table)
            for segment in rows.segments[table]
        }
        self._combined_weights: dict[str, torch.Tensor] = {}
        self._gradients_deferred = False
        self._register_state_dict_hook(_add_slots)
        if not any(parameter.is_meta for parameter in module.parameters()):
            self.load_state_dict(module.state_dict())
        for weight in (*self.projections.parameters(), *self._replicated_rows()):
            dist.broadcast(weight.data, group=env.process_group, group_src=0)

    def reset_parameters(self) -> None:
        """Draw this rank's rows of every W1. TorchRec calls it after it has allocated the shards."""
        if self._device is not None and self._device.type == "meta":
            return
        for config in self._embedding_bag_configs:
            weight = self.embedding_bags[config.name].weight
            sharding = self.module_sharding_plan[config.name]
            if weight.numel() == 0:  # all rows are on other ranks
                continue
            if isinstance(config.init_fn, StoredRowInitializer | SlotInitializer | LeftUndrawn):
                config.init_fn.fill(weight, first_row(sharding, self._env.rank))
                continue
            config.init_fn(weight)
            if self._is_replicated(config.name):
                dist.broadcast(weight.data, group=self._env.process_group, group_src=0)

    def create_context(self) -> CheckedContext:
        return CheckedContext()

    def input_dist(self, ctx: CheckedContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        """Send ids to the ranks that own their rows; the bag sizes for mean pooling stay on this rank.

        An invalid batch is reported by ``compute`` or ``compute_and_output_dist``, on every rank.
        """
        features, ctx.check_result = self._checker.check(maybe_td_to_kjt(features, None))
        sent = super().input_dist(ctx, features)
        for index, input_dist in enumerate(self._input_dists):
            if isinstance(input_dist, UniqueRowsInputDist):
                ctx.sharding_contexts[index] = UniqueRowsContext(
                    batch_size_per_feature_pre_a2a=ctx.sharding_contexts[index].batch_size_per_feature_pre_a2a,
                    routing=input_dist.routing,
                )
        if self._mean_keys:
            ctx.divisor = bag_sizes(features, self._mean_keys)
        return sent

    def _create_input_dist(self, input_feature_names: list[str]) -> None:
        super()._create_input_dist(input_feature_names)
        for sharding, input_dist in zip(self._embedding_shardings, self._input_dists, strict=True):
            if not isinstance(input_dist, UniqueRowsInputDist):  # which does it itself
                orders = [self._order_of_key[key] for key in sharding.embedding_names()]
                look_up_stored(input_dist, orders, self._device or torch.device("cpu"))

    def compute(self, ctx: CheckedContext, dist_input: KJTList) -> list[torch.Tensor]:
        """Look up the rows of W1.

        Raises:
            ValueError: some rank's batch is invalid (see ``batch_agreement``); raised on every rank.
        """
        _raise_input_error(ctx)
        return super().compute(ctx, self._located(ctx, dist_input))

    def compute_and_output_dist(self, ctx: CheckedContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """Look up the rows of W1, then exchange and project them as each table's exchange requires.

        Returns:
            KeyedTensor with values ``(b, sum of d)``.

        Raises:
            ValueError: some rank's batch is invalid (see ``batch_agreement``); raised on every rank.
        """
        _raise_input_error(ctx)
        self._combine_weights()
        return self._project_when_ready(ctx, super().compute_and_output_dist(ctx, self._located(ctx, input)))

    def output_dist(self, ctx: CheckedContext, output: list[torch.Tensor]) -> LazyAwaitable[KeyedTensor]:
        """Exchange and project the lookups' output as each table's exchange requires: values ``(b, sum of d)``."""
        self._combine_weights()
        return self._project_when_ready(ctx, super().output_dist(ctx, output))

    def defer_gradients(self) -> dict[torch.Tensor, float]:
        """Leave it to the caller to combine the gradients of replicated parameters over ranks.

        By default the module does so itself inside backward. A trainer that all-reduces one buffer of all gradients
        of its model can include these and save collectives. It may be called again.

        Returns:
            W2 and the rows of data_parallel tables, with the factor of a rank's gradient in the sum over all ranks. A
            rank's gradient of W2 may be None, which counts as zero.
        """
        self._gradients_deferred = True
        for index, lookup in enumerate(self._lookups):
            if isinstance(lookup, DistributedDataParallel):
                self._lookups[index] = lookup.module
        factors = gradient_factors(list(self.projections), self._projected_before, self._env.process_group)
        weights = projection_weights(self.projections)
        mean = 1 / dist.get_world_size(self._env.process_group)
        found = {weights[name]: factor for name, factor in factors.items()}
        return found | dict.fromkeys(self._replicated_rows(), mean)

    def move_rows(self, optimizer: torch.optim.Optimizer | None = None) -> int:
        """Count a step, and move rows of adaptive tables whose pass is due; call it after each optimizer step.

        No batch may be between its lookup and its backward then, as in TorchRec's semi-synchronous pipeline: its
        gradients would change the rows that have the slots after the move.

        Args:
            optimizer: steps the rows that have no fused kernel, which are those with Adam on a CPU; their state moves
                with them. It may have other parameters, too.

        Returns:
            The number of this rank's rows that moved.

        Raises:
            ValueError: there are such rows, and ``optimizer`` does not step them; or the optimizer of the rows is none
                of SGD, Adagrad, RowWiseAdagrad and Adam.
        """
        return 0 if self.adaptive_tables is None else self.adaptive_tables.move_rows(optimizer)

    def _located(self, ctx: CheckedContext, dist_input: KJTList) -> KJTList:
        if self.adaptive_tables is None:
            return dist_input
        return locate_rows(self._input_dists, ctx.sharding_contexts, dist_input)

    @staticmethod
    def _pre_load_state_dict_hook(
        self: "ShardedMultiLayerEmbeddingBagCollection", state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # Check here: TorchRec cuts a full tensor to the shard's columns, which would hide a tensor that is too wide.
        check_loaded_shapes(self._row_tables, state_dict, prefix)
        if self.adaptive_tables is not None:
            self.adaptive_tables.take_state(state_dict, prefix)
        ShardedEmbeddingBagCollection._pre_load_state_dict_hook(self, state_dict, prefix, *args)

    def _build_checker(self, tables: list[MultiLayerEmbeddingBagConfig], *, codes_exchanged: bool) -> BatchChecker:
        # If batches have the order of the lookups, TorchRec need not permute them. It does if a feature occurs twice.
        served = [feature for sharding in self._embedding_shardings for feature in sharding.feature_names()]
        limits = smallest_tables(tables)
        if len(set(served)) == len(served):
            limits = {feature: limits[feature] for feature in served}
        device = self._device or torch.device("cpu")
        remedy = "" if tables[0].pooling == PoolingType.NONE else "; use 'after'"
        refused = [
            (table, f"exchange {exchange!r} does not support{remedy}")
            for table, exchange in self._exchanges.items()
            if exchange != "after"
        ] + [
            (table, "a data_parallel table does not support on a CPU")
            for table in self.module_sharding_plan
            if self._is_replicated(table) and device.type == "cpu"
        ]
        return BatchChecker(
            limits,
            self._is_weighted,
            self._env.process_group,
            device,
            refused[0] if refused else None,
            codes_exchanged=codes_exchanged,
        )

    def _project_when_ready(
        self, ctx: CheckedContext, pooled: LazyAwaitable[KeyedTensor]
    ) -> LazyAwaitable[KeyedTensor]:
        sizes, weights = ctx.divisor, self._combined_weights

        def finish(summed: KeyedTensor) -> KeyedTensor:
            projected = project(summed, by_key(weights, self._projection_of_key_after))
            return projected if sizes is None else normalize_by_bag_size(projected, self._mean_keys, sizes)

        pooled.callbacks.append(finish)
        return pooled

    def _replicated_rows(self) -> list[torch.Tensor]:
        return [self.embedding_bags[name].weight for name in self.module_sharding_plan if self._is_replicated(name)]

    def _is_replicated(self, table: str) -> bool:
        return self.module_sharding_plan[table].sharding_type == ShardingType.DATA_PARALLEL.value

    def _combine_weights(self) -> None:
        # Called once per forward pass, for all exchanges together, so that backward has a single all-reduce.
        weights = projection_weights(self.projections)
        if self._gradients_deferred:
            self._combined_weights = dict(weights)
            return
        self._combined_weights = with_combined_gradients(weights, self._projected_before, self._env.process_group)

    def _projections_of(self, tables: Sequence[str]) -> dict[str, torch.Tensor]:
        return {table: self._combined_weights[table] for table in tables if table in self._combined_weights}

    @classmethod
    def create_grouped_sharding_infos(
        cls, module: EmbeddingBagCollection, *args: Any, **kwargs: Any
    ) -> dict[str, list[EmbeddingShardingInfo]]:
        """Split TorchRec's groups by sharding type further by exchange."""
        grouped: dict[str, list[EmbeddingShardingInfo]] = defaultdict(list)
        for sharding_type, infos in super().create_grouped_sharding_infos(module, *args, **kwargs).items():
            for info in infos:
                table, served = info.embedding_config, module.served[info.embedding_config.name]
                table.feature_names = [each.feature for each in served]
                table.embedding_names = [each.key for each in served]
                exchange = module.exchanges.get(table.name, "after")
                if exchange == "after":
                    grouped[sharding_type].append(info)
                    continue
                adaptive = module.slots is not None and module.segments[table.name][0].index is not None
                values = {field.name: getattr(info, field.name) for field in fields(EmbeddingShardingInfo)}
                grouped[f"{sharding_type} {exchange}{' adaptive' if adaptive else ''}"].append(
                    ExchangedShardingInfo(
                        **values,
                        exchange=exchange,
                        exchanged_dim=module.exchanged_dims[table.name],
                        expected_rows=module.expected_rows.get(table.name, 0.0),
                        segments=module.segments[table.name],
                        served=served,
                        slots=module.slots if adaptive else None,
                    )
                )
        return grouped

    @classmethod
    def create_embedding_bag_sharding(
        cls,
        sharding_infos: list[EmbeddingShardingInfo],
        env: ShardingEnv,
        device: torch.device | None = None,
        permute_embeddings: bool = False,
        qcomm_codecs_registry: dict[str, QuantizedCommCodecs] | None = None,
    ) -> EmbeddingSharding:
        """Build the sharding of one group from its sharding type and exchange."""
        first = sharding_infos[0]
        exchange = first.exchange if isinstance(first, ExchangedShardingInfo) else "after"
        kind = cls.shardings.get((first.param_sharding.sharding_type, exchange))
        if kind is None:
            return super().create_embedding_bag_sharding(
                sharding_infos, env, device, permute_embeddings, qcomm_codecs_registry
            )
        return kind(sharding_infos, env, device, qcomm_codecs_registry=qcomm_codecs_registry)


def _add_slots(module: "ShardedMultiLayerEmbeddingBagCollection", state: dict[str, Any], prefix: str, _: Any) -> None:
    if module.adaptive_tables is not None:
        module.adaptive_tables.add_state(state, prefix, module._env.process_group)


def _served_features(
    tables: Sequence[MultiLayerEmbeddingBagConfig], row_tables: Sequence[MultiLayerEmbeddingBagConfig]
) -> dict[str, tuple[ServedFeature, ...]]:
    """Return the features of each of ``row_tables``; those of a table with row ranges are in one of its pools."""
    found: dict[str, tuple[ServedFeature, ...]] = {table.name: () for table in row_tables}
    pool_of = {segment.table: table.name for table in reversed(row_tables) for segment in segments_of([table])}
    for table, keys in zip(tables, get_embedding_names_by_table(list(tables)), strict=True):
        found[pool_of[table.name]] += tuple(
            ServedFeature(feature, key, table.name, table.num_embeddings)
            for feature, key in zip(table.feature_names, keys, strict=True)
        )
    return found


def _raise_input_error(ctx: CheckedContext) -> None:
    if ctx.check_result is not None:
        ctx.check_result.raise_input_error()
