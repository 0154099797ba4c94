"""Is a batch fit for the tables? Checked at home; what one rank finds, all ranks raise, at the same point.

A rank that raised alone would leave the others waiting in a collective. So a rank with a bad batch goes on with a
harmless one through the same collectives as the others, and all of them raise once they agree, before any output is
exchanged: the process group stays usable.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

SmallestTables = Mapping[str, tuple[str, int]]
"""Feature -> the smallest of its tables and that table's number of rows, which the feature's ids must stay below."""

_NAMES_SHOWN = 8


class _Kind(IntEnum):
    OUTSIDE = 0
    MISSING = 1
    WEIGHTS = 2
    VARYING = 3
    MALFORMED = 4


@dataclass(frozen=True)
class _Mistake:
    kind: _Kind
    feature: int
    text: str


def smallest_tables(tables: Sequence[EmbeddingBagConfig]) -> dict[str, tuple[str, int]]:
    """The limit of each feature, in the order of the tables."""
    found: dict[str, tuple[str, int]] = {}
    for table in tables:
        for feature in table.feature_names:
            if feature not in found or table.num_embeddings < found[feature][1]:
                found[feature] = (table.name, table.num_embeddings)
    return found


def check_batch(features: KeyedJaggedTensor, tables: SmallestTables, is_weighted: bool) -> None:
    """Look for mistakes in a batch that one process serves alone.

    Raises:
        ValueError: a feature is missing, an id lies outside its table, weights are there or not against
            ``is_weighted``, or lengths, ids and weights do not fit one another.
    """
    mistake = _structural_mistake(features, tables, is_weighted)
    if mistake is None:
        needed = _select(features, list(tables))
        rows = torch.tensor([limit for _, limit in tables.values()], device=features.device())
        if bool(_outside(needed, rows).any()):
            mistake = _first_outside(needed, tables)
    if mistake is not None:
        raise ValueError(mistake.text)


def _structural_mistake(features: KeyedJaggedTensor, tables: SmallestTables, is_weighted: bool) -> _Mistake | None:
    """What is wrong with a batch whatever its ids are, known without waiting for a device."""
    keys, first = features.keys(), next(iter(tables.values()))[0]
    present = set(keys)
    for index, (feature, (table, _)) in enumerate(tables.items()):
        if feature not in present:
            text = f"table {table!r}: feature {feature!r} is missing from the batch, which has {_shortened(keys)}"
            return _Mistake(_Kind.MISSING, index, text)
    weights = features.weights_or_none()
    if (weights is not None) != is_weighted:
        return _Mistake(_Kind.WEIGHTS, 0, _weights_text(first, is_weighted))
    misfit = _misfit(features)
    return None if misfit is None else _Mistake(_Kind.MALFORMED, 0, f"table {first!r}: the batch {misfit}")


def _misfit(features: KeyedJaggedTensor) -> str | None:
    keys, values, weights = features.keys(), features.values(), features.weights_or_none()
    if len(set(keys)) < len(keys):
        return "has a feature twice"
    if values.is_floating_point():
        return f"has ids of {values.dtype}, which are to be integers"
    if weights is not None and weights.numel() != values.numel():
        return f"has {weights.numel()} weights for {values.numel()} ids"
    if not values.is_cuda:  # a device is not waited for
        offsets = features.offsets_or_none()
        if bool((features.lengths() < 0).any()) or (offsets is not None and offsets.numel() and int(offsets[0])):
            return "has negative lengths, or offsets that do not rise from 0"
    bags, expected = features.lengths().numel(), sum(features.stride_per_key())
    if bags != expected:
        return f"has {bags} lengths for {expected} bags"
    if sum(features.length_per_key()) != values.numel() or min(features.length_per_key()) < 0:
        return f"has lengths of {sum(features.length_per_key())} ids in all, and {values.numel()} ids"
    if features.variable_stride_per_key() and features.inverse_indices_or_none() is None:
        return "varies in size by feature and has no inverse_indices"
    return None


def _weights_text(table: str, is_weighted: bool) -> str:
    if is_weighted:
        return f"table {table!r}: the batch has no weights, and the collection is weighted"
    return f"table {table!r}: the batch has weights, and the collection is not weighted"


def _shortened(keys: Sequence[str]) -> str:
    shown = ", ".join(repr(key) for key in keys[:_NAMES_SHOWN])
    more = f" and {len(keys) - _NAMES_SHOWN} more" if len(keys) > _NAMES_SHOWN else ""
    return f"{shown}{more}" if keys else "none"


def _select(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """The features ``names`` in this order. TorchRec itself takes every batch to be in the order of the first."""
    keys = features.keys()
    if keys == names:
        return features
    position = {key: index for index, key in enumerate(keys)}
    selected = features.permute([position[name] for name in names])
    inverse = features.inverse_indices_or_none()
    if inverse is None:
        return selected
    row = {key: index for index, key in enumerate(inverse[0])}
    return _with_values(selected, selected.values(), (names, inverse[1][[row[name] for name in names]]))


def _of_common_types(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """int64 ids and lengths and float32 weights: collectives fail where ranks have different ones."""
    weights = features.weights_or_none()
    found = (features.values().dtype, features.lengths().dtype, torch.float32 if weights is None else weights.dtype)
    return features if found == (torch.int64, torch.int64, torch.float32) else _with_values(features, features.values())


def _with_values(
    features: KeyedJaggedTensor, values: torch.Tensor, inverse: tuple[list[str], torch.Tensor] | None = None
) -> KeyedJaggedTensor:
    varying, weights = features.variable_stride_per_key(), features.weights_or_none()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=values.long(),
        weights=None if weights is None else weights.float(),
        lengths=features.lengths().long(),
        stride=None if varying else features.stride(),
        stride_per_key_per_rank=torch.tensor(features.stride_per_key_per_rank()) if varying else None,
        length_per_key=features.length_per_key(),
        inverse_indices=inverse or features.inverse_indices_or_none(),
    )


def _outside(features: KeyedJaggedTensor, rows: torch.Tensor) -> torch.Tensor:
    """Which ids lie outside their tables; ``rows`` holds the limit of each feature."""
    values, counts = features.values(), features.length_per_key()
    if not values.numel():
        return torch.zeros(0, dtype=torch.bool, device=values.device)
    if min(counts) == max(counts):
        values, limits = values.view(len(counts), -1), rows.unsqueeze(1)
    else:
        limits = torch.repeat_interleave(rows, torch.tensor(counts, device=rows.device), output_size=values.numel())
    return ((values < 0) | (values >= limits)).view(-1)


def _first_outside(features: KeyedJaggedTensor, tables: SmallestTables) -> _Mistake | None:
    """The first id of the batch that lies outside its table; waits for the device."""
    keys = features.keys()
    rows = torch.tensor([tables[name][1] for name in keys], device=features.values().device)
    positions = _outside(features, rows).nonzero()
    if not positions.numel():
        return None
    position = int(positions[0])
    index = bisect_right(list(accumulate(features.length_per_key())), position)
    name = keys[index]
    table, limit = tables[name]
    value = int(features.values()[position])
    return _Mistake(_Kind.OUTSIDE, index, f"table {table!r}: feature {name!r}: id {value} is outside [0, {limit})")
