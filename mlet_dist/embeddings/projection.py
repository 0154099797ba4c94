"""The second layer of a multi-layer table: W2 ``(k, d)``, and its application to pooled vectors or to rows.

The products of several tables are batched where their k and d are equal.

Pooled vectors and rows come from a lookup, and nobody else needs them. So backward may write their gradients in their
place (``_SavedVectors``), which saves memory and is faster: a table's vectors are in the cache then. Backward of these
products cannot be differentiated.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torchrec.distributed.utils import none_throws
from torchrec.sparse.jagged_tensor import KeyedTensor, _pin_and_move

from mlet_dist.embeddings.initializers import OrthogonalInitializer, ProjectionInit, RowInitializer

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
    outputs: list[torch.Tensor] = []
    output_widths: list[int] = []
    positions = range(len(keys))
    for shape, group in groupby(positions, key=lambda i: weights[keys[i]].shape if keys[i] in weights else None):
        run = list(group)
        block = values[:, offsets[run[0]] : offsets[run[-1] + 1]]
        if shape is None:
            outputs.append(block)
            output_widths += [widths[i] for i in run]
        else:
            outputs.append(_project_run(block, [weights[keys[i]] for i in run]))
            output_widths += [shape[1]] * len(run)
    return KeyedTensor(
        keys=keys,
        length_per_key=output_widths,
        values=outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1),
        key_dim=1,
    )


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
    dtype = _product_dtype(rows)
    narrow, narrow_weights = rows.to(dtype), weights.to(dtype)
    padded = len(counts) * max(counts)
    if rows.is_cuda and padded <= _MAX_PADDING_FACTOR * rows.shape[0]:
        return _project_padded(narrow, counts, narrow_weights).to(rows.dtype)
    return _ProjectedRows.apply(narrow, counts, narrow_weights).to(rows.dtype)


def _product_dtype(rows: torch.Tensor) -> torch.dtype:
    """Return the dtype in which autocast, if it is enabled, computes products; it leaves custom functions alone."""
    device = rows.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rows.dtype


def project_tables(
    rows: torch.Tensor,
    counts: Sequence[int],
    widths: Sequence[int],
    weights: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """Apply each table's W2 to its rows, whose widths may differ: ``(sum of U_t·k_t,)`` -> ``(U, d)``.

    Args:
        rows: rows of T tables, concatenated table by table.
        counts: the number of rows of each table; their sum is U.
        widths: k of each table.
        weights: W2 ``(k, d)`` of each table; None for a single-layer table, whose rows have d columns already.
    """
    runs = [
        (width, projected, list(group))
        for (width, projected), group in groupby(
            range(len(counts)), key=lambda table: (widths[table], weights[table] is not None)
        )
    ]
    vectors = []
    parts = split_flat(rows, [width * sum(counts[table] for table in run) for width, _, run in runs])
    for part, (width, projected, run) in zip(parts, runs, strict=True):
        block = part.view(-1, width)
        if projected:
            stacked = torch.stack([weights[table] for table in run])  # type: ignore[misc]
            block = project_rows(block, [counts[table] for table in run], stacked)
        vectors.append(block)
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def split_flat(values: torch.Tensor, sizes: Sequence[int]) -> Sequence[torch.Tensor]:
    """Split ``(n,)`` into parts of these sizes, whose sum is n, without a copy of the gradient if there is one part.

    The backward of a slice would make a tensor of all n values for each part, and that of ``split`` one for all.
    """
    return [values] if len(sizes) == 1 else values.split(list(sizes))


class _ProjectedRows(torch.autograd.Function):
    """One product per table, written into the output; on a CPU this is faster than padding for a batched product."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, counts: Sequence[int], weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weights)
        ctx.saved_rows, ctx.counts = _SavedVectors(rows), list(counts)
        projected = rows.new_empty(rows.shape[0], weights.shape[2])
        for into, part, weight in zip(projected.split(ctx.counts), rows.split(ctx.counts), weights, strict=True):
            torch.mm(part, weight, out=into)
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        rows, of_rows = ctx.saved_rows.take(needs_gradient=ctx.needs_input_grad[0])
        of_weights = torch.empty_like(weights) if ctx.needs_input_grad[2] else None
        above = gradient.split(ctx.counts)
        if of_weights is not None:
            for part, of_part, of_weight in zip(rows.split(ctx.counts), above, of_weights, strict=True):
                torch.mm(part.t(), of_part, out=of_weight)
        if of_rows is not None:
            for into, of_part, weight in zip(of_rows.split(ctx.counts), above, weights, strict=True):
                torch.mm(of_part, weight.t(), out=into)
        return of_rows, None, of_weights


class _SavedVectors:
    """Vectors that are saved for backward, which may write their gradient in their place.

    It does not if they share their memory with a leaf tensor, or if backward may run again (``retain_graph``). Unlike
    ``save_for_backward``, this also works if backward has overwritten another part of the tensor of which they are one.

    Args:
        vectors: an input of a ``torch.autograd.Function``.
    """

    def __init__(self, vectors: torch.Tensor) -> None:
        base = vectors if vectors._base is None else vectors._base
        self._vectors: torch.Tensor | None = vectors.detach()
        # Writing nothing would still count as a modification of the other parts.
        self._is_writable = not base.is_leaf and vectors.numel() > 0
        self._version = vectors._version if vectors.numel() == base.numel() > 0 else None

    def take(self, *, needs_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the vectors, and where to write their gradient, if it is needed.

        Raises:
            RuntimeError: the vectors were modified after forward.
        """
        vectors = none_throws(self._vectors)
        if self._version not in (None, vectors._version):
            raise RuntimeError(
                "vectors to which a W2 was applied have been modified by an inplace operation, or by the backward of "
                "another W2 that was applied to them; apply it to a clone"
            )
        # As torch's AOTAutograd, which frees saved tensors early if the graph is not kept.
        is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
        if not is_kept:
            self._vectors = None
        if not needs_gradient:
            return vectors, None
        return vectors, vectors if self._is_writable and not is_kept else torch.empty_like(vectors)


def _project_padded(rows: torch.Tensor, counts: Sequence[int], weights: torch.Tensor) -> torch.Tensor:
    """Compute one batched product over tables padded to the longest, to avoid a kernel launch per table."""
    (tables, width), longest = weights.shape[:2], max(counts)
    sizes = _pin_and_move(torch.tensor(counts), rows.device)
    table = torch.repeat_interleave(sizes, output_size=rows.shape[0])
    slot = table * longest + torch.arange(rows.shape[0], device=rows.device) - (sizes.cumsum(0) - sizes)[table]
    padded = rows.new_zeros(tables * longest, width).index_copy(0, slot, rows)
    products = torch.bmm(padded.view(tables, longest, width), weights)
    return products.flatten(0, 1).index_select(0, slot)


def _project_run(block: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """``(B, G·k)`` and G weights ``(k, d)`` -> ``(B, G·d)``."""
    stacked = torch.stack(list(weights))
    if torch.compiler.is_compiling() or block.shape[0] < FEW_ROWS:
        products = torch.bmm(_by_table(block, len(weights)), stacked).transpose(0, 1)
        return products.reshape(block.shape[0], len(weights) * stacked.shape[2]).to(block.dtype)
    dtype = _product_dtype(block)
    # Autocast lowers the precision; ranks without a projection would then exchange a different dtype.
    return _ProjectedBlock.apply(block.to(dtype), stacked.to(dtype)).to(block.dtype)


class _ProjectedBlock(torch.autograd.Function):
    """One batched product of G tables that lie side by side; its results are written side by side, too."""

    @staticmethod
    def forward(ctx: Any, block: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weights)
        ctx.saved_block = _SavedVectors(block)
        groups, _, embedding_dim = weights.shape
        projected = block.new_empty(block.shape[0], groups * embedding_dim)
        torch.bmm(_by_table(block, groups), weights, out=_by_table(projected, groups))
        return projected

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (weights,) = ctx.saved_tensors
        groups = weights.shape[0]
        block, of_block = ctx.saved_block.take(needs_gradient=ctx.needs_input_grad[0])
        above, of_weights = _by_table(gradient, groups), None
        if ctx.needs_input_grad[1]:
            of_weights = torch.bmm(_by_table(block, groups).transpose(1, 2), above)
        if of_block is not None:
            torch.bmm(above, weights.transpose(1, 2), out=_by_table(of_block, groups))
        return of_block, of_weights


def _by_table(block: torch.Tensor, groups: int) -> torch.Tensor:
    """``(B, G·width)`` -> ``(G, B, width)``, without a copy."""
    return block.view(block.shape[0], groups, block.shape[1] // groups).transpose(0, 1)
