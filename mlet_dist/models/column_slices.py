"""The dense layers of a network at a smaller width: what is left of them where columns of all vectors are zero.

In the networks of ``model.name``, weights differ between d and r columns in dimensions that list the columns of one
vector after those of another: F·d inputs become F·r. In a query tower of ``two_tower`` the dense columns come before
them, and in an over arch the products come behind the one vector of the dense arch.
"""

import dataclasses

import torch

from mlet_dist.models.build import build_serving_model
from mlet_dist.models.spec import ModelSpec

Kept = tuple[torch.Tensor | None, ...]
"""For each dimension of a tensor the indices that are left, int64 ascending; None for all."""


def layer_slices(spec: ModelSpec, embedding_dim: int) -> dict[str, Kept]:
    """Return what is left of the dense layers at a smaller width, by state name, for those that lose something.

    Args:
        spec: the model; a network of ``model.name`` whose tables all have ``model.embedding_dim`` columns.
        embedding_dim: the smaller width.
    """
    d = spec.model.embedding_dim
    whole, narrow = layer_shapes(spec), layer_shapes(spec.with_embedding_dim(embedding_dim))
    found = {}
    for name, shape in whole.items():
        if shape != narrow[name]:
            first = len(spec.dense) if name.startswith("query_tower.") else 0
            found[name] = tuple(
                None if before == after else _kept(before, after, d, embedding_dim, first)
                for before, after in zip(shape, narrow[name], strict=True)
            )
    return found


def sliced(tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    """Return the values of a tensor that are left."""
    for dimension, indices in enumerate(kept):
        if indices is not None:
            tensor = tensor.index_select(dimension, indices)
    return tensor


def layer_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the layers beside the tables, whose numbers of rows do not matter."""
    sparse = tuple(dataclasses.replace(each, num_embeddings=1) for each in spec.sparse)
    small = dataclasses.replace(spec.with_hidden_dim(None), sparse=sparse, row_ranges={}, adaptive={})
    state = build_serving_model(small).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not name.startswith(spec.table_prefixes)}


def _kept(before: int, after: int, d: int, r: int, first: int) -> torch.Tensor:
    vectors = (before - after) // (d - r)
    of_vectors = torch.arange(vectors * d).view(vectors, d)[:, :r].flatten() + first
    behind = torch.arange(first + vectors * d, before)
    return torch.cat([torch.arange(first), of_vectors, behind])
