"""The rows of the tables that some batches look up: all that predictions on them depend on."""

from collections.abc import Mapping, Sequence

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_BUFFERED = 1 << 22  # ids of a table, before duplicates are dropped


class SeenRows:
    """Distinct ids by feature, gathered batch by batch in memory for the distinct ones."""

    def __init__(self, features: Sequence[str]) -> None:
        self._ids: dict[str, list[torch.Tensor]] = {name: [] for name in features}
        self._buffered = dict.fromkeys(features, 0)

    def add(self, bags: KeyedJaggedTensor) -> None:
        """Count the ids of a batch in."""
        for name, ids in _by_feature(bags).items():
            self._ids[name].append(ids.unique())
            self._buffered[name] += len(self._ids[name][-1])
            if self._buffered[name] > _BUFFERED:
                self._ids[name] = [torch.cat(self._ids[name]).unique()]
                self._buffered[name] = 0

    def rows(self) -> dict[str, torch.Tensor]:
        """By feature, ascending int64."""
        none = torch.empty(0, dtype=torch.int64)
        return {name: torch.cat([none, *ids]).unique() for name, ids in self._ids.items()}


def renumber(bags: KeyedJaggedTensor, rows: Mapping[str, torch.Tensor]) -> KeyedJaggedTensor:
    """The same bags for tables that hold ``rows`` alone: each id becomes its position among them."""
    values = [torch.searchsorted(rows[name], ids) for name, ids in _by_feature(bags).items()]
    return KeyedJaggedTensor(
        bags.keys(), torch.cat(values), bags.weights_or_none(), bags.lengths(), stride=bags.stride()
    )


def _by_feature(bags: KeyedJaggedTensor) -> dict[str, torch.Tensor]:
    ends = bags.offset_per_key()
    return {name: bags.values()[ends[i] : ends[i + 1]] for i, name in enumerate(bags.keys())}
