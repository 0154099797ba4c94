"""Multi-layer embedding tables on TorchRec: usable alone, with your own model and trainer."""

from mlet_dist.embeddings.lazy_adam import LazyAdam, keep_gradients_dense
from mlet_dist.embeddings.multi_layer import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.sharding import (
    MultiLayerEmbeddingBagCollectionSharder,
    ShardedMultiLayerEmbeddingBagCollection,
)

__all__ = [
    "LazyAdam",
    "MultiLayerEmbeddingBagCollection",
    "MultiLayerEmbeddingBagCollectionSharder",
    "MultiLayerEmbeddingBagConfig",
    "ShardedMultiLayerEmbeddingBagCollection",
    "keep_gradients_dense",
]
