"""Multi-layer embedding tables on TorchRec: usable alone, with your own model and trainer."""

from mlet_dist.embeddings.multi_layer import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.sharding import (
    MultiLayerEmbeddingBagCollectionSharder,
    ShardedMultiLayerEmbeddingBagCollection,
)

__all__ = [
    "MultiLayerEmbeddingBagCollection",
    "MultiLayerEmbeddingBagCollectionSharder",
    "MultiLayerEmbeddingBagConfig",
    "ShardedMultiLayerEmbeddingBagCollection",
]
