"""The sharded module: TorchRec's sharded collection over W1, with W2 applied where each table's exchange says."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import distributed as dist
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

from mlet_dist.embeddings.collection import (
    MultiLayerEmbeddingBagCollection,
    MultiLayerEmbeddingBagConfig,
    build_projections,
    by_key,
    check_loaded_shapes,
    projection_weights,
    table_of_key,
)
from mlet_dist.embeddings.initializers import RowInitializer
from mlet_dist.embeddings.input_check import smallest_tables
from mlet_dist.embeddings.projection import project
from mlet_dist.embeddings.sharded.batch_agreement import BatchChecker, Verdict
from mlet_dist.embeddings.sharded.collectives import with_combined_gradients
from mlet_dist.embeddings.sharded.exchange_choice import Exchange
from mlet_dist.embeddings.sharded.placement import check_widths, first_row
from mlet_dist.embeddings.sharded.pooled import (
    AllToAllSharding,
    ExchangedShardingInfo,
    NodeReduceSharding,
    PaddedRowWiseSharding,
    PaddedTableRowWiseSharding,
    ProjectsBefore,
    ReduceScatterSharding,
)
from mlet_dist.embeddings.sharded.unique_rows import UniqueRowsContext, UniqueRowsInputDist, UniqueRowsSharding


@dataclass
class CheckedContext(EmbeddingBagCollectionContext):
    """TorchRec's per-batch context, with what the ranks found in the batch."""

    verdict: Verdict | None = None


class ShardedMultiLayerEmbeddingBagCollection(ShardedEmbeddingBagCollection):
    """TorchRec's sharded collection over the k-dimensional W1, with W2 where each table's exchange puts it.

    W1 is updated by the optimizer fused into backward. W2 is an ordinary parameter of every rank, for an optimizer
    of yours: wherever it is applied, backward leaves the gradient of the mean of the ranks' losses in ``grad``, as
    DDP does for the dense layers and TorchRec for W1.

    Initial values depend on seed, table and row only. A source module that is not on the meta device passes its
    values on instead.

    Rows with ``data_type`` FP16 are stored in half and looked up as float32; replicated ones stay float32.

    Raises:
        ValueError: a row's width is not a multiple of 4.
    """

    def __init__(
        self,
        module: MultiLayerEmbeddingBagCollection,
        table_name_to_parameter_sharding: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        exchanges: Mapping[str, Exchange] | None = None,
        expected_rows: Mapping[str, float] | None = None,
        **torchrec_arguments: Any,
    ) -> None:
        tables = module.embedding_bag_configs()
        rows = module.rows()
        rows.exchanges = dict(exchanges or {})
        rows.expected_rows = dict(expected_rows or {})
        rows.exchanged_dims = {table.name: table.embedding_dim for table in tables}
        rows.projected = {table.name for table in tables if table.hidden_dim is not None}
        check_widths(tables)
        for config in rows.embedding_bag_configs():
            # Replicated rows have a dense gradient and an optimizer of torch, which take the dtype of the weight.
            if table_name_to_parameter_sharding[config.name].sharding_type == ShardingType.DATA_PARALLEL.value:
                config.data_type = DataType.FP32
        super().__init__(
            module=rows,
            table_name_to_parameter_sharding=table_name_to_parameter_sharding,
            env=env,
            device=device,
            **torchrec_arguments,
        )
        self.projections = build_projections(tables, module.seed, device)
        self._tables = tables
        self._exchanges = rows.exchanges
        self._table_of_key_after = {
            key: table for key, table in table_of_key(tables).items() if self._exchanges.get(table, "after") == "after"
        }
        for output_dist in self._output_dists:
            if isinstance(output_dist, ProjectsBefore):
                output_dist.projections_of = self._projections_of
        self._checker = self._build_checker(tables)
        self._mean_keys = mean_keys(tables)
        self._projected_before = {table for table, exchange in self._exchanges.items() if exchange != "after"}
        self._applied: dict[str, torch.Tensor] = {}
        if not any(parameter.is_meta for parameter in module.parameters()):
            self.load_state_dict(module.state_dict())
        replicated = [
            self.embedding_bags[name].weight
            for name, sharding in self.module_sharding_plan.items()
            if sharding.sharding_type == ShardingType.DATA_PARALLEL.value
        ]
        for weight in (*self.projections.parameters(), *replicated):
            dist.broadcast(weight.data, group=env.process_group, group_src=0)

    def reset_parameters(self) -> None:
        """Draw this rank's rows of every W1 (TorchRec calls it once the shards are allocated)."""
        if self._device is not None and self._device.type == "meta":
            return
        for config in self._embedding_bag_configs:
            weight = self.embedding_bags[config.name].weight
            sharding = self.module_sharding_plan[config.name]
            if weight.numel() == 0:  # rows on other ranks alone
                continue
            if isinstance(config.init_fn, RowInitializer):
                config.init_fn.fill(weight, first_row(sharding, self._env.rank))
                continue
            config.init_fn(weight)
            if sharding.sharding_type == ShardingType.DATA_PARALLEL.value:
                dist.broadcast(weight.data, group=self._env.process_group, group_src=0)

    def create_context(self) -> CheckedContext:
        return CheckedContext()

    def input_dist(self, ctx: CheckedContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        """Send ids to the ranks that own their rows; what mean pooling divides by stays here.

        A mistake in the batch is raised by ``compute_and_output_dist``, on every rank.
        """
        features, ctx.verdict = self._checker.check(maybe_td_to_kjt(features, None))
        sent = super().input_dist(ctx, features)
        for index, ids_dist in enumerate(self._input_dists):
            if isinstance(ids_dist, UniqueRowsInputDist):
                ctx.sharding_contexts[index] = UniqueRowsContext(
                    batch_size_per_feature_pre_a2a=ctx.sharding_contexts[index].batch_size_per_feature_pre_a2a,
                    routing=ids_dist.routing,
                )
        if self._mean_keys:
            ctx.divisor = bag_sizes(features, self._mean_keys)
        return sent

    def compute(self, ctx: CheckedContext, dist_input: KJTList) -> list[torch.Tensor]:
        """Look up.

        Raises:
            ValueError: a rank found a mistake in its batch (``batch_check``); on every rank.
        """
        _raise_mistake(ctx)
        return super().compute(ctx, dist_input)

    def compute_and_output_dist(self, ctx: CheckedContext, input: KJTList) -> LazyAwaitable[KeyedTensor]:
        """Look up, exchange and project, in the order of each table's exchange: values ``(b, sum of d)``.

        Raises:
            ValueError: a rank found a mistake in its batch (``batch_check``); on every rank.
        """
        _raise_mistake(ctx)
        self._apply_weights()
        return self._project_when_ready(ctx, super().compute_and_output_dist(ctx, input))

    def output_dist(self, ctx: CheckedContext, output: list[torch.Tensor]) -> LazyAwaitable[KeyedTensor]:
        """Exchange and project, in the order of each table's exchange: values ``(b, sum of d)``."""
        self._apply_weights()
        return self._project_when_ready(ctx, super().output_dist(ctx, output))

    @staticmethod
    def _pre_load_state_dict_hook(
        self: "ShardedMultiLayerEmbeddingBagCollection", state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        # TorchRec cuts a whole tensor to the shard's columns, which hides that it has more of them.
        check_loaded_shapes(self._tables, state_dict, prefix)
        ShardedEmbeddingBagCollection._pre_load_state_dict_hook(self, state_dict, prefix, *args)

    def _build_checker(self, tables: list[MultiLayerEmbeddingBagConfig]) -> BatchChecker:
        # In the order of the lookups TorchRec need not sort each batch; it does where a feature stands there twice.
        served = [feature for sharding in self._embedding_shardings for feature in sharding.feature_names()]
        limits = smallest_tables(tables)
        if len(set(served)) == len(served):
            limits = {feature: limits[feature] for feature in served}
        device = self._device or torch.device("cpu")
        refused = [
            (table, f"exchange {exchange!r} cannot serve and 'after' can")
            for table, exchange in self._exchanges.items()
            if exchange != "after"
        ] + [
            (table, "a replicated table cannot serve on a CPU")
            for table, sharding in self.module_sharding_plan.items()
            if sharding.sharding_type == ShardingType.DATA_PARALLEL.value and device.type == "cpu"
        ]
        return BatchChecker(limits, self._is_weighted, self._env.process_group, device, refused[0] if refused else None)

    def _project_when_ready(
        self, ctx: CheckedContext, pooled: LazyAwaitable[KeyedTensor]
    ) -> LazyAwaitable[KeyedTensor]:
        sizes, applied = ctx.divisor, self._applied

        def finish(summed: KeyedTensor) -> KeyedTensor:
            projected = project(summed, by_key(applied, self._table_of_key_after))
            return projected if sizes is None else divide(projected, self._mean_keys, sizes)

        pooled.callbacks.append(finish)
        return pooled

    def _apply_weights(self) -> None:
        # Once a forward pass, whatever the exchanges are, so that backward has one all-reduce.
        weights = projection_weights(self.projections)
        self._applied = with_combined_gradients(weights, self._projected_before, self._env.process_group)

    def _projections_of(self, tables: Sequence[str]) -> dict[str, torch.Tensor]:
        return {table: self._applied[table] for table in tables if table in self._applied}

    @classmethod
    def create_grouped_sharding_infos(
        cls, module: EmbeddingBagCollection, *args: Any, **kwargs: Any
    ) -> dict[str, list[EmbeddingShardingInfo]]:
        """TorchRec's groups by sharding type, split by exchange."""
        grouped: dict[str, list[EmbeddingShardingInfo]] = defaultdict(list)
        for sharding_type, infos in super().create_grouped_sharding_infos(module, *args, **kwargs).items():
            for info in infos:
                table = info.embedding_config
                exchange = module.exchanges.get(table.name, "after")
                if exchange == "after":
                    grouped[sharding_type].append(info)
                    continue
                dim = module.exchanged_dims[table.name]
                # Unique rows of one collective have one k and d; the others take all tables at once.
                shape = ""
                if exchange == "unique_rows":
                    shape = f" {table.embedding_dim}x{dim}" if table.name in module.projected else f" {dim}"
                values = {field.name: getattr(info, field.name) for field in fields(EmbeddingShardingInfo)}
                grouped[f"{sharding_type} {exchange}{shape}"].append(
                    ExchangedShardingInfo(
                        **values,
                        exchange=exchange,
                        exchanged_dim=dim,
                        expected_rows=module.expected_rows.get(table.name, 0.0),
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
        """The sharding of one group, by its sharding type and exchange."""
        first = sharding_infos[0]
        exchange = first.exchange if isinstance(first, ExchangedShardingInfo) else "after"
        kind = _SHARDINGS.get((first.param_sharding.sharding_type, exchange))
        if kind is None:
            return super().create_embedding_bag_sharding(
                sharding_infos, env, device, permute_embeddings, qcomm_codecs_registry
            )
        return kind(sharding_infos, env, device, qcomm_codecs_registry=qcomm_codecs_registry)


# What is TorchRec's own is not here.
_SHARDINGS: dict[tuple[str, Exchange], Callable[..., EmbeddingSharding]] = {
    (ShardingType.ROW_WISE.value, "after"): PaddedRowWiseSharding,
    (ShardingType.ROW_WISE.value, "reduce_scatter"): ReduceScatterSharding,
    (ShardingType.ROW_WISE.value, "unique_rows"): UniqueRowsSharding,
    (ShardingType.TABLE_ROW_WISE.value, "after"): PaddedTableRowWiseSharding,
    (ShardingType.TABLE_ROW_WISE.value, "reduce_scatter"): NodeReduceSharding,
    (ShardingType.TABLE_WISE.value, "all_to_all"): AllToAllSharding,
}


def _raise_mistake(ctx: CheckedContext) -> None:
    if ctx.verdict is not None:
        ctx.verdict.raise_mistake()


def mean_keys(tables: list[MultiLayerEmbeddingBagConfig]) -> dict[str, str]:
    """The keys of the output KeyedTensor that are pooled by mean, and the feature of each."""
    return {
        key: feature
        for table, keys in zip(tables, get_embedding_names_by_table(tables), strict=True)
        if table.pooling == PoolingType.MEAN
        for key, feature in zip(keys, table.feature_names, strict=True)
    }


@torch.no_grad()
def bag_sizes(features: KeyedJaggedTensor, keys: Mapping[str, str]) -> torch.Tensor:
    """What mean pooling divides by, ``(len(keys), B)`` float32, 1 for an empty bag.

    As in TorchRec's row-wise sharding, a bag with per-sample weights is divided by their sum.
    """
    weights = features.weights_or_none()
    if weights is None:
        sizes = features.lengths().float()
    else:
        sizes = torch.ops.fbgemm.segment_sum_csr(1, features.offsets().int(), weights).float()
    of_feature = dict(zip(features.keys(), sizes.split(features.stride_per_key()), strict=True))
    if features.variable_stride_per_key():
        names, inverse = features.inverse_indices()
        of_feature = {name: of_feature[name][row] for name, row in zip(names, inverse, strict=True)}
    found = torch.stack([of_feature[feature] for feature in keys.values()])
    return torch.where(found == 0, torch.ones_like(found), found)


def divide(pooled: KeyedTensor, keys: Mapping[str, str], sizes: torch.Tensor) -> KeyedTensor:
    """Divide the vectors of ``keys`` by ``sizes`` ``(len(keys), B)``; the others stay as they are."""
    names, widths = pooled.keys(), pooled.length_per_key()
    row = {key: index for index, key in enumerate(keys)}
    parts = [
        part / sizes[row[name]].unsqueeze(1).to(part.dtype) if name in row else part
        for name, part in zip(names, pooled.values().split(widths, dim=1), strict=True)
    ]
    return KeyedTensor(keys=names, length_per_key=widths, values=torch.cat(parts, dim=1), key_dim=1)
