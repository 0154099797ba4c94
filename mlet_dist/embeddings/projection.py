"""The second layer of a multi-layer table: W2 ``(k, d)``, and its application to pooled vectors or to rows.

The products of several tables are batched where their k and d are equal.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby

import torch
from torch import nn
from torchrec.sparse.jagged_tensor import KeyedTensor, _pin_and_move

from mlet_dist.embeddings.initializers import OrthogonalInitializer, ProjectionInit, RowInitializer
from mlet_dist.embeddings.products import ColumnRun, ProjectedColumns, ProjectedRows, product_dtype

FEW_ROWS = 512
"""Products of fewer rows are faster on a CPU if they are computed table by table and then put side by side."""
# On CUDA rows are padded to one batched product if that makes at most this many times as many rows.
_MAX_PADDING_FACTOR = 4


class Projection(nn.Module):
    """W2 of one table: ``weight`` ``(k, d)`` float32, initialized from N(0, init_std^2), or orthogonal at that scale.

    Args:
        table: the table's name; with ``seed`` it determines the initial values.
        hidden_dim: k.
        embedding_dim: d.
        init_std: standard deviation of the initial values. The MLET paper uses 0.25; 1/sqrt(k) has unit gain.
        seed: the run's seed.
        device: device of the weight; ``meta`` allocates nothing.
        init: ``normal``, or ``orthogonal``: columns (rows, if k < d) that are orthogonal and equally long, and whose
            squares have the same sum as normal ones have on average. W2ᵀW2 is then k·init_std²·I exactly for k >= d.
    """

    def __init__(
        self,
        table: str,
        hidden_dim: int,
        embedding_dim: int,
        init_std: float,
        seed: int,
        device: torch.device | None = None,
        init: ProjectionInit = "normal",
    ) -> None:
        super().__init__()
        normal = RowInitializer(f"projections.{table}", hidden_dim, "normal", init_std, seed)
        self._initializer = OrthogonalInitializer(normal) if init == "orthogonal" else normal
        self.weight = nn.Parameter(torch.empty(hidden_dim, embedding_dim, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the initial values again; does nothing on the meta device."""
        if self.weight.device.type != "meta":
            self._initializer(self.weight)


def project(pooled: KeyedTensor, weights: Mapping[str, torch.Tensor]) -> KeyedTensor:
    """Apply each key's W2 to its pooled vectors: pool(W1[ids]) · W2.

    Neighboring keys with equal k and d share one batched product.

    Args:
        pooled: KeyedTensor with values ``(B, sum of k)``; a key without a W2 has its final width already.
        weights: W2 ``(k, d)`` by key. A key that is missing, that of a single-layer table, passes through unchanged.

    Returns:
        KeyedTensor with the same keys and values ``(B, sum of d)``.
    """
    if not weights:
        return pooled
    keys, widths, values = pooled.keys(), pooled.length_per_key(), pooled.values()
    offsets = pooled.offset_per_key()
    runs: list[ColumnRun] = []
    stacked: list[torch.Tensor | None] = []
    output_widths: list[int] = []
    width = 0
    positions = range(len(keys))
    for shape, group in groupby(positions, key=lambda i: weights[keys[i]].shape if keys[i] in weights else None):
        run = list(group)
        output_widths += [widths[i] if shape is None else shape[1] for i in run]
        first, width = width, sum(output_widths)
        runs.append(ColumnRun(slice(offsets[run[0]], offsets[run[-1] + 1]), slice(first, width), len(run)))
        stacked.append(None if shape is None else torch.stack([weights[keys[i]] for i in run]))
    if torch.compiler.is_compiling() or values.shape[0] < FEW_ROWS:
        blocks = [_project_block(values[:, run.columns], weight) for run, weight in zip(runs, stacked, strict=True)]
        projected = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)
    else:
        projected = ProjectedColumns.apply(values, runs, width, *stacked)
    return KeyedTensor(keys=keys, length_per_key=output_widths, values=projected, key_dim=1)


def _project_block(block: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """``(B, G·k)`` and weights ``(G, k, d)`` -> ``(B, G·d)``."""
    if weights is None:
        return block
    groups, hidden_dim, embedding_dim = weights.shape
    products = torch.bmm(block.reshape(-1, groups, hidden_dim).transpose(0, 1), weights)
    # Autocast lowers the precision; ranks without a projection would then exchange a different dtype.
    return products.transpose(0, 1).reshape(-1, groups * embedding_dim).to(block.dtype)


def project_columns(
    values: torch.Tensor, tables: Sequence[str], widths: Sequence[int], weights: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Apply W2 to the pooled sums of several features: ``(B, sum of k)`` -> ``(B, sum of d)``.

    All ranks must take part in the collective that combines W2's gradients. The result therefore depends on
    ``weights`` even if none of them belongs to ``tables``, so that backward reaches the collective on every rank.

    Args:
        values: sums of the features, side by side.
        tables: the table of each feature; a table may serve several features.
        widths: the columns of each feature.
        weights: W2 by table, for all multi-layer tables on any rank.
    """
    if weights and not set(tables) & weights.keys():
        no_columns = next(iter(weights.values()))[:1, :0]
        return torch.cat([values, no_columns.expand(values.shape[0], 0)], dim=1)
    keys = [str(index) for index in range(len(tables))]  # each feature's position serves as its key
    pooled = KeyedTensor(keys=keys, length_per_key=list(widths), values=values, key_dim=1)
    by_key = {key: weights[table] for key, table in zip(keys, tables, strict=True) if table in weights}
    return project(pooled, by_key).values()


def project_rows(rows: torch.Tensor, counts: Sequence[int], weights: torch.Tensor) -> torch.Tensor:
    """Apply each table's W2 to its rows: ``(U, k)`` -> ``(U, d)``.

    Args:
        rows: rows of T tables, concatenated table by table.
        counts: the number of rows of each table; their sum is U.
        weights: W2 of the tables, ``(T, k, d)``.
    """
    dtype = product_dtype(rows)
    narrow, narrow_weights = rows.to(dtype), weights.to(dtype)
    padded = len(counts) * max(counts)
    if rows.is_cuda and len(counts) > 1 and padded <= _MAX_PADDING_FACTOR * rows.shape[0]:
        return _project_padded(narrow, counts, narrow_weights).to(rows.dtype)
    parts = [part @ weight for part, weight in zip(narrow.split(list(counts)), narrow_weights, strict=True)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).to(rows.dtype)


def project_tables(
    rows: torch.Tensor,
    counts: Sequence[int],
    widths: Sequence[int],
    dims: Sequence[int],
    weights: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """Apply each table's W2 to its rows, whose widths may differ: ``(sum of U_t·k_t,)`` -> ``(U, d)`` for each d.

    Args:
        rows: rows of T tables, concatenated table by table.
        counts: the number of rows of each table; their sum is U.
        widths: k of each table.
        dims: d of each table, ascending.
        weights: W2 ``(k, d)`` of each table; None for a single-layer table, whose rows have d columns already.
    """
    if rows.is_cuda or all(weight is None for weight in weights):
        return _project_in_batches(rows, counts, widths, dims, weights)
    return list(ProjectedRows.apply(rows, counts, widths, dims, *weights))


def _project_in_batches(
    rows: torch.Tensor,
    counts: Sequence[int],
    widths: Sequence[int],
    dims: Sequence[int],
    weights: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """Do the same with one batched product for neighboring tables of the same k and d, as is best on CUDA."""
    runs = [
        (dim, width, projected, list(group))
        for (dim, width, projected), group in groupby(
            range(len(counts)), key=lambda table: (dims[table], widths[table], weights[table] is not None)
        )
    ]
    vectors: dict[int, list[torch.Tensor]] = {}
    parts = split_flat(rows, [width * sum(counts[table] for table in run) for _, width, _, run in runs])
    for part, (dim, width, projected, run) in zip(parts, runs, strict=True):
        block = part.view(-1, width)
        if projected:
            stacked = torch.stack([weights[table] for table in run])  # type: ignore[misc]
            block = project_rows(block, [counts[table] for table in run], stacked)
        vectors.setdefault(dim, []).append(block)
    return [each[0] if len(each) == 1 else torch.cat(each) for each in vectors.values()]


def split_flat(values: torch.Tensor, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    """Split ``(n,)`` into parts of these sizes, whose sum is n, without a copy of the gradient if there is one part.

    The backward of a slice would make a tensor of all n values for each part, and that of ``split`` one for all.
    """
    return [values] if len(sizes) == 1 else values.split(list(sizes))


def _project_padded(rows: torch.Tensor, counts: Sequence[int], weights: torch.Tensor) -> torch.Tensor:
    """Compute one batched product over tables padded to the longest, to avoid a kernel launch per table."""
    (tables, width), longest = weights.shape[:2], max(counts)
    sizes = _pin_and_move(torch.tensor(counts), rows.device)
    table = torch.repeat_interleave(sizes, output_size=rows.shape[0])
    slot = table * longest + torch.arange(rows.shape[0], device=rows.device) - (sizes.cumsum(0) - sizes)[table]
    padded = rows.new_zeros(tables * longest, width).index_copy(0, slot, rows)
    products = torch.bmm(padded.view(tables, longest, width), weights)
    return products.flatten(0, 1).index_select(0, slot)
