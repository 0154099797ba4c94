"""Checks of a batch against the tables, on the rank that has the batch, before any id leaves it.

``check_batch`` checks the batch of an unsharded module. A sharded module uses the functions below through
``sharded.batch_agreement``, which makes all ranks raise the same error.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import accumulate

import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, _pin_and_move

SmallestTables = Mapping[str, tuple[str, int]]
"""The smallest table of each feature and its num_embeddings, below which the feature's ids must stay."""

_MAX_NAMES_SHOWN = 8


class ErrorKind(IntEnum):
    """What is wrong with a batch; ranks exchange it as a number."""

    OUTSIDE = 0
    MISSING = 1
    WEIGHTS = 2
    VARYING = 3
    MALFORMED = 4


@dataclass(frozen=True)
class InputError:
    """An error in a batch: its kind, the index of the feature, and the message."""

    kind: ErrorKind
    feature: int
    text: str


def smallest_tables(tables: Sequence[EmbeddingBagConfig]) -> dict[str, tuple[str, int]]:
    """Return the smallest table of each feature and its num_embeddings, in the order of the tables."""
    found: dict[str, tuple[str, int]] = {}
    for table in tables:
        for feature in table.feature_names:
            if feature not in found or table.num_embeddings < found[feature][1]:
                found[feature] = (table.name, table.num_embeddings)
    return found


def check_batch(features: KeyedJaggedTensor, tables: SmallestTables, is_weighted: bool) -> None:
    """Check a batch of an unsharded module.

    Raises:
        ValueError: a feature is missing, an id is outside its table, the batch has weights although ``is_weighted`` is
            false or lacks them although it is true, or lengths, ids and weights are inconsistent.
    """
    error = find_structural_error(features, tables, is_weighted)
    if error is None:
        needed = select_features(features, list(tables))
        rows = torch.tensor([limit for _, limit in tables.values()], device=features.device())
        if bool(outside_ids(needed, rows).any()):
            error = find_outside_id(needed, tables)
    if error is not None:
        raise ValueError(error.text)


def find_structural_error(features: KeyedJaggedTensor, tables: SmallestTables, is_weighted: bool) -> InputError | None:
    """Find an error that does not depend on the ids; does not wait for a device."""
    keys, first = features.keys(), next(iter(tables.values()))[0]
    present = set(keys)
    for index, (feature, (table, _)) in enumerate(tables.items()):
        if feature not in present:
            text = f"table {table!r}: feature {feature!r} is missing from the batch, which has {_format_names(keys)}"
            return InputError(ErrorKind.MISSING, index, text)
    weights = features.weights_or_none()
    if (weights is not None) != is_weighted:
        return InputError(ErrorKind.WEIGHTS, 0, weights_message(first, is_weighted))
    reason = _find_inconsistency(features)
    return None if reason is None else InputError(ErrorKind.MALFORMED, 0, f"table {first!r}: the batch {reason}")


def _find_inconsistency(features: KeyedJaggedTensor) -> str | None:
    keys, values, weights = features.keys(), features.values(), features.weights_or_none()
    if len(set(keys)) < len(keys):
        return "has a feature twice"
    if values.is_floating_point():
        return f"has ids of {values.dtype}; ids must be integers"
    if weights is not None and weights.numel() != values.numel():
        return f"has {weights.numel()} weights for {values.numel()} ids"
    if not values.is_cuda:  # on CUDA this would wait for the device
        offsets = features.offsets_or_none()
        if bool((features.lengths() < 0).any()) or (offsets is not None and offsets.numel() and int(offsets[0])):
            return "has negative lengths, or offsets that do not increase from 0"
    bags, expected = features.lengths().numel(), sum(features.stride_per_key())
    if bags != expected:
        return f"has {bags} lengths for {expected} bags"
    if sum(features.length_per_key()) != values.numel() or min(features.length_per_key()) < 0:
        return f"has lengths of {sum(features.length_per_key())} ids in total, but {values.numel()} ids"
    if features.variable_stride_per_key() and features.inverse_indices_or_none() is None:
        return "has a batch size that varies by feature, but no inverse_indices"
    return None


def weights_message(table: str, is_weighted: bool) -> str:
    """Return the message for a batch whose weights are missing or unexpected."""
    if is_weighted:
        return f"table {table!r}: the batch has no weights, but the collection is weighted"
    return f"table {table!r}: the batch has weights, but the collection is not weighted"


def _format_names(keys: Sequence[str]) -> str:
    shown = ", ".join(repr(key) for key in keys[:_MAX_NAMES_SHOWN])
    more = f" and {len(keys) - _MAX_NAMES_SHOWN} more" if len(keys) > _MAX_NAMES_SHOWN else ""
    return f"{shown}{more}" if keys else "none"


def select_features(features: KeyedJaggedTensor, names: list[str]) -> KeyedJaggedTensor:
    """Return the features ``names`` in this order. TorchRec assumes that all batches have the order of the first."""
    keys = features.keys()
    if keys == names:
        return features
    position = {key: index for index, key in enumerate(keys)}
    selected = features.permute([position[name] for name in names])
    inverse = features.inverse_indices_or_none()
    if inverse is None:
        return selected
    row = {key: index for index, key in enumerate(inverse[0])}
    return with_values(selected, selected.values(), (names, inverse[1][[row[name] for name in names]]))


def with_common_dtypes(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Convert ids and lengths to int64 and weights to float32, because collectives need equal dtypes on all ranks."""
    weights = features.weights_or_none()
    found = (features.values().dtype, features.lengths().dtype, torch.float32 if weights is None else weights.dtype)
    return features if found == (torch.int64, torch.int64, torch.float32) else with_values(features, features.values())


def with_values(
    features: KeyedJaggedTensor, values: torch.Tensor, inverse: tuple[list[str], torch.Tensor] | None = None
) -> KeyedJaggedTensor:
    """Return the batch with the ids ``values``, in common dtypes, and with other inverse indices if given."""
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


def without_weights(features: KeyedJaggedTensor) -> KeyedJaggedTensor:
    """Return the batch without per-sample weights."""
    if features.weights_or_none() is None:
        return features
    varying = features.variable_stride_per_key()
    return KeyedJaggedTensor(
        keys=features.keys(),
        values=features.values(),
        lengths=features.lengths(),
        stride=None if varying else features.stride(),
        stride_per_key_per_rank=torch.tensor(features.stride_per_key_per_rank()) if varying else None,
        length_per_key=features.length_per_key_or_none(),
        inverse_indices=features.inverse_indices_or_none(),
    )


def outside_ids(features: KeyedJaggedTensor, rows: torch.Tensor) -> torch.Tensor:
    """Return a mask of the ids that are outside their tables; ``rows`` has the limit of each feature, ``(F,)``."""
    values, counts = features.values(), features.length_per_key()
    if not values.numel():
        return torch.zeros(0, dtype=torch.bool, device=values.device)
    if min(counts) == max(counts):
        values, limits = values.view(len(counts), -1), rows.unsqueeze(1)
    else:
        repeats = _pin_and_move(torch.tensor(counts), rows.device)
        limits = torch.repeat_interleave(rows, repeats, output_size=values.numel())
    return ((values < 0) | (values >= limits)).view(-1)


def find_outside_id(features: KeyedJaggedTensor, tables: SmallestTables) -> InputError | None:
    """Find the first id of the batch that is outside its table; waits for the device."""
    keys = features.keys()
    rows = torch.tensor([tables[name][1] for name in keys], device=features.values().device)
    positions = outside_ids(features, rows).nonzero()
    if not positions.numel():
        return None
    position = int(positions[0])
    index = bisect_right(list(accumulate(features.length_per_key())), position)
    name = keys[index]
    table, limit = tables[name]
    value = int(features.values()[position])
    text = f"table {table!r}: feature {name!r}: id {value} is outside [0, {limit})"
    return InputError(ErrorKind.OUTSIDE, index, text)
