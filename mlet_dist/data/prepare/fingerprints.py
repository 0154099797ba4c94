"""What the result of each pass of `mlet prepare` depends on, so that other arguments redo no more than they change.

A pass is given a table's description in which all that it must not depend on has one fixed value, and its pieces are
kept under a digest of that description: what is not in the digest cannot reach the result either.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

from mlet_dist.data.parquet_parts import PART_VERSION, ROW_GROUP_ROWS
from mlet_dist.data.prepare import chunks, raw_blocks
from mlet_dist.data.prepare.chunks import CHUNK_VERSION
from mlet_dist.data.prepare.raw_blocks import RawFile
from mlet_dist.data.prepare.raw_formats import SparseColumn, TableSpec
from mlet_dist.data.prepare.splits import SplitRule
from mlet_dist.data.schema import FORMAT_VERSION

COUNT_VERSION = 1  # of the files that the counting and vocabulary passes leave


def spec_to_read(spec: TableSpec) -> TableSpec:
    """What decides about a file's chunks: all but encodings, the split (its column aside) and the malformed share."""
    sparse = tuple(replace(column, encoding="vocabulary") for column in spec_to_count(spec).sparse)
    return replace(spec_to_count(spec), sparse=sparse, split=SplitRule("rows", column=spec.split.column))


def spec_to_count(spec: TableSpec) -> TableSpec:
    """What decides about the counts: all but the sizes of vocabularies and tables, and the malformed share."""
    sparse = tuple(replace(column, min_count=1, num_embeddings=None) for column in spec.sparse)
    return replace(spec_to_write(spec), sparse=sparse)


def spec_to_write(spec: TableSpec) -> TableSpec:
    """What decides about the parts: all but the malformed share and the format's name."""
    return replace(spec, source="", max_malformed=0.0)


def chunks_key(spec: TableSpec, file: RawFile) -> str:
    """Of a file's chunks."""
    return key_of(CHUNK_VERSION, raw_blocks.BLOCK_BYTES, spec_to_read(spec), file)


def counts_key(spec: TableSpec, chunk_keys: Sequence[str]) -> str:
    """Of the counts, from the keys of all files' chunks in order."""
    return key_of(COUNT_VERSION, chunks.GROUP_ROWS, spec_to_count(spec), *chunk_keys)


def vocabulary_key(sparse: SparseColumn, counts: str) -> str:
    """Of a feature's vocabulary, from the key of the counts."""
    return key_of(COUNT_VERSION, sparse.name, sparse.min_count, counts)


def parts_key(spec: TableSpec, counts: str) -> str:
    """Of the parts, from the key of the counts."""
    return key_of(FORMAT_VERSION, PART_VERSION, ROW_GROUP_ROWS, spec_to_write(spec), counts)


def key_of(*parts: object) -> str:
    """A digest of the parts' representations."""
    return hashlib.sha256("\0".join(map(repr, parts)).encode()).hexdigest()[:24]
