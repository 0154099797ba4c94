"""The sharded module of sequences: the unique_rows exchange without pooling.

Checks, exchange, W2, fused optimizers and state dict are those of the sharded module of bags. Rows of data_parallel
tables are looked up in the same way: a rank requests them from itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torchrec.distributed.embedding_sharding import EmbeddingSharding
from torchrec.distributed.embedding_types import KJTList
from torchrec.distributed.types import Awaitable, LazyAwaitable, ShardingType
from torchrec.distributed.utils import none_throws
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor
from torchrec.sparse.tensor_dict import maybe_td_to_kjt

from mlet_dist.embeddings.input_check import without_weights
from mlet_dist.embeddings.sequence_collection import MultiLayerEmbeddingCollection
from mlet_dist.embeddings.sharded.exchange_choice import Exchange
from mlet_dist.embeddings.sharded.module import CheckedContext, ShardedMultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.sharded.row_index import Routing
from mlet_dist.embeddings.sharded.row_shardings import ReplicatedSequenceSharding, SequenceSharding

_OWN, _TORCHREC = "embeddings.", "embedding_bags."  # the names of W1 in the state dict, and in TorchRec's sharded bags


@dataclass
class SequenceContext(CheckedContext):
    """The context of a batch, with its ids if the output has them."""

    features: KeyedJaggedTensor | None = None

    def record_stream(self, stream: torch.Stream) -> None:
        super().record_stream(stream)
        if self.features is not None:
            self.features.record_stream(stream)


class ShardedMultiLayerEmbeddingCollection(ShardedMultiLayerEmbeddingBagCollection):
    """The sharded form of a MultiLayerEmbeddingCollection: row_wise with exchange unique_rows, or data_parallel.

    Each rank requests the distinct rows of its batch, their owner ranks look them up and project them, and vectors of d
    columns come back. W1 is ``embeddings.<table>.weight`` in the state dict.

    Args:
        module: the unsharded module.
        *arguments: positional arguments of ShardedMultiLayerEmbeddingBagCollection.
        **named: keyword arguments of it; ``exchanges`` says unique_rows for all tables.
    """

    shardings: ClassVar[Mapping[tuple[str, Exchange], Callable[..., EmbeddingSharding]]] = {
        (ShardingType.ROW_WISE.value, "unique_rows"): SequenceSharding,
        (ShardingType.DATA_PARALLEL.value, "unique_rows"): ReplicatedSequenceSharding,
    }

    def __init__(self, module: MultiLayerEmbeddingCollection, *arguments: Any, **named: Any) -> None:
        super().__init__(module, *arguments, **named)
        self._need_indices = module.need_indices()
        self._keys = [key for keys in module.embedding_names_by_table() for key in keys]
        self._feature_of_key = dict(
            zip(self._keys, (each for table in module.table_configs() for each in table.feature_names), strict=True)
        )
        for _, optimizer in self._optim.optimizers:
            optimizer.params = {
                _OWN + name.removeprefix(_TORCHREC): tensor for name, tensor in optimizer.params.items()
            }
        self._register_state_dict_hook(_rename_rows)

    @property
    def embedding_bags(self) -> nn.ModuleDict:
        """The modules that hold W1, by the name that TorchRec gives them in its sharded bags."""
        modules: nn.ModuleDict = self.embeddings
        return modules

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("embeddings" if name == "embedding_bags" else name, value)

    def create_context(self) -> SequenceContext:
        return SequenceContext()

    def input_dist(self, ctx: SequenceContext, features: KeyedJaggedTensor) -> Awaitable[Awaitable[KJTList]]:
        """Request the distinct rows of the batch from their owner ranks; per-sample weights are ignored."""
        features = without_weights(maybe_td_to_kjt(features, None))
        if self._need_indices:
            ctx.features = features
        return super().input_dist(ctx, features)

    def compute_and_output_dist(self, ctx: SequenceContext, input: KJTList) -> LazyAwaitable[dict[str, JaggedTensor]]:
        """Look up the distinct rows, project and exchange them.

        Returns:
            By feature, or ``feature@table`` for a feature of several tables, a JaggedTensor with values ``(N, d)``
            float32 for the N ids of this rank's batch, in their order.

        Raises:
            ValueError: some rank's batch is invalid (see ``batch_agreement``); raised on every rank.
        """
        return self.output_dist(ctx, self.compute(ctx, input))

    def output_dist(self, ctx: SequenceContext, output: list[torch.Tensor]) -> LazyAwaitable[dict[str, JaggedTensor]]:
        """Project and exchange the distinct rows: a JaggedTensor with values ``(N, d)`` for each feature."""
        self._combine_weights()
        contexts = ctx.sharding_contexts
        vectors = [
            output_dist(rows, context)
            for output_dist, rows, context in zip(self._output_dists, output, contexts, strict=True)
        ]
        ids = None if ctx.features is None else ctx.features.to_dict()
        return _Sequences(
            vectors,
            [none_throws(context.routing) for context in contexts],
            [sharding.embedding_names() for sharding in self._embedding_shardings],
            self._keys,
            {} if ids is None else {key: ids[feature].values() for key, feature in self._feature_of_key.items()},
        )

    @staticmethod
    def extend_shard_name(shard_name: str) -> str:
        return f"{_OWN}{shard_name}.weight"

    @property
    def unsharded_module_type(self) -> type[MultiLayerEmbeddingCollection]:
        return MultiLayerEmbeddingCollection

    @staticmethod
    def _pre_load_state_dict_hook(
        self: "ShardedMultiLayerEmbeddingCollection", state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        _rename(state_dict, prefix + _OWN, prefix + _TORCHREC)
        ShardedMultiLayerEmbeddingBagCollection._pre_load_state_dict_hook(self, state_dict, prefix, *args)
        _rename(state_dict, prefix + _TORCHREC, prefix + _OWN)


class _Sequences(LazyAwaitable[dict[str, JaggedTensor]]):
    """The output of a batch: JaggedTensors by key, once the vectors are there.

    Args:
        vectors: ``(N, d)`` of each sharding.
        routings: of each sharding.
        keys: of the features of each sharding.
        order: all keys in the order of the output.
        ids: by key, if the output has them as weights.
    """

    def __init__(
        self,
        vectors: Sequence[Awaitable[torch.Tensor]],
        routings: Sequence[Routing],
        keys: Sequence[Sequence[str]],
        order: Sequence[str],
        ids: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__()
        self._vectors, self._routings, self._keys, self._order, self._ids = vectors, routings, keys, order, ids

    def _wait_impl(self) -> dict[str, JaggedTensor]:
        found = {}
        for vectors, routing, keys in zip(self._vectors, self._routings, self._keys, strict=True):
            lengths = routing.lengths.view(len(keys), -1)
            parts = vectors.wait().split(routing.ids_per_feature)
            for key, part, of_key in zip(keys, parts, lengths, strict=True):
                found[key] = JaggedTensor(part, lengths=of_key, weights=self._ids.get(key))
        return {key: found[key] for key in self._order}


def _rename(state: dict[str, Any], old: str, new: str) -> None:
    for name in [each for each in state if each.startswith(old)]:
        state[new + name.removeprefix(old)] = state.pop(name)


def _rename_rows(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    _rename(state, prefix + _TORCHREC, prefix + _OWN)
