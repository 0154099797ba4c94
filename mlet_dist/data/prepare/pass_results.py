"""The results of the passes over raw data, in the work directory of a data set that is being made."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mlet_dist.data.id_counts import IdCounts, add_counts, counts_from_plain
from mlet_dist.data.prepare.chunks import ChunkGroup, ChunkTimes, make_groups
from mlet_dist.data.prepare.counting import GroupCounts, Moments, Scale, moments_of
from mlet_dist.data.prepare.fingerprints import (
    chunks_fingerprint,
    counts_fingerprint,
    parts_fingerprint,
    vocabulary_fingerprint,
)
from mlet_dist.data.prepare.known_values import KnownValues
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.raw_files import RawFile
from mlet_dist.data.prepare.raw_formats import SparseColumn, TableSpec
from mlet_dist.data.prepare.reading import FileRead, NoRowsError, Reading
from mlet_dist.data.prepare.sealed_files import check_seals, load_record
from mlet_dist.data.prepare.split_files import assign_files, describe_splits
from mlet_dist.data.prepare.splits import FRACTIONS, Splitter, make_splitter
from mlet_dist.data.prepare.work_files import WorkDirectory
from mlet_dist.data.schema import SPLITS, Part
from mlet_dist.errors import UserError


class PassResults:
    """What the passes over raw files have written so far; what is missing yet is a UserError that names its pass.

    Attributes:
        spec: the table's description.
        files: the raw files, in order.
        like: the data set whose vocabularies and statistics are taken over, if any.
        work: the work directory.
        data: the directory that parts are written to, which becomes the data set.
    """

    def __init__(self, spec: TableSpec, files: Sequence[RawFile], out: Path, like: LikeDataset | None = None) -> None:
        self.spec, self.files, self.like = spec, files, like
        self._file_splits = assign_files(spec.split, [file.path for file in files]) if spec.split.by == "file" else ()
        # One feature of each table with a vocabulary, which all features of the table share.
        self._counted = {each.table_name: each for each in spec.sparse if each.encoding == "vocabulary"}
        chunks = [chunks_fingerprint(spec, file) for file in files]
        counts = counts_fingerprint(spec, chunks)
        vocabularies = {
            table: vocabulary_fingerprint(each, counts, self._known_values(table))
            for table, each in self._counted.items()
        }
        parts = parts_fingerprint(spec, counts, () if like is None else like.identity)
        self._fingerprints = {"read": chunks, "count": [counts], "vocabulary": [*vocabularies.values()]}
        self._fingerprints |= {"write": [parts], "data": [parts]}
        self.work = WorkDirectory(out)
        self._reading = Reading(spec, files, [self.work.path("read", each) for each in chunks])
        self._counts, self._parts = self.work.path("count", counts), self.work.path("write", parts)
        self._vocabularies = {name: self.work.path("vocabulary", each) for name, each in vocabularies.items()}
        self.data = self.work.path("data", parts)

    def remove_stale(self) -> None:
        """Remove results that the passes cannot use."""
        self.work.remove_stale(self._fingerprints)

    @property
    def is_published(self) -> bool:
        """Whether the data directory was renamed to ``out`` already, so that the records of written parts are void."""
        return self._parts.is_dir() and not self.data.is_dir()

    @property
    def reads(self) -> list[FileRead]:
        """The statistics of each file, once all are read."""
        return self._reading.reads

    @cached_property
    def groups(self) -> list[ChunkGroup]:
        """The groups of all files.

        Raises:
            NoRowsError: no file has rows.
        """
        groups = make_groups(
            [
                [(self._reading.chunk(number, index), rows) for index, rows in enumerate(read.chunk_rows) if rows]
                for number, read in enumerate(self.reads)
            ]
        )
        if not groups:
            number = len(self.files)
            which = "the file has no rows" if number == 1 else f"neither this nor another of {number} files has rows"
            raise NoRowsError(f"{self.files[0].path}: {which}; give files with rows")
        return groups

    @cached_property
    def splitter(self) -> Splitter:
        """The assignment of rows to splits.

        Raises:
            UserError: the times of the files are of two kinds.
        """
        self._reading.check_times()
        rows = [sum(read.chunk_rows) for read in self.reads]
        in_millionths = any(FRACTIONS in read.times for read in self.reads)
        times = ChunkTimes([path for group in self.groups for path in group.chunks], in_millionths)
        return make_splitter(self.spec.split, rows, times, in_millionths, self._file_splits)

    def describe_splits(self) -> list[str]:
        """Return lines that say how many rows each split has, and of which files, once all are counted."""
        rows = [dict.fromkeys(SPLITS, 0) for _ in self.files]
        for group, counts in zip(self.groups, self.counts, strict=True):
            for split, number in counts.rows.items():
                rows[group.file][split] += number
        return list(describe_splits(self.spec.split, [file.path for file in self.files], rows))

    @cached_property
    def counts(self) -> list[GroupCounts]:
        """The counts of each group, once all are counted."""
        found = []
        for group in self.groups:
            content = self._finished(self._counts, group, "count")
            moments = {name: Moments(**each) for name, each in content.pop("moments").items()}
            found.append(GroupCounts(**content, moments=moments))
        return found

    @cached_property
    def scales(self) -> dict[str, Scale]:
        """Mean and deviation, over the training split, of each dense feature that is standardised."""
        if self.like is not None:
            return self.like.scales
        names = [dense.name for dense in self.spec.dense if dense.transform == "standardise"]
        return {name: moments_of(self.counts, name).scale for name in names}

    @property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """The parts of each split in row order, once all are written."""
        written = [self._finished(self._parts, group, "write")["parts"] for group in self.groups]
        splits = self.spec.split.splits
        return {split: tuple(_part(each[split]) for each in written if split in each) for split in splits}

    @property
    def id_counts(self) -> dict[str, dict[str, IdCounts]]:
        """The counts of ids by split and feature, once all parts are written."""
        written = [self._finished(self._parts, group, "write") for group in self.groups]
        found = add_counts(counts_from_plain(each["id_counts"], self._parts) for each in written)
        return {split: found[split] for split in SPLITS if split in found}

    @property
    def vocabularies(self) -> list[Path]:
        """The paths of all vocabularies' Parquet files, which are verified."""
        paths = {table: directory / f"{table}.parquet" for table, directory in self._vocabularies.items()}
        for table, path in paths.items():
            check_seals([(path, self._vocabulary(table)["seal"])])
        return [*paths.values()]

    def num_embeddings(self, feature: str) -> int:
        """Return the number of rows of a feature's table, once its vocabulary exists."""
        sparse = self._sparse(feature)
        return sparse.num_embeddings or 1 + int(self._vocabulary(sparse.table_name)["values"])

    def mapping_fingerprint(self, feature: str) -> str:
        """Return a text that identifies the mapping from a feature's values to ids."""
        sparse = self._sparse(feature)
        if sparse.num_embeddings is not None:
            return f"hash modulo {sparse.num_embeddings}" + (f", salted with {sparse.table}" if sparse.table else "")
        return str(self._vocabulary(sparse.table_name)["fingerprint"])

    def extends(self, feature: str) -> list[str]:
        """Return what the vocabulary of a feature has grown from, as ``sparse_rules`` takes it."""
        if self.like is None:
            return []
        return self.like.extended_by(self._sparse(feature).table_name, self.mapping_fingerprint(feature))

    def _known_values(self, table: str) -> KnownValues | None:
        return None if self.like is None else self.like.known_values(table)

    def _sparse(self, feature: str) -> SparseColumn:
        return next(sparse for sparse in self.spec.sparse if sparse.name == feature)

    def _load_vocabulary(self, table: str) -> dict[str, Any] | None:
        return load_record(self._vocabularies[table] / f"{table}.json")

    def _vocabulary(self, table: str) -> dict[str, Any]:
        content = self._load_vocabulary(table)
        if content is None:
            raise UserError(f"table {table} has no vocabulary yet; run `--pass vocabulary` first")
        return content

    def _finished(self, directory: Path, group: ChunkGroup, argument: str) -> dict[str, Any]:
        content = self._record(directory, group)
        if content is None:
            path = self.files[group.file].path
            raise UserError(
                f"{path}: rows from {group.start} on are not finished; run `--pass {argument}` for all shards first"
            )
        return content

    def _record(self, directory: Path, group: ChunkGroup) -> dict[str, Any] | None:
        return load_record(directory / f"{group.number:06}.json")

    def _part_names(self) -> list[dict[str, str]]:
        """Return each group's path in each split, numbered without gaps; raise UserError if a split would be empty."""
        numbers: dict[str, int] = dict.fromkeys(self.spec.split.splits, 0)
        names = []
        for counts in self.counts:
            names.append({s: f"{s}/part-{numbers[s]:05}.parquet" for s in numbers if counts.rows[s]})
            for split in names[-1]:
                numbers[split] += 1
        rows = sum(group.rows for group in self.groups)
        for split, number in numbers.items():
            if not number:
                raise UserError(
                    f"{self.files[0].path}: split {split} is empty: none of the {rows} rows falls into it; give more "
                    "rows or another split rule"
                )
        return names


def _part(record: dict[str, Any]) -> Part:
    """Return a part from the record of the write pass."""
    return Part(**record | {"label_counts": tuple(map(tuple, record["label_counts"]))})
