"""Multi-layer embedding tables on TorchRec: usable alone, with your own model and trainer."""

from mlet_dist.embeddings.lazy_adam import LazyAdam
from mlet_dist.embeddings.multi_layer import MultiLayerEmbeddingBagCollection, MultiLayerEmbeddingBagConfig
from mlet_dist.embeddings.planning import multi_layer_planner
from mlet_dist.embeddings.sharder import MultiLayerEmbeddingBagCollectionSharder
from mlet_dist.embeddings.sharding import ShardedMultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.step_count import StepCountingOptimizer

__all__ = [
    "LazyAdam",
    "MultiLayerEmbeddingBagCollection",
    "MultiLayerEmbeddingBagCollectionSharder",
    "MultiLayerEmbeddingBagConfig",
    "ShardedMultiLayerEmbeddingBagCollection",
    "StepCountingOptimizer",
    "multi_layer_planner",
]
