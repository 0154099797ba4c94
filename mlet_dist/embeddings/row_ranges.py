"""Row ranges: tables whose frequent rows are wider than their rare rows (mixed dimensions, arXiv:1909.11810).

A table is cut into ranges of consecutive rows, each with its own width and its own W2 ``(width, d)``. A range whose
width is d is stored as it is, without W2, and the rows of a range of width 0 are not stored: they read zero, or the row
before them, which they share. Where ids are sorted by descending frequency, the first ranges hold the frequent rows.

All rows of one width, of all tables, are stored in one table, a *pool*, so that the lookup takes one kernel per width
rather than one per range, and ranges of a few rows can be spread over many ranks. A range is a segment of its pool.

Each range has a W2 of its own, so that the initial values of all rows have the same scale whatever their width: with
W2 drawn from N(0, 1/width), a row keeps its scale on average. A W2 that all ranges shared would need a gain for each.
"""

from collections.abc import Sequence

import torch
from torchrec.modules.embedding_configs import DataType, PoolingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from mlet_dist.embeddings.initializers import RowInitializer, StoredRowInitializer
from mlet_dist.embeddings.row_moves import AdaptiveRows
from mlet_dist.embeddings.row_order import RowOrder
from mlet_dist.embeddings.slot_initializer import SlotInitializer
from mlet_dist.embeddings.slot_layout import SlotLayout
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig, Segment, row_initializer


def tables_of_rows(
    tables: Sequence[MultiLayerEmbeddingBagConfig], seed: int, adaptive: AdaptiveRows | None = None
) -> list[MultiLayerEmbeddingBagConfig]:
    """Return the tables that store the rows of ``tables``: those without ranges as they are, and then the pools.

    A pool is named ``rows_<width>x<d>``, with ``_fp16`` if its rows are in half precision. Its features,
    ``<feature>@<table>:<range>``, hold the ids of one range, counted from the first row of the pool.

    Args:
        tables: their configs.
        seed: determines the initial values.
        adaptive: given if rows of tables with ranges move between pools (``slot_layout``).

    Raises:
        ValueError: a name occurs twice, a table with ranges has an ``init_fn``, or adaptive tables do not fit together
            (``SlotLayout.of``).
    """
    own = [table.name for table in tables]
    twice = next((name for name in own if own.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"table {twice!r}: {own.count(twice)} tables have this name; give each a name of its own")
    plain = [table for table in tables if table.row_ranges is None]
    ranged = [table for table in tables if table.row_ranges is not None]
    shapes = {
        (width, table.embedding_dim, table.data_type)
        for table in ranged
        for _, width, _ in table.row_ranges or ()
        if width
    }
    names = [table.name for table in plain] + [f"{t.name}:{i}" for t in ranged for i in range(len(t.row_ranges or ()))]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"table {twice!r}: is also the name of a row range of another table; choose another")
    ordered = sorted(shapes, key=lambda shape: (-shape[0], -shape[1], shape[2].name))
    if adaptive is not None and adaptive.chunk_width is not None and ranged:
        pools = [_pool_of_chunks(ranged, adaptive.chunk_width)]
    else:
        pools = [_pool(ranged, seed, *shape) for shape in ordered]
    if adaptive is not None and ranged:
        _add_slots(pools, ranged, seed, adaptive.chunk_width)
    taken = next((pool.name for pool in pools if pool.name in names), None)
    if taken is not None:
        raise ValueError(f"table {taken!r}: is also the name of a pool of row ranges; choose another")
    return plain + pools


def _pool(
    tables: Sequence[MultiLayerEmbeddingBagConfig], seed: int, width: int, embedding_dim: int, data_type: DataType
) -> MultiLayerEmbeddingBagConfig:
    segments: list[Segment] = []
    initializers: list[RowInitializer] = []
    offset = 0
    for table in tables:
        first_row = 0
        for index, (rows, of_range, share) in enumerate(table.row_ranges or ()):
            if (of_range, table.embedding_dim, table.data_type) == (width, embedding_dim, data_type):
                shared_by = _shared_by(table, index)
                segments.append(
                    Segment(table.name, index, first_row, rows, offset, tuple(table.feature_names), share, shared_by)
                )
                initializers.append(_initializer(table, index, first_row, rows, seed))
                offset += rows
            first_row += rows
    return MultiLayerEmbeddingBagConfig(
        name=f"rows_{width}x{embedding_dim}{'_fp16' if data_type == DataType.FP16 else ''}",
        num_embeddings=offset,
        embedding_dim=embedding_dim,
        hidden_dim=None if width == embedding_dim else width,
        feature_names=[f"{feature}@{segment.name}" for segment in segments for feature in segment.features],
        data_type=data_type,
        init_fn=StoredRowInitializer(RowOrder(tuple(each.rows for each in segments)), tuple(initializers)),
        segments=tuple(segments),
    )


def _shared_by(table: MultiLayerEmbeddingBagConfig, index: int) -> int:
    """Return the ids of the next range, if they read the last row of range ``index``."""
    ranges = table.row_ranges or ()
    is_shared = table.shared_row and index == len(ranges) - 2 and not ranges[-1].width
    return ranges[-1].rows if is_shared else 0


def _pool_of_chunks(tables: Sequence[MultiLayerEmbeddingBagConfig], width: int) -> MultiLayerEmbeddingBagConfig:
    """Return the pool of the chunks of all tables, whose segments are all rows' first chunks, second chunks, …"""
    layout = SlotLayout.of(tables, width)
    segments = []
    for part, ranges in enumerate(layout.initial_widths):
        table = tables[part % len(tables)]
        if not layout.permitted_widths[part]:
            continue
        stored = [of_range for of_range, (_, columns) in zip(table.row_ranges or (), ranges, strict=True) if columns]
        rows, share = sum(each.rows for each in stored), sum(each.share for each in stored)
        segments.append(Segment(table.name, part // len(tables), 0, max(rows, 1), 0, tuple(table.feature_names), share))
    return MultiLayerEmbeddingBagConfig(
        name=f"chunks_{width}x{tables[0].embedding_dim}",
        num_embeddings=sum(each.rows for each in segments),
        embedding_dim=tables[0].embedding_dim,
        hidden_dim=width,
        feature_names=[f"{feature}@{segment.name}" for segment in segments for feature in segment.features],
        segments=tuple(segments),
    )


def _add_slots(
    pools: Sequence[MultiLayerEmbeddingBagConfig],
    tables: Sequence[MultiLayerEmbeddingBagConfig],
    seed: int,
    chunk_width: int | None,
) -> None:
    """Change pools to those of adaptive tables, in place: buckets of slots, which begin as the rows that are there."""
    layout = SlotLayout.of(tables, chunk_width)
    first_rows = zip(tables, layout.first_rows().tolist(), strict=False)  # of the first chunk
    zero_rows = tuple(row for table, row in first_rows if table.zero_first_row)
    pools[0].moving_rows = layout.num_rows * layout.num_chunks
    for index, pool in enumerate(pools):
        pool.num_embeddings, pool.num_buckets = layout.slots(index), layout.num_buckets
        initializers = tuple(
            row_initializer(table, pool.name, pool.num_embeddings, seed, zero_first_row=False) for table in tables
        )
        pool.init_fn = SlotInitializer(layout, index, initializers, zero_rows)


def _initializer(
    table: MultiLayerEmbeddingBagConfig, index: int, first_row: int, rows: int, seed: int
) -> RowInitializer:
    if table.init_fn is not None:
        raise ValueError(f"table {table.name!r}: row ranges cannot go with an init_fn")
    zero = table.zero_first_row and first_row == 0
    return row_initializer(table, f"{table.name}:{index}", rows, seed, zero_first_row=zero)


def segments_of(tables: Sequence[MultiLayerEmbeddingBagConfig]) -> list[Segment]:
    """Return the segments of ``tables_of_rows``, table by table; a table without ranges is a segment of itself."""
    return [
        segment
        for table in tables
        for segment in (
            table.segments or (Segment(table.name, None, 0, table.num_embeddings, 0, tuple(table.feature_names)),)
        )
    ]


def split_by_range(
    features: KeyedJaggedTensor,
    tables: Sequence[MultiLayerEmbeddingBagConfig],
    stored: Sequence[MultiLayerEmbeddingBagConfig],
) -> KeyedJaggedTensor:
    """Return a batch with the features of ``stored``, the ``tables_of_rows`` of ``tables``; ids lie inside those."""
    parts = features.to_dict()
    selected = {
        feature: (parts[feature].values(), parts[feature].lengths(), parts[feature].weights_or_none())
        for table in tables
        if table.row_ranges is None
        for feature in table.feature_names
    }
    for segment in [segment for table in stored for segment in table.segments]:
        for feature in segment.features:
            ids, sizes, weights = parts[feature].values(), parts[feature].lengths(), parts[feature].weights_or_none()
            last = segment.first_row + segment.rows - 1
            inside = (ids >= segment.first_row) & (ids <= last + segment.shared_by)
            bag = torch.repeat_interleave(torch.arange(sizes.numel(), device=sizes.device), sizes)
            selected[f"{feature}@{segment.name}"] = (
                ids[inside].clamp(max=last) - segment.first_row + segment.offset,
                torch.bincount(bag[inside], minlength=sizes.numel()).to(sizes.dtype),
                None if weights is None else weights[inside],
            )
    values, lengths, of_ids = zip(*selected.values(), strict=True)
    return KeyedJaggedTensor(
        list(selected),
        torch.cat(values),
        None if of_ids[0] is None else torch.cat(of_ids),
        torch.cat(lengths),
        stride=features.stride(),
    )


def join_ranges(
    vectors: KeyedTensor,
    features: KeyedJaggedTensor,
    tables: Sequence[MultiLayerEmbeddingBagConfig],
    stored: Sequence[MultiLayerEmbeddingBagConfig],
) -> KeyedTensor:
    """Return the vectors of ``tables`` from those of their ranges, which are added up, and divided for mean pooling.

    Args:
        vectors: KeyedTensor with values ``(B, sum of d)`` of ``stored``.
        features: the batch before it was split.
        tables: the tables, with and without ranges.
        stored: their ``tables_of_rows``.
    """
    found = vectors.to_dict()
    keys_of = dict(zip([table.name for table in stored], get_embedding_names_by_table(list(stored)), strict=True))
    keys: list[str] = []
    values: list[torch.Tensor] = []
    for table, names in zip(tables, get_embedding_names_by_table(list(tables)), strict=True):
        keys += names
        if table.row_ranges is None:
            values += [found[key] for key in keys_of[table.name]]
            continue
        indices = [index for index, each in enumerate(table.row_ranges) if each.width]
        for feature in table.feature_names:
            total = torch.stack([found[f"{feature}@{table.name}:{index}"] for index in indices]).sum(dim=0)
            if table.pooling == PoolingType.MEAN:
                total = total / _bag_sizes(features, feature).unsqueeze(1)
            values.append(total)
    widths = [value.shape[1] for value in values]
    return KeyedTensor(keys=keys, length_per_key=widths, values=torch.cat(values, dim=1), key_dim=1)


def _bag_sizes(features: KeyedJaggedTensor, feature: str) -> torch.Tensor:
    """Return the divisors of mean pooling ``(B,)``: bag sizes, or sums of weights; 1 where that is 0."""
    part = features[feature]
    weights, lengths = part.weights_or_none(), part.lengths()
    sizes = lengths.float()
    if weights is not None:
        bag = torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)
        sizes = torch.zeros_like(sizes).index_add_(0, bag, weights.float())
    return torch.where(sizes == 0, torch.ones_like(sizes), sizes)
