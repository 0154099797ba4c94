"""The rows of tables that a split looks up, and models whose tables hold these alone."""

import dataclasses
from collections.abc import Mapping

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.models.spec import ModelSpec

_BUFFERED = 1 << 22  # ids per table that are collected before duplicates are removed


def with_rows(spec: ModelSpec, rows: Mapping[str, int]) -> ModelSpec:
    """Return the spec of a model whose tables have this number of rows, and one row at least."""
    return dataclasses.replace(
        spec,
        sparse=tuple(dataclasses.replace(each, num_embeddings=max(1, rows[each.table_name])) for each in spec.sparse),
        row_ranges={},
        adaptive={},
    )


def padded(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows, or one of zeros if there are none: TorchRec has no empty tables."""
    return rows if len(rows) else rows.new_zeros(1, rows.shape[1])


class SeenRows:
    """Collects the distinct ids of each table batch by batch, in memory proportional to their number.

    Args:
        table_of: the table of each feature.
    """

    def __init__(self, table_of: Mapping[str, str]) -> None:
        self._table_of = table_of
        self._ids: dict[str, list[torch.Tensor]] = {name: [] for name in table_of.values()}
        self._buffered = dict.fromkeys(self._ids, 0)

    def add(self, bags: KeyedJaggedTensor) -> None:
        """Add the ids of a batch."""
        for feature, ids in by_feature(bags).items():
            name = self._table_of[feature]
            self._ids[name].append(ids.unique())
            self._buffered[name] += len(self._ids[name][-1])
            if self._buffered[name] > _BUFFERED:
                self._ids[name] = [torch.cat(self._ids[name]).unique()]
                self._buffered[name] = 0

    def rows(self) -> dict[str, torch.Tensor]:
        """Return the distinct ids by table, ascending int64."""
        none = torch.empty(0, dtype=torch.int64)
        return {name: torch.cat([none, *ids]).unique() for name, ids in self._ids.items()}


def renumber(bags: KeyedJaggedTensor, rows: Mapping[str, torch.Tensor]) -> KeyedJaggedTensor:
    """Return the bags for tables that contain only the ``rows`` of each feature: ids become positions among them."""
    values = [torch.searchsorted(rows[name], ids) for name, ids in by_feature(bags).items()]
    return KeyedJaggedTensor(
        bags.keys(), torch.cat(values), bags.weights_or_none(), bags.lengths(), stride=bags.stride()
    )


def by_feature(bags: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
    """Return the ids of each feature."""
    ends = bags.offset_per_key()
    return {name: bags.values()[ends[i] : ends[i + 1]] for i, name in enumerate(bags.keys())}
