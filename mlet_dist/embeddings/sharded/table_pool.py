"""The tables of one fused kernel on a CPU, looked up as one table of all their rows."""

import copy
from itertools import accumulate

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


class TablePool:
    """Looks up distinct rows of all tables of a kernel at once: U ids -> ``(U, k)``, table by table.

    On a CPU fbgemm's pooled kernel needs bags for every table, as many as the longest of them has. But it stores its
    tables one behind another, and their optimizer state, too. A copy of the kernel that shares all tensors with it and
    knows a single table needs no padding. The rows get the same values and updates.

    Args:
        kernel: a kernel whose T tables have k columns each, with rows in host memory.

    Raises:
        ValueError: the tables do not have the same number of columns, or do not lie one behind another.
    """

    def __init__(self, kernel: SplitTableBatchedEmbeddingBagsCodegen) -> None:
        rows, widths = ([spec[position] for spec in kernel.embedding_specs] for position in (0, 1))
        first_rows = [0, *accumulate(rows)]
        offsets = [first * widths[0] for first in first_rows[:-1]]
        if len(set(widths)) != 1 or kernel.weights_offsets.tolist() != offsets:
            raise ValueError(f"tables of {rows} rows and {widths} columns cannot be one table: they are not contiguous")
        self._kernel = kernel
        self._first_rows = torch.tensor(first_rows[:-1])
        self._pool = copy.copy(kernel)
        # Attributes of the copy itself hide the buffers, which it shares with the kernel.
        hidden = {
            name: buffer[:1]
            for name, buffer in kernel.named_buffers(recurse=False)
            if name.endswith(("_offsets", "_placements")) and name != "D_offsets" and len(buffer) == len(rows)
        }
        total = first_rows[-1]
        self._pool.__dict__.update(
            hidden,
            D_offsets=kernel.D_offsets[:2],
            total_D=widths[0],
            hash_size_cumsum=torch.tensor([0, total]),
            rows_per_table=torch.tensor([total]),
            feature_dims=kernel.feature_dims[:1],
            feature_table_map=[0],
        )

    def __call__(self, ids: KeyedJaggedTensor) -> torch.Tensor:
        """Return the rows ``(U, k)`` of ids, whose keys are the kernel's tables, in order."""
        values, counts = ids.values(), torch.tensor(ids.length_per_key())
        rows = values + torch.repeat_interleave(self._first_rows, counts, output_size=values.numel())
        self._pool.optimizer_args, self._pool.training = self._kernel.optimizer_args, self._kernel.training
        found: torch.Tensor = self._pool(rows, torch.arange(values.numel() + 1))
        return found
