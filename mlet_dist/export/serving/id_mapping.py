"""From the ids of a data set to the rows of an output's tables; compatible with TorchScript and torch.export."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.export.served_layout import ServedLayout, ServedTable
from mlet_dist.models.spec import ModelSpec

_INT32_ROWS = 1 << 31


class KeptIds(nn.Module):
    """Numbers ids by the kept rows of their tables. Other ids get the number of the zero row: kernels see no −1.

    ``forward`` takes and returns a KeyedJaggedTensor of the features of a model, in order.

    Args:
        features: their names.
        tables: the table of each.
        kept_ids: the ids of kept rows ``(kept,)`` by state name, for tables that have any.
    """

    kept: torch.Tensor
    ids: torch.Tensor
    bases: torch.Tensor
    starts: torch.Tensor

    def __init__(
        self, features: Sequence[str], tables: Sequence[ServedTable], kept_ids: Mapping[str, torch.Tensor]
    ) -> None:
        super().__init__()
        self.features = list(features)
        # The ids of all tables are in one ascending tensor, those of each above those of the tables before it.
        names = list(dict.fromkeys(table.kept_ids for table in tables if table.kept_ids is not None))
        sizes = {table.kept_ids: table.num_embeddings for table in tables if table.kept_ids is not None}
        base_of: dict[str | None, tuple[int, int]] = {None: (-1, 0)}
        base, start = 0, 0
        for name in names:
            base_of[name] = base, start
            base, start = base + sizes[name], start + len(kept_ids[name])
        ids = torch.cat(
            [torch.empty(0, dtype=torch.int64), *(kept_ids[name].long() + base_of[name][0] for name in names)]
        )
        self.searched = bool(names)
        self.register_buffer("kept", torch.tensor([table.kept for table in tables]))
        self.register_buffer("ids", ids.int() if base < _INT32_ROWS else ids)
        self.register_buffer("bases", torch.tensor([base_of[table.kept_ids][0] for table in tables]))
        self.register_buffer("starts", torch.tensor([base_of[table.kept_ids][1] for table in tables]))

    def forward(self, bags: KeyedJaggedTensor) -> KeyedJaggedTensor:
        ids, lengths = bags.values(), bags.lengths()
        counts = lengths.view(len(self.features), -1).sum(1)
        zero_row = torch.repeat_interleave(self.kept, counts, output_size=ids.size(0))
        rows = torch.minimum(ids, zero_row)
        if self.searched:
            base = torch.repeat_interleave(self.bases, counts, output_size=ids.size(0))
            start = torch.repeat_interleave(self.starts, counts, output_size=ids.size(0))
            wanted = (ids + base).to(self.ids.dtype)
            position = torch.searchsorted(self.ids, wanted).clamp(max=self.ids.size(0) - 1)
            found = torch.where(self.ids[position] == wanted, position - start, zero_row)
            rows = torch.where(base < 0, rows, found)
        return KeyedJaggedTensor(self.features, rows, bags.weights_or_none(), lengths)


class SplitIds(nn.Module):
    """Gives each part of a table the ids of its rows.

    ``forward`` takes a KeyedJaggedTensor of the features of a model, in order, with ids numbered as by ``KeptIds``. It
    returns one of the features ``<feature>@<part>``, table by table and part by part, with rows of the parts as ids.
    With mean pooling, an id's weight is one divided by the size of its bag, so that the sum over all parts is the mean.

    Args:
        spec: of the model.
        layout: of its tables.
    """

    firsts: torch.Tensor
    part_firsts: torch.Tensor
    keys_of: torch.Tensor
    bases: torch.Tensor
    is_mean: torch.Tensor

    def __init__(self, spec: ModelSpec, layout: ServedLayout) -> None:
        super().__init__()
        self.num_features = len(spec.sparse)
        self.keys = part_features(spec, layout)
        # As if the ids of a feature were above those of the features before it: one binary search finds all parts.
        firsts, part_firsts, keys_of, bases, base = list[int](), list[int](), list[int](), list[int](), 0
        for feature in spec.sparse:
            bases.append(base)
            parts = layout.tables[feature.table_name].parts
            for part in parts:
                firsts.append(base + part.first_row)
                part_firsts.append(part.first_row)
                keys_of.append(self.keys.index(f"{feature.name}@{part.name}"))
            base += sum(part.num_embeddings for part in parts)
        means = {table.name for table in spec.tables if table.takes_mean}
        self.has_mean = bool(means)
        self.register_buffer("firsts", torch.tensor(firsts))
        self.register_buffer("part_firsts", torch.tensor(part_firsts))
        self.register_buffer("keys_of", torch.tensor(keys_of))
        self.register_buffer("bases", torch.tensor(bases))
        self.register_buffer("is_mean", torch.tensor([feature.table_name in means for feature in spec.sparse]))

    def forward(self, bags: KeyedJaggedTensor) -> KeyedJaggedTensor:
        ids, weights = bags.values(), bags.weights_or_none()
        lengths = bags.lengths().view(self.num_features, -1)
        counts, rows, num_ids = lengths.sum(1), lengths.size(1), ids.size(0)
        base = torch.repeat_interleave(self.bases, counts, output_size=num_ids)
        part = torch.searchsorted(self.firsts, ids + base, right=True) - 1
        key = self.keys_of[part]
        row = torch.arange(rows, device=ids.device).repeat(self.num_features)
        row = torch.repeat_interleave(row, lengths.flatten(), output_size=num_ids)
        if self.has_mean:
            sizes = torch.where(self.is_mean.unsqueeze(1), lengths, torch.ones_like(lengths)).flatten()
            weights = 1 / torch.repeat_interleave(sizes, lengths.flatten(), output_size=num_ids).float()
        order = torch.argsort(key, stable=True)  # the ids of a part stay in the order of the rows
        split = torch.zeros(len(self.keys) * rows, dtype=torch.int64, device=ids.device)
        split = split.index_add(0, key * rows + row, torch.ones_like(key))
        return KeyedJaggedTensor(
            self.keys,
            (ids - self.part_firsts[part])[order],
            None if weights is None else weights[order],
            split,
        )


class MappedIds(nn.Module):
    """A model behind a mapping of its ids: ``(dense, KeyedJaggedTensor) -> logits (B, 1)``."""

    def __init__(self, mapping: nn.Module, logits: nn.Module) -> None:
        super().__init__()
        self.mapping, self.logits = mapping, logits

    def forward(self, dense: torch.Tensor, bags: KeyedJaggedTensor) -> torch.Tensor:
        logits: torch.Tensor = self.logits(dense, self.mapping(bags))
        return logits


def part_features(spec: ModelSpec, layout: ServedLayout) -> list[str]:
    """Return the features of all parts, in the order of TorchRec's collection of these."""
    return [
        f"{feature.name}@{part.name}"
        for table in spec.tables
        for part in layout.tables[table.name].parts
        for feature in table.features
    ]
