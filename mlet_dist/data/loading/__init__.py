"""Batches of a prepared data set, for training and evaluation.

Modules:
    loader: the data loader and its batches.
    order: the order of the rows in an epoch, and each rank's share of them.
    row_groups: random access to the row groups of a split, and reading of what an order needs.
    rows: decoded rows in memory, column by column.
    jagged_tensors: the KeyedJaggedTensor of a batch.
    prefetch: iterators that work ahead in background threads.
"""
