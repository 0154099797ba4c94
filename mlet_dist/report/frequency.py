"""How good models are on rare, medium and frequent ids."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mlet_dist.data.loading.row_groups import SplitRows
from mlet_dist.data.loading.rows import MultiValued, Rows
from mlet_dist.data.location import DataPath
from mlet_dist.data.row_counts import count_ids, vocabulary_counts
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.quality.score_metrics import Floats

UNKNOWN = "out of vocabulary"
SHARES = {"frequent": 0.8, "medium": 0.95, "rare": 1.0}
"""Classes of ids by falling count, each with the share of lookups in training up to which it goes."""


def class_weights(path: DataPath, schema: DatasetSchema, split: str) -> dict[str, Floats]:
    """Return how many ids of each class the rows of a split look up, by class, each ``(N,)``.

    The ids of all tables are ordered by their counts in the training split. The frequent ones make up the first 80% of
    the lookups, the medium ones the next 15%, the rare ones the rest. Id 0 of a table with a vocabulary stands for
    values outside of it, and has a class of its own. As weights of rows in AUC and LogLoss, these give the metrics of
    a class of ids: a row counts once for each such id.

    Raises:
        UserError: a file of the data set is missing or damaged.
    """
    classes = _classes(path, schema)
    names = [feature.name for feature in schema.sparse]
    found: dict[str, list[Floats]] = {name: [] for name in (*SHARES, UNKNOWN)}
    split_rows = SplitRows(path, schema, schema.parts[split], [], names, by_row=False)
    for group in range(len(split_rows.group_rows)):
        rows = split_rows.decode(group)
        counts = np.zeros((len(found), len(rows)))
        for feature, (ids, row_of_id) in zip(schema.sparse, _ids(rows), strict=True):
            np.add.at(counts, (classes[feature.table_name][ids], row_of_id), 1.0)
        for name, each in zip(found, counts, strict=True):
            found[name].append(each)
    return {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in found.items()}


def labels_of(path: DataPath, schema: DatasetSchema, split: str, label: str | None = None) -> Floats:
    """Return the labels of the rows of a split, ``(N,)``; NaN where a row lacks one.

    Args:
        path: the data set.
        schema: its schema.
        split: of the rows.
        label: which of several; None for the only one.

    Raises:
        UserError: a file of the data set is missing or damaged.
    """
    split_rows = SplitRows(path, schema, schema.parts[split], [], [], by_row=False)
    column = 0 if label is None else schema.labels.index(label)
    found = [np.zeros(0)]
    for group in range(len(split_rows.group_rows)):
        labels = split_rows.decode(group).labels
        found.append(labels.reshape(len(labels), -1)[:, column].astype(np.float64))
    return np.concatenate(found)


def _ids(rows: Rows) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
    """Yield the ids of each feature, and the row of each id."""
    for column in rows.sparse:
        if isinstance(column, MultiValued):
            yield column.ids, np.repeat(np.arange(len(rows)), np.diff(column.offsets))
        else:
            for ids in column.ids.T:
                yield ids, np.arange(len(rows))


def _classes(path: DataPath, schema: DatasetSchema) -> dict[str, npt.NDArray[np.int64]]:
    """Return the number of the class of each row of each table."""
    counts: dict[str, npt.NDArray[np.int64]] = {}
    has_vocabulary: dict[str, bool] = {}
    for feature in schema.sparse:
        table = feature.table_name
        if table not in counts:
            of_vocabulary = vocabulary_counts(path, schema, table)
            has_vocabulary[table] = of_vocabulary is not None
            counts[table] = count_ids(path, schema, table) if of_vocabulary is None else of_vocabulary
    known = {table: each[1:] if has_vocabulary[table] else each for table, each in counts.items()}
    limits = _limits(list(known.values()))
    found = {}
    for table, each in counts.items():
        # A count of exactly a limit is in the more frequent class.
        found[table] = np.searchsorted(-limits, -each, side="left").astype(np.int64)
        if has_vocabulary[table]:
            found[table][0] = len(SHARES)
    return found


def _limits(counts: Sequence[npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Return the least counts of the classes but the last."""
    ordered = np.sort(np.concatenate(counts))[::-1]
    reached = np.cumsum(ordered)
    at = [np.searchsorted(reached, share * reached[-1]) for share in list(SHARES.values())[:-1]]
    return ordered[np.minimum(at, len(ordered) - 1)]


def shares_of(weights: Mapping[str, Floats]) -> dict[str, float]:
    """Return the share of a split's lookups in each class."""
    total = sum(float(each.sum()) for each in weights.values())
    return {name: float(each.sum()) / total if total else 0.0 for name, each in weights.items()}
