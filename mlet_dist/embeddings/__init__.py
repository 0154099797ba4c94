"""Multi-layer embedding tables for TorchRec. This package can be used alone, with any model and trainer.

Modules:

- ``collection``: the unsharded module, a drop-in for TorchRec's EmbeddingBagCollection.
- ``sequence_collection``: that of rows that are not pooled, a drop-in for TorchRec's EmbeddingCollection.
- ``multi_layer_tables``: what the two share.
- ``table_config``: the configs of tables; ``row_ranges``: tables whose rows have different widths.
- ``slot_layout``, ``slot_initializer``, ``row_moves``: tables whose rows change their width while they train.
- ``projection``: the second layer W2 and its application to pooled vectors or to rows.
- ``initializers``: initial values that depend on seed, table and row only.
- ``row_order``: the order in which rows are stored, with which ranks own equal shares of the frequent ids.
- ``collapse``: the product W1·W2 in blocks of rows.
- ``factors``: the reverse, exact factors W1 and W2 of an existing table.
- ``adam``: row-wise lazy Adam, and the step count of fbgemm's fused Adam.
- ``input_check``: checks of a batch before its lookup.
- ``sharded``: the sharded module, its sharder and its exchanges.
- ``planning``: TorchRec's planner with cost estimates for multi-layer tables.
"""

from mlet_dist.embeddings.adam import LazyAdam, StepCountingOptimizer
from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.planning.planner import multi_layer_planner
from mlet_dist.embeddings.row_moves import AdaptiveRows
from mlet_dist.embeddings.sequence_collection import MultiLayerEmbeddingCollection
from mlet_dist.embeddings.sharded.module import ShardedMultiLayerEmbeddingBagCollection
from mlet_dist.embeddings.sharded.sequence_module import ShardedMultiLayerEmbeddingCollection
from mlet_dist.embeddings.sharded.sharder import (
    MultiLayerEmbeddingBagCollectionSharder,
    MultiLayerEmbeddingCollectionSharder,
)
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig, MultiLayerEmbeddingConfig

__all__ = [
    "AdaptiveRows",
    "LazyAdam",
    "MultiLayerEmbeddingBagCollection",
    "MultiLayerEmbeddingBagCollectionSharder",
    "MultiLayerEmbeddingBagConfig",
    "MultiLayerEmbeddingCollection",
    "MultiLayerEmbeddingCollectionSharder",
    "MultiLayerEmbeddingConfig",
    "ShardedMultiLayerEmbeddingBagCollection",
    "ShardedMultiLayerEmbeddingCollection",
    "StepCountingOptimizer",
    "multi_layer_planner",
]
