"""Fingerprints of what the result of each pass depends on, so that other arguments redo no more than they change.

Results are kept under their fingerprint. A pass gets a table description in which everything that it must not depend on
is replaced by a fixed value, and the same description goes into the fingerprint: what the fingerprint omits cannot
affect the result.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from mlet_dist.data.parquet_parts import PART_VERSION
from mlet_dist.data.prepare import chunks, raw_blocks
from mlet_dist.data.prepare.chunks import CHUNK_VERSION
from mlet_dist.data.prepare.known_values import KnownValues
from mlet_dist.data.prepare.raw_files import RawFile
from mlet_dist.data.prepare.raw_formats import SparseColumn, TableSpec
from mlet_dist.data.prepare.splits import SplitRule
from mlet_dist.data.schema import FORMAT_VERSION, ROW_GROUP_ROWS

COUNT_VERSION = 2  # changes when the files of the count and vocabulary passes change
WRITE_VERSION = 3  # changes when the records of the write pass change


def chunks_fingerprint(spec: TableSpec, file: RawFile) -> str:
    """Return the fingerprint of a file's chunks."""
    return fingerprint(CHUNK_VERSION, raw_blocks.BLOCK_BYTES, read_spec(spec), file)


def counts_fingerprint(spec: TableSpec, chunk_fingerprints: Sequence[str]) -> str:
    """Return the fingerprint of the counts, given those of all files' chunks in order."""
    return fingerprint(COUNT_VERSION, chunks.GROUP_ROWS, count_spec(spec), *chunk_fingerprints)


def vocabulary_fingerprint(sparse: SparseColumn, counts: str, known: KnownValues | None = None) -> str:
    """Return the fingerprint of a feature's vocabulary, given that of the counts, and the values that have an id."""
    given = () if known is None else (known.fingerprint, known.grows)
    return fingerprint(COUNT_VERSION, sparse.table_name, sparse.min_count, sparse.max_num_embeddings, counts, *given)


def parts_fingerprint(spec: TableSpec, counts: str, like: tuple[object, ...] = ()) -> str:
    """Return the fingerprint of the parts, given that of the counts, and the identity of the data set they are like."""
    versions = FORMAT_VERSION, WRITE_VERSION, PART_VERSION, ROW_GROUP_ROWS
    return fingerprint(*versions, write_spec(spec), counts, *like)


def fingerprint(*values: object) -> str:
    """Return a digest of the values' representations: 24 hexadecimal digits."""
    return hashlib.sha256("\0".join(map(repr, values)).encode()).hexdigest()[:24]


def read_spec(spec: TableSpec) -> TableSpec:
    """Return what chunks depend on: all but encodings, the split (except its column), and what ``count_spec`` omits."""
    sparse = tuple(replace(column, encoding="vocabulary") for column in count_spec(spec).sparse)
    return replace(count_spec(spec), sparse=sparse, split=SplitRule("rows", column=spec.split.column))


def count_spec(spec: TableSpec) -> TableSpec:
    """Return what the counts depend on: all but the sizes of vocabularies and tables, and what ``write_spec`` omits."""
    sparse = tuple(replace(column, min_count=1, num_embeddings=None, max_num_embeddings=None) for column in spec.sparse)
    return replace(write_spec(spec), sparse=sparse)


def write_spec(spec: TableSpec) -> TableSpec:
    """Return what the parts depend on: all but the format's name and the limit on malformed lines."""
    return replace(spec, source="", max_malformed=0.0)
