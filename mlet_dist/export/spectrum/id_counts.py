"""How often each id comes in the training split."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mlet_dist.data.loading.row_groups import SplitRows
from mlet_dist.data.location import DataPath
from mlet_dist.data.prepare.dataset_manifest import VOCABULARY
from mlet_dist.data.schema import DatasetSchema, SparseFeature


def count_ids(path: DataPath, schema: DatasetSchema, feature: SparseFeature) -> npt.NDArray[np.int64]:
    """``(num_embeddings,)``: from the feature's vocabulary where it has one, else counted, row group by row group.

    Args:
        path: the data set's directory, or a ``RemotePath``.

    Raises:
        UserError: a part of the data set is missing or damaged.
    """
    counts = np.zeros(feature.num_embeddings, np.int64)
    vocabulary = path / VOCABULARY / f"{feature.name}.parquet"
    if isinstance(vocabulary, Path) and _read_vocabulary(vocabulary, counts[1:]):
        # Id 0 is of all values that the vocabulary leaves out.
        counts[0] = round(feature.pooling_factor * schema.rows["train"]) - counts[1:].sum()
        return counts
    split = SplitRows(path, schema, schema.parts["train"], [], [feature.name], by_row=False)
    for group in range(len(split.group_rows)):
        (column,) = split.decode(group).sparse
        np.add.at(counts, column.ids.ravel(), 1)
    return counts


def _read_vocabulary(path: Path, counts: npt.NDArray[np.int64]) -> bool:
    """Fill in the counts of the values; False where there is no such file, or one of another size."""
    try:
        found = pq.read_table(path, columns=["count"])["count"].to_numpy()
    except (OSError, pa.ArrowException, KeyError):
        return False
    if len(found) != len(counts):
        return False
    counts[:] = found
    return True
