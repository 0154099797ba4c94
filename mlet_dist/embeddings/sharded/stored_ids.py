"""From ids to stored rows (``row_order``) ahead of TorchRec's exchanges; ``unique_rows`` does it in its row index."""

from collections.abc import Sequence

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, _pin_and_move

from mlet_dist.embeddings.input_check import with_values
from mlet_dist.embeddings.row_order import RowOrder, stored_rows


class StoredIds:
    """Turns the ids of the features of one sharding into the stored rows of their tables.

    Args:
        orders: that of the table of each feature, in the order of the features.
        device: of the ids.
    """

    def __init__(self, orders: Sequence[RowOrder], device: torch.device) -> None:
        distinct = list(dict.fromkeys(orders))
        self._first_stored = torch.cat([order.first_stored for order in distinct]).to(device)
        self._order_of_feature = torch.tensor([distinct.index(order) for order in orders], device=device)

    def __call__(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Return the batch with stored rows in the place of ids, which lie inside their tables."""
        ids = features.values()
        if features.variable_stride_per_key():
            counts = _pin_and_move(torch.tensor(features.length_per_key()), ids.device)
        else:
            counts = features.lengths().view(len(self._order_of_feature), -1).sum(dim=1)
        order = torch.repeat_interleave(self._order_of_feature, counts, output_size=ids.numel())
        return with_values(features, stored_rows(self._first_stored, ids.long(), order))


def look_up_stored(input_dist: nn.Module, orders: Sequence[RowOrder], device: torch.device) -> None:
    """Make the input dist of a sharding send stored rows in the place of ids."""
    stored_ids = StoredIds(orders, device)

    def replace(_: nn.Module, args: tuple[KeyedJaggedTensor, ...]) -> tuple[KeyedJaggedTensor, ...]:
        return (stored_ids(args[0]), *args[1:])

    input_dist.register_forward_pre_hook(replace)
