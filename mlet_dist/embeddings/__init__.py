"""Multi-layer embedding tables on TorchRec: usable alone, with your own model and trainer."""

from mlet_dist.embeddings.adam import LazyAdam, StepCountingOptimizer
from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.planning.planner import multi_layer_planner
from mlet_dist.embeddings.sharded.module import ShardedMultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.sharded.sharder import MultiLayerEmbeddingBagCollectionSharder

__all__ = [
    "LazyAdam",
    "MultiLayerEmbeddingBagCollection",
    "MultiLayerEmbeddingBagCollectionSharder",
    "MultiLayerEmbeddingBagConfig",
    "ShardedMultiLayerEmbeddingBagCollection",
    "StepCountingOptimizer",
    "multi_layer_planner",
]
