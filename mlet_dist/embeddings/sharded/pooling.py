"""Mean pooling at home: tables are summed over the network, and divided by their bags' sizes afterwards."""

from collections.abc import Mapping

import torch
from torchrec.modules.embedding_configs import PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagConfig


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
