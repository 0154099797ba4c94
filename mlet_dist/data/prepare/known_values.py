"""Vocabularies of a data set that is prepared like another one: its values keep their ids, and new ones may follow."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mlet_dist.data.location import RemotePath, data_set_path
from mlet_dist.data.prepare.raw_formats import SparseColumn
from mlet_dist.data.prepare.vocabulary import (
    Lookup,
    index_of,
    merged_counts,
    most_frequent,
    record_vocabulary,
    values_fingerprint,
)
from mlet_dist.data.prepare.vocabulary_file import SUFFIX, read_vocabulary
from mlet_dist.errors import UserError

_READ_BYTES = 1 << 20


@dataclass(frozen=True)
class KnownValues:
    """The values of one table of another data set, in the order of their ids.

    Attributes:
        file: path or URL of the vocabulary, of a data set (Parquet) or of an export (``vocabulary_file``).
        table: the table.
        fingerprint: of the values, as the schema there records it.
        grows: whether values that it lacks get the ids behind its own.
    """

    file: str
    table: str
    fingerprint: str
    grows: bool

    def read(self) -> pa.StringArray:
        """Read the values.

        Raises:
            UserError: the file is missing or damaged, or holds other values.
        """
        path = data_set_path(self.file)
        try:
            if isinstance(path, Path) and path.suffix == SUFFIX:
                found = pa.chunked_array([read_vocabulary(path)])
            else:
                with path.open(_READ_BYTES) if isinstance(path, RemotePath) else nullcontext(path) as source:
                    found = pq.read_table(source, columns=["value"])["value"].cast(pa.string())
        except (OSError, pa.ArrowException, KeyError) as error:
            raise UserError(f"{path}: cannot be read: {str(error).partition(chr(10))[0]}") from None
        if values_fingerprint(self.table, found).hex() != self.fingerprint:
            raise UserError(f"{path}: has other values, or in another order, than those that ids were given to")
        return pa.concat_arrays(found.chunks) if found.num_chunks else pa.array([], pa.string())


def make_known_vocabulary(
    directory: Path, sparse: SparseColumn, runs: Sequence[Path], range_values: int, known: KnownValues
) -> None:
    """Write what ``make_vocabulary`` does for values with given ids: their counts here, and the values that are new.

    Where the vocabulary grows, the new values with at least ``min_count`` occurrences come by descending count, ties by
    value, and no more of them than ``max_num_embeddings`` allows.
    """
    values = known.read()
    lookup = Lookup(sparse.table_name, index_of(sparse.table_name, values))
    counts = np.zeros(lookup.num_embeddings, np.int64)
    new = [pa.table({"value": pa.array([], pa.string()), "count": pa.array([], pa.int64())})]
    for summed in merged_counts(sparse.table_name, runs, range_values):
        table = summed.combine_chunks()
        if not table.num_rows:
            continue
        ids = lookup.ids(table["value"].chunk(0))
        np.add.at(counts, ids, table["count"].to_numpy())
        if known.grows:
            unknown = table.filter(pa.array(ids == 0))
            new.append(unknown.filter(pc.greater_equal(unknown["count"], sparse.min_count)))
    left = None if sparse.max_num_embeddings is None else max(0, sparse.max_num_embeddings - lookup.num_embeddings)
    kept = pa.table({"value": values, "count": counts[1:]})
    record_vocabulary(directory, sparse.table_name, pa.concat_tables([kept, most_frequent(new, left)]))
