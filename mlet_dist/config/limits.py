"""Limits that settings of several sections share."""

MAX_COLUMNS = 1 << 16
"""Of a table."""

MAX_STEPS = 10**15
"""Of a run: its product with the batches of an epoch, and its float64, are exact."""
