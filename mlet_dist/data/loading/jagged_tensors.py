"""The KeyedJaggedTensor of a batch, built from decoded rows without a loop over rows."""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.data.loading.rows import Rows, SingleValued


class JaggedBuilder:
    """Builds KeyedJaggedTensors with ``size`` bags per feature; bags beyond the given rows are empty.

    Args:
        keys: the features, in order.
        size: stride of the result.
        weighted: whether any feature has weights. The ids of the others then have weight 1, since a KeyedJaggedTensor
            has weights for all of its ids or for none.
    """

    def __init__(self, keys: Sequence[str], size: int, *, weighted: bool) -> None:
        self._keys, self._size, self._weighted = list(keys), size, weighted
        # Lengths and offsets of a full batch with one id per bag, shared by all such batches; never written to.
        self._full_lengths = torch.ones(len(keys) * size, dtype=torch.int64)
        self._full_offsets = torch.arange(len(keys) * size + 1)

    def build(self, rows: Rows) -> KeyedJaggedTensor:
        """Return the rows as a KeyedJaggedTensor: values and lengths int64, weights float32 or None."""
        if len(rows) == self._size and all(isinstance(column, SingleValued) for column in rows.sparse):
            counts, lengths, offsets = [self._size] * len(self._keys), self._full_lengths, self._full_offsets
        else:
            counts, lengths = self._lengths(rows)
            offsets = None
        ends = [0, *accumulate(counts)]
        values = np.empty(ends[-1], dtype=np.int64)
        weights = np.ones(ends[-1], dtype=np.float32) if self._weighted else None
        feature = 0
        for column in rows.sparse:
            start = ends[feature]
            if isinstance(column, SingleValued):
                features = column.ids.shape[1]
                feature += features
                values[start : ends[feature]].reshape(features, -1)[:] = column.ids.T
            else:
                feature += 1
                values[start : ends[feature]] = column.in_range(column.ids)
                if weights is not None and column.weights is not None:
                    weights[start : ends[feature]] = column.in_range(column.weights)
        return KeyedJaggedTensor(
            keys=self._keys,
            values=torch.from_numpy(values),
            weights=None if weights is None else torch.from_numpy(weights),
            lengths=lengths,
            offsets=offsets,
            stride=self._size,
            # TorchRec would otherwise compute these from the lengths, with a copy from the device to the host.
            length_per_key=counts,
            offset_per_key=ends,
        )

    def _lengths(self, rows: Rows) -> tuple[list[int], torch.Tensor]:
        """Return each feature's number of ids, and the lengths of all bags: (keys · size,) int64."""
        lengths = np.zeros((len(self._keys), self._size), dtype=np.int64)
        feature = 0
        for column in rows.sparse:
            if isinstance(column, SingleValued):
                features = column.ids.shape[1]
                lengths[feature : feature + features, : len(rows)] = 1
                feature += features
            else:
                lengths[feature, : len(rows)] = np.diff(column.offsets)
                feature += 1
        return lengths.sum(axis=1).tolist(), torch.from_numpy(lengths).flatten()
