"""Reads the scores that `mlet predict` writes."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mlet_dist.errors import UserError
from mlet_dist.quality.score_metrics import Scores


def read_scores(path: Path, prefix: str = "") -> Scores:
    """Return the scores in a Parquet file with the columns ``logit``, ``label`` and, if rows have weights, ``weight``.

    Args:
        path: the file.
        prefix: of the columns of one of several labels, as ``click_``; rows that lack the label are left out.

    Raises:
        UserError: the file cannot be read, lacks a column, or has a value that cannot be a score.
    """
    try:
        names = pq.read_schema(path).names
        columns = [f"{prefix}logit", f"{prefix}label", *(["weight"] if "weight" in names else [])]
        missing = [name for name in columns if name not in names]
        if missing:
            raise UserError(f"{path}: has no column {missing[0]!r}; expected a file of `mlet predict`")
        table = pq.read_table(path, columns=columns)
        if prefix:
            table = table.filter(table[f"{prefix}label"].is_valid())
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from None
    try:
        return Scores.of(*(table[name].to_numpy() for name in columns))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def rows_with_label(path: Path, prefix: str) -> npt.NDArray[np.int64]:
    """Return the numbers of the rows that ``read_scores`` returns the scores of."""
    table = pq.read_table(path, columns=["row", f"{prefix}label"])
    return np.asarray(table.filter(table[f"{prefix}label"].is_valid())["row"].to_numpy(), np.int64)
