"""Limits that settings of several sections share."""

MAX_COLUMNS = 1 << 16
"""Of a table."""

MAX_CUDA_COLUMNS = 2048
"""Of a row that is looked up on CUDA: fbgemm's kernels support no more (`max_embedding_dim` of its code generator)."""

MAX_ROWS = 2**31 - 1
"""Of a batch, and of a table that a setting limits."""

MAX_STEPS = 10**15
"""Of a run: its product with the batches of an epoch, and its float64, are exact."""

MAX_LAYER = 10**9
"""Outputs of a dense layer: torch counts the bytes of two such layers in 64 bits."""

SCALE = {"above": 0, "at_least": 1e-15, "at_most": 1e15}
"""Of initial values: the products of two of them are finite in float32."""
