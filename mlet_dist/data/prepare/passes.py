"""The passes over raw data. Each skips what is finished; read, count and write can be sharded over machines.

pass        result                                    unit of a shard
read        raw files -> chunks                       file
count       chunks -> counts of each value            group of chunks
vocabulary  counts -> ids                             (not sharded)
write       chunks -> parts of the data set           group of chunks

The merge pass, which completes the data set, is ``dataset_manifest.assemble``.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from mlet_dist.data.id_counts import IdCounts, add_counts, counts_from_plain, counts_to_plain
from mlet_dist.data.prepare.chunks import ChunkGroup, ChunkTimes, make_groups
from mlet_dist.data.prepare.counting import GroupCounts, Moments, count_group, moments_of
from mlet_dist.data.prepare.fingerprints import (
    chunks_fingerprint,
    count_spec,
    counts_fingerprint,
    parts_fingerprint,
    vocabulary_fingerprint,
    write_spec,
)
from mlet_dist.data.prepare.raw_files import RawFile
from mlet_dist.data.prepare.raw_formats import SparseColumn, TableSpec
from mlet_dist.data.prepare.reading import FileRead, NoRowsError, Reading
from mlet_dist.data.prepare.sealed_files import (
    Repairs,
    check_sealed,
    check_seals,
    load_record,
    save_record,
    seal_of,
)
from mlet_dist.data.prepare.split_files import assign_files, describe_splits
from mlet_dist.data.prepare.splits import FRACTIONS, Splitter, make_splitter
from mlet_dist.data.prepare.vocabulary import lookup_path, make_vocabulary
from mlet_dist.data.prepare.work_files import WorkDirectory
from mlet_dist.data.prepare.worker_pool import Workers
from mlet_dist.data.prepare.writing import Encoder
from mlet_dist.data.schema import SPLITS, Part
from mlet_dist.errors import UserError
from mlet_dist.progress import Progress

Result = TypeVar("Result")


@dataclass(frozen=True)
class Shard:
    """Shard ``index`` of ``count`` of a pass."""

    index: int = 0
    count: int = 1

    def select(self, items: Sequence[Any]) -> Sequence[Any]:
        """Return this shard's items: every ``count``-th one."""
        return items[self.index :: self.count]


class Passes:
    """The passes over ``files``; each reads the results of the passes before it from the work directory.

    Results are verified where they are read. A pass makes those again that are damaged, with a warning, whichever pass
    made them first.

    Args:
        range_values: about how many counts are in memory at a time while vocabularies are merged.

    Attributes:
        spec: the table's description.
        files: the raw files, in order.
        work: the work directory.
        data: the directory that parts are written to, which becomes the data set.
    """

    def __init__(self, spec: TableSpec, files: Sequence[RawFile], out: Path, range_values: int) -> None:
        self.spec, self.files, self._range_values = spec, files, range_values
        self._intact: set[int] = set()  # groups whose parts this process has written or verified
        self._repairs = Repairs()
        self._file_splits = assign_files(spec.split, [file.path for file in files]) if spec.split.by == "file" else ()
        # One feature of each table with a vocabulary, which all features of the table share.
        self._counted = {each.table_name: each for each in spec.sparse if each.encoding == "vocabulary"}
        chunks = [chunks_fingerprint(spec, file) for file in files]
        counts = counts_fingerprint(spec, chunks)
        vocabularies = {table: vocabulary_fingerprint(each, counts) for table, each in self._counted.items()}
        parts = parts_fingerprint(spec, counts)
        self._fingerprints = {"read": chunks, "count": [counts], "vocabulary": [*vocabularies.values()]}
        self._fingerprints |= {"write": [parts], "data": [parts]}
        self.work = WorkDirectory(out)
        self._reading = Reading(spec, files, [self.work.path("read", each) for each in chunks])
        self._counts, self._parts = self.work.path("count", counts), self.work.path("write", parts)
        self._vocabularies = {name: self.work.path("vocabulary", each) for name, each in vocabularies.items()}
        self.data = self.work.path("data", parts)

    def remove_stale(self) -> None:
        """Remove results that these passes cannot use."""
        self.work.remove_stale(self._fingerprints)

    def read(self, workers: Workers, shard: Shard) -> None:
        """Parse the files into chunks.

        Raises:
            UserError: a file cannot be read or has too many malformed lines.
        """
        self.with_repairs(workers, lambda: self._reading.run(workers, shard.select(range(len(self.files)))))

    def count(self, workers: Workers, shard: Shard) -> None:
        """Count the values of the training split, and the rows of every split."""

        def count() -> None:
            self._count(workers, [g for g in shard.select(self.groups) if self._record(self._counts, g) is None])

        self.with_repairs(workers, count)

    def _count(self, workers: Workers, left: Sequence[ChunkGroup]) -> None:
        self._counts.mkdir(parents=True, exist_ok=True)
        spec = count_spec(self.spec)
        calls = ((spec, self.splitter, group, self._counts / f"{group.number:06}.run") for group in left)
        with Progress("count", sum(group.rows for group in left), "rows") as progress:
            for group, counts in zip(left, workers.map(count_group, calls), strict=True):
                save_record(self._counts / f"{group.number:06}.json", asdict(counts))
                progress.update(group.rows)

    def vocabulary(self, workers: Workers) -> None:
        """Merge the counts into vocabularies."""

        def merge() -> None:
            _ = self.counts  # raises if a group is not counted yet
            self._merge(workers, [table for table in self._counted if self._load_vocabulary(table) is None])

        self.with_repairs(workers, merge)

    def _merge(self, workers: Workers, left: Sequence[str]) -> None:
        runs = [self._counts / f"{group.number:06}.run" for group in self.groups]
        if left:
            _run(workers, check_sealed, ((run,) for run in runs))
        calls = ((self._vocabularies[name], self._counted[name], runs, self._range_values) for name in left)
        with Progress("vocabulary", len(left), "tables") as progress:
            for _ in workers.map(make_vocabulary, calls):
                progress.update(1)

    def write(self, workers: Workers, shard: Shard) -> None:
        """Write the parts of every split.

        Raises:
            UserError: a split has no rows.
        """

        def write() -> None:
            _ = self._part_names()  # raises if a group is not counted yet
            for sparse in self.spec.sparse:
                self.num_embeddings(sparse.name)  # raises if its vocabulary is missing
            finished = [(g, self._record(self._parts, g)) for g in shard.select(self.groups)]
            self._verify_parts(workers, [(group, record) for group, record in finished if record is not None])
            self._write(workers, [group for group, record in finished if record is None])

        self.with_repairs(workers, write)

    def _write(self, workers: Workers, left: Sequence[ChunkGroup]) -> None:
        directories = [self.data / split for split in self.spec.split.splits]
        for path in (*directories, self._parts):  # the data first, see `is_published`
            path.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(write_spec(self.spec), self._vocabularies, self.moments)
        names = self._part_names()
        if left:
            _run(workers, check_sealed, ((lookup_path(path, name),) for name, path in self._vocabularies.items()))
        calls = ((encoder, self.splitter, group, self.data, names[group.number], self._parts) for group in left)
        with Progress("write", sum(group.rows for group in left), "rows") as progress:
            for group, (parts, counts) in zip(left, workers.map(Encoder.write, calls), strict=True):
                record = {
                    "parts": {split: asdict(part) for split, part in parts.items()},
                    "seals": {part.path: seal_of(self.data / part.path) for part in parts.values()},
                    "id_counts": counts_to_plain(counts),
                }
                save_record(self._parts / f"{group.number:06}.json", record)
                self._intact.add(group.number)
                progress.update(group.rows)

    def verify(self, workers: Workers) -> None:
        """Verify the parts of all groups, except those that this process has written or verified."""

        def verify() -> None:
            self._verify_parts(workers, [(g, self._finished(self._parts, g, "write")) for g in self.groups])

        self.with_repairs(workers, verify)

    def _verify_parts(self, workers: Workers, finished: Sequence[tuple[ChunkGroup, dict[str, Any]]]) -> None:
        left = [(group, record) for group, record in finished if group.number not in self._intact]
        if not left:
            return
        calls = (([(self.data / path, seal) for path, seal in record["seals"].items()],) for _, record in left)
        with Progress("verify", sum(group.rows for group, _ in left), "rows") as progress:
            for (group, _), _ in zip(left, workers.map(check_seals, calls), strict=True):
                self._intact.add(group.number)
                progress.update(group.rows)

    def with_repairs(self, workers: Workers, action: Callable[[], Result]) -> Result:
        """Return what ``action`` returns; when it finds a damaged piece, make that again and repeat the action.

        Raises:
            UserError: a piece is damaged again soon after it was made.
        """
        return self._repairs.run(action, partial(self._make_again, workers))

    def _make_again(self, workers: Workers, path: Path) -> None:
        kind, fingerprint, *_, name = path.relative_to(self.work.root).parts
        if kind == "read":
            self._reading.read_again(workers, [self._fingerprints["read"].index(fingerprint)], damaged=path)
        elif kind == "vocabulary":
            self._merge(workers, [Path(name).stem])
        elif kind == "data":
            part = str(path.relative_to(self.data))
            [number] = [number for number, names in enumerate(self._part_names()) if part in names.values()]
            self._write(workers, [self.groups[number]])
        else:
            redo = self._count if kind == "count" else self._write
            redo(workers, [self.groups[int(Path(name).stem)]])

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
    def moments(self) -> dict[str, Moments]:
        """The moments, over the training split, of each dense feature that is standardised."""
        names = [dense.name for dense in self.spec.dense if dense.transform == "standardise"]
        return {name: moments_of(self.counts, name) for name in names}

    @property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """The parts of each split in row order, once all are written."""
        written = [self._finished(self._parts, group, "write")["parts"] for group in self.groups]
        splits = self.spec.split.splits
        return {split: tuple(Part(**each[split]) for each in written if split in each) for split in splits}

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


def _run(workers: Workers, function: Callable[..., object], calls: Iterable[tuple[Any, ...]]) -> None:
    for _ in workers.map(function, calls):
        pass
