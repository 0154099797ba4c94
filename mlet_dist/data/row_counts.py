"""How often the training split looks up each row of an embedding table."""

from collections.abc import Collection
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mlet_dist.data.loading.row_groups import SplitRows
from mlet_dist.data.location import DataPath, RemotePath
from mlet_dist.data.schema import VOCABULARY, DatasetSchema

_READ_BYTES = 1 << 20


def count_ids(
    path: DataPath, schema: DatasetSchema, table: str, features: Collection[str] | None = None
) -> npt.NDArray[np.int64]:
    """Return how often each id of a table occurs in the training split, ``(num_embeddings,)``.

    The counts are those of the table's vocabulary if it has one; else the ids are counted, row group by row group.

    Args:
        path: the data set's directory, or a ``RemotePath``.
        schema: its schema.
        table: the table's name.
        features: the features to count; None for all of the table. A vocabulary counts all of them.

    Raises:
        UserError: a file of the data set is missing or damaged.
    """
    own = [feature for feature in schema.sparse if feature.table_name == table]
    counted = [feature for feature in own if features is None or feature.name in features]
    counts = np.zeros(own[0].num_embeddings, np.int64)
    if len(counted) == len(own):
        of_vocabulary = vocabulary_counts(path, schema, table)
        if of_vocabulary is not None:
            return of_vocabulary
    parts, names = schema.parts.get("train", ()), [feature.name for feature in counted]
    split = SplitRows(path, schema, parts, [], names, by_row=False)
    for group in range(len(split.group_rows)):
        for column in split.decode(group).sparse:
            np.add.at(counts, column.ids.ravel(), 1)
    return counts


def vocabulary_counts(path: DataPath, schema: DatasetSchema, table: str) -> npt.NDArray[np.int64] | None:
    """Return what ``count_ids`` does of all features of a table, or None if the table has no vocabulary."""
    own = [feature for feature in schema.sparse if feature.table_name == table]
    counts = np.zeros(own[0].num_embeddings, np.int64)
    if not _read_vocabulary(path / VOCABULARY / f"{table}.parquet", counts[1:]):
        return None
    # Id 0 stands for all values outside the vocabulary.
    rows = schema.rows.get("train", 0)
    counts[0] = sum(round(each.pooling_factor * rows) for each in own) - counts[1:].sum()
    return counts


def _read_vocabulary(path: DataPath, counts: npt.NDArray[np.int64]) -> bool:
    """Fill in the counts of the values; return False if there is no such file or it has another size."""
    try:
        with path.open(_READ_BYTES) if isinstance(path, RemotePath) else nullcontext(path) as source:
            found = pq.read_table(source, columns=["count"])["count"].to_numpy()
    except (OSError, pa.ArrowException, KeyError):
        return False
    if len(found) != len(counts):
        return False
    counts[:] = found
    return True
