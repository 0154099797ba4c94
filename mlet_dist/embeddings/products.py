"""Products of vectors with the W2 of their tables, as autograd functions that write where vectors and results belong.

Pooled vectors and rows come from a lookup, and nobody else needs them. So backward writes their gradients in their
place (``_SavedVectors``), which saves memory and is faster: a table's vectors are in the cache then. Columns and rows
of single-layer tables are copied. Backward of these products cannot be differentiated.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torchrec.distributed.utils import none_throws


def product_dtype(vectors: torch.Tensor) -> torch.dtype:
    """Return the dtype in which autocast, if it is enabled, computes products; it leaves autograd functions alone."""
    device = vectors.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else vectors.dtype


class _SavedVectors:
    """Vectors that are saved for backward, which may write their gradient in their place.

    It does not if they share their memory with a leaf tensor, or if backward may run again (``retain_graph``).

    Args:
        vectors: an input of a ``torch.autograd.Function`` that is differentiated.
    """

    def __init__(self, vectors: torch.Tensor) -> None:
        base = vectors if vectors._base is None else vectors._base
        self._vectors: torch.Tensor | None = vectors.detach()
        self._is_writable = not base.is_leaf and not vectors.is_inference()
        # A part of a tensor has the version of the whole, which changes if another part is overwritten.
        is_whole = vectors.numel() == base.numel()
        self._version = vectors._version if is_whole and not vectors.is_inference() else None

    def take(self, *, needs_gradient: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the vectors, and where to write their gradient, if it is needed.

        Raises:
            RuntimeError: the vectors, if they are a whole tensor, were modified after forward.
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


@dataclass(frozen=True)
class ColumnRun:
    """Neighboring tables with the same k and d, or without W2: their columns in the vectors and in the result."""

    columns: slice
    result: slice
    tables: int


class ProjectedColumns(torch.autograd.Function):
    """Pooled vectors ``(B, sum of k)`` -> ``(B, sum of d)``, with one batched product for each run of tables.

    Args:
        vectors: with the columns of all tables side by side.
        runs: which columns they are.
        width: of the result.
        weights: for each run W2 of its G tables, ``(G, k, d)``; None if they have none.
    """

    @staticmethod
    def forward(
        ctx: Any, vectors: torch.Tensor, runs: Sequence[ColumnRun], width: int, *weights: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.runs, ctx.dtype = runs, product_dtype(vectors)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*weights)
            ctx.saved_vectors = _SavedVectors(vectors)
        result = vectors.new_empty(vectors.shape[0], width)
        for run, weight in zip(runs, weights, strict=True):
            block, into = vectors[:, run.columns], result[:, run.result]
            if weight is None:
                into.copy_(block)
            else:
                _multiply(_by_table(block, run.tables), weight, _by_table(into, run.tables), ctx.dtype)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights = ctx.saved_tensors
        vectors, of_vectors = ctx.saved_vectors.take(needs_gradient=ctx.needs_input_grad[0])
        of_weights: list[torch.Tensor | None] = [None] * len(weights)
        for index, (run, weight) in enumerate(zip(ctx.runs, weights, strict=True)):
            above = gradient[:, run.result]
            if weight is not None:
                above = _by_table(above, run.tables)
            if ctx.needs_input_grad[3 + index]:
                by_table = _by_table(vectors[:, run.columns], run.tables).transpose(1, 2)
                of_weights[index] = torch.bmm(by_table.to(ctx.dtype), above.to(ctx.dtype)).to(weight.dtype)
            if of_vectors is None:
                continue
            into = of_vectors[:, run.columns]
            if weight is None:
                into.copy_(above)
            else:
                _multiply(above, weight.transpose(1, 2), _by_table(into, run.tables), ctx.dtype)
        return of_vectors, None, None, *of_weights


def _by_table(block: torch.Tensor, tables: int) -> torch.Tensor:
    """``(B, G·width)`` -> ``(G, B, width)``, without a copy."""
    return block.view(block.shape[0], tables, block.shape[1] // tables).transpose(0, 1)


class ProjectedRows(torch.autograd.Function):
    """Rows of T tables, flat ``(sum of U_t·k_t,)`` -> the vectors of the tables of each d, ``(U, d)``.

    One product per table; on a CPU this is faster than padding for a batched product.

    Args:
        rows: table by table.
        counts: the number of rows of each table.
        widths: their widths.
        dims: d of each table, ascending.
        weights: W2 ``(k, d)`` of each table; None for a single-layer table.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        counts: Sequence[int],
        widths: Sequence[int],
        dims: Sequence[int],
        *weights: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.counts, ctx.widths, ctx.dims, ctx.dtype = counts, widths, dims, product_dtype(rows)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*weights)
            ctx.saved_rows = _SavedVectors(rows)
        numbers = {dim: 0 for dim in dims}
        for count, dim in zip(counts, dims, strict=True):
            numbers[dim] += count
        vectors = tuple(rows.new_empty(number, dim) for dim, number in numbers.items())
        tables = zip(
            _rows_of_tables(rows, counts, widths), _vectors_of_tables(vectors, counts, dims), weights, strict=True
        )
        for part, into, weight in tables:
            if weight is None:
                into.copy_(part)
            else:
                _multiply(part, weight, into, ctx.dtype)
        return vectors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        weights = ctx.saved_tensors
        rows, of_rows = ctx.saved_rows.take(needs_gradient=ctx.needs_input_grad[0])
        of_weights: list[torch.Tensor | None] = [None] * len(weights)
        parts = _rows_of_tables(rows, ctx.counts, ctx.widths)
        into = [None] * len(parts) if of_rows is None else _rows_of_tables(of_rows, ctx.counts, ctx.widths)
        tables = zip(parts, into, _vectors_of_tables(gradients, ctx.counts, ctx.dims), weights, strict=True)
        for index, (part, of_part, above, weight) in enumerate(tables):
            if ctx.needs_input_grad[4 + index]:
                of_weights[index] = torch.mm(part.t().to(ctx.dtype), above.to(ctx.dtype)).to(weight.dtype)
            if of_part is None:
                continue
            if weight is None:
                of_part.copy_(above)
            else:
                _multiply(above, weight.t(), of_part, ctx.dtype)
        return of_rows, None, None, None, *of_weights


def _rows_of_tables(rows: torch.Tensor, counts: Sequence[int], widths: Sequence[int]) -> list[torch.Tensor]:
    sizes = [count * width for count, width in zip(counts, widths, strict=True)]
    return [part.view(count, width) for part, count, width in zip(rows.split(sizes), counts, widths, strict=True)]


def _vectors_of_tables(
    vectors: Sequence[torch.Tensor], counts: Sequence[int], dims: Sequence[int]
) -> list[torch.Tensor]:
    """Return the vectors of each table; ``vectors`` has those of each d."""
    counts_of = {dim: [count for count, each in zip(counts, dims, strict=True) if each == dim] for dim in dims}
    return [part for each, of_dim in zip(vectors, counts_of.values(), strict=True) for part in each.split(of_dim)]


def _multiply(left: torch.Tensor, right: torch.Tensor, into: torch.Tensor, dtype: torch.dtype) -> None:
    product = torch.bmm if left.dim() == 3 else torch.mm
    if dtype == into.dtype:
        product(left, right, out=into)
    else:
        into.copy_(product(left.to(dtype), right.to(dtype)))
