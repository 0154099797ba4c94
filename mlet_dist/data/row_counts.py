"""How often the training split looks up each row of each embedding table."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mlet_dist.data.location import DataPath, RemotePath
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError

Counts = npt.NDArray[np.int64]

_READ_BYTES = 1 << 20


def row_counts(path: DataPath, schema: DatasetSchema, features: list[str]) -> dict[str, Counts]:
    """Return the number of lookups of each row by table, ``(num_embeddings,)``.

    The vocabularies that `mlet prepare` writes hold the counts. Tables without one are counted in the files of the
    training split.

    Args:
        path: the data set.
        schema: its schema.
        features: the sparse features to count; other features of the same tables are left out.

    Raises:
        UserError: a file cannot be read.
    """
    of_table: dict[str, list[str]] = {}
    for feature in schema.sparse:
        if feature.name in features:
            of_table.setdefault(feature.table_name, []).append(feature.name)
    sizes = schema.table_sizes
    found = {name: _from_vocabulary(path, schema, name, own, sizes[name]) for name, own in of_table.items()}
    missing = {name: own for name, own in of_table.items() if found[name] is None}
    counted = _from_rows(path, schema, missing, sizes) if missing else {}
    return {name: counts if counts is not None else counted[name] for name, counts in found.items()}


def _from_vocabulary(
    path: DataPath, schema: DatasetSchema, table: str, features: list[str], num_embeddings: int
) -> Counts | None:
    """Return the counts in a table's vocabulary, or None if it has none, or one that counts other features, too."""
    own = [feature.name for feature in schema.sparse if feature.table_name == table]
    file = path / "vocabulary" / f"{table}.parquet"
    known = schema.id_counts.get("train", {})
    if sorted(own) != sorted(features) or any(name not in known for name in own):
        return None
    try:
        with _opened(file) as source:
            counts = pq.read_table(source, columns=["count"])["count"].to_numpy()
    except (OSError, KeyError, pa.ArrowInvalid):
        return None
    if len(counts) + 1 != num_embeddings:
        return None
    outside = sum(known[name].out_of_vocabulary or 0 for name in own)
    return np.concatenate([[outside], counts]).astype(np.int64)


def _from_rows(
    path: DataPath, schema: DatasetSchema, of_table: dict[str, list[str]], sizes: dict[str, int]
) -> dict[str, Counts]:
    """Count the ids of the training split, some rows at a time."""
    found = {name: np.zeros(sizes[name], dtype=np.int64) for name in of_table}
    columns = [name for own in of_table.values() for name in own]
    for part in schema.parts["train"]:
        file = path / part.path
        try:
            with _opened(file) as source, pq.ParquetFile(source) as parquet:
                for batch in parquet.iter_batches(columns=columns, use_threads=False):
                    for name, own in of_table.items():
                        for feature in own:
                            np.add.at(found[name], _ids(batch.column(feature)), 1)
        except (OSError, pa.ArrowException, IndexError) as error:
            raise UserError(f"{path / part.path}: cannot be read: {error}") from None
    return found


def _ids(column: pa.Array) -> Counts:
    """Return the ids of a column, which may hold lists of ids."""
    ids = column if pa.types.is_integer(column.type) else column.flatten()
    found: Counts = ids.to_numpy(zero_copy_only=False)
    return found


def _opened(file: DataPath) -> AbstractContextManager[Any]:
    return file.open(_READ_BYTES) if isinstance(file, RemotePath) else nullcontext(file)
