"""The passes over raw data: read, count, vocabulary, write. Each skips what is finished and may do a share of its work.

read        files -> chunks                          a share is a number of files
count       chunks -> counts of each value           a share is a number of groups
vocabulary  counts -> ids                            all at once
write       chunks -> parts                          a share is a number of groups
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlet_dist.data.prepare.chunks import Group, load_times, make_groups
from mlet_dist.data.prepare.counting import GroupCounts, Moments, count_group, moments_of
from mlet_dist.data.prepare.fingerprints import (
    chunks_key,
    counts_key,
    parts_key,
    spec_to_count,
    spec_to_write,
    vocabulary_key,
)
from mlet_dist.data.prepare.raw_blocks import RawFile
from mlet_dist.data.prepare.raw_formats import SparseColumn, TableSpec
from mlet_dist.data.prepare.reading import FileRead, Reading
from mlet_dist.data.prepare.splits import Splitter, resolve
from mlet_dist.data.prepare.vocabulary import fingerprint_of, merge_runs, save_vocabulary
from mlet_dist.data.prepare.work_files import WorkDirectory, load_json, save_json
from mlet_dist.data.prepare.worker_pool import Workers
from mlet_dist.data.prepare.writing import Encoder
from mlet_dist.data.schema import SPLITS, Part
from mlet_dist.errors import UserError
from mlet_dist.progress import Progress


@dataclass(frozen=True)
class Shard:
    """Share ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    def of(self, items: Sequence[Any]) -> Sequence[Any]:
        """Every ``count``-th item."""
        return items[self.index :: self.count]


class Passes:
    """The passes over ``files``; each needs what the ones before it have left in ``work``.

    Attributes:
        data: where the parts are written; the data set once it is complete.
    """

    def __init__(self, spec: TableSpec, files: Sequence[RawFile], out: Path) -> None:
        self.spec, self.files = spec, files
        self._counted = [sparse for sparse in spec.sparse if sparse.encoding == "vocabulary"]
        chunks = [chunks_key(spec, file) for file in files]
        counts = counts_key(spec, chunks)
        vocabularies = {sparse.name: vocabulary_key(sparse, counts) for sparse in self._counted}
        parts = parts_key(spec, counts)
        self._keys = {"read": chunks, "count": [counts], "vocabulary": [*vocabularies.values()]}
        self._keys |= {"write": [parts], "data": [parts]}
        self.work = WorkDirectory(out)
        self._reading = Reading(spec, files, [self.work.of("read", key) for key in chunks])
        self._counts, self._parts = self.work.of("count", counts), self.work.of("write", parts)
        self._vocabularies = {name: self.work.of("vocabulary", key) for name, key in vocabularies.items()}
        self.data = self.work.of("data", parts)

    def drop_stale(self) -> None:
        """Remove what is of no use to these passes."""
        self.work.drop_stale(self._keys)

    def read(self, workers: Workers, shard: Shard) -> None:
        """Parse the files into chunks.

        Raises:
            UserError: a file cannot be read or holds too many malformed lines.
        """
        self._reading.run(workers, shard.of(range(len(self.files))))

    def count(self, workers: Workers, shard: Shard) -> None:
        """Count the values of the training split, and the rows of every split."""
        self._counts.mkdir(parents=True, exist_ok=True)
        spec = spec_to_count(self.spec)
        left = [g for g in shard.of(self.groups) if load_json(self._counts / f"{g.number:06}.json") is None]
        calls = ((spec, self.splitter, group, self._counts / f"{group.number:06}.run") for group in left)
        with Progress("count", sum(group.rows for group in left), "rows") as progress:
            for group, counts in zip(left, workers.map(count_group, calls), strict=True):
                save_json(self._counts / f"{group.number:06}.json", asdict(counts))
                progress.update(group.rows)

    def vocabulary(self, workers: Workers, range_values: int) -> None:
        """Merge the counts into vocabularies; ``range_values`` of them are held at a time."""
        runs = [self._counts / f"{group.number:06}.run" for group in self.groups]
        _ = self.counts  # all of them are there
        left = [sparse for sparse in self._counted if self._made(sparse.name) is None]
        calls = (
            (self._vocabularies[sparse.name], sparse.name, runs, sparse.min_count, range_values) for sparse in left
        )
        with Progress("vocabulary", len(left), "features") as progress:
            for _ in workers.map(_make_vocabulary, calls):
                progress.update(1)

    def write(self, workers: Workers, shard: Shard) -> None:
        """Write the parts of every split.

        Raises:
            UserError: a split has no rows.
        """
        for path in (*(self.data / split for split in SPLITS), self._parts):  # the data first, see `renamed`
            path.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(spec_to_write(self.spec), self._vocabularies, self.moments)
        names = self._part_names()
        for sparse in self.spec.sparse:
            self.num_embeddings(sparse.name)
        left = [g for g in shard.of(self.groups) if load_json(self._parts / f"{g.number:06}.json") is None]
        calls = ((encoder, self.splitter, group, self.data, names[group.number], self._parts) for group in left)
        with Progress("write", sum(group.rows for group in left), "rows") as progress:
            for group, parts in zip(left, workers.map(Encoder.write, calls), strict=True):
                save_json(self._parts / f"{group.number:06}.json", {split: asdict(p) for split, p in parts.items()})
                progress.update(group.rows)

    @property
    def renamed(self) -> bool:
        """Whether the data set has its name already: then what says that parts are written is no longer so."""
        return self._parts.is_dir() and not self.data.is_dir()

    @property
    def reads(self) -> list[FileRead]:
        """What is known of each file, once all are read."""
        return self._reading.reads

    @cached_property
    def groups(self) -> list[Group]:
        """The groups of all files."""
        return make_groups(
            [
                [(self._reading.chunk(number, index), rows) for index, rows in enumerate(read.chunk_rows)]
                for number, read in enumerate(self.reads)
            ]
        )

    @cached_property
    def splitter(self) -> Splitter:
        """Says the split of each row.

        Raises:
            UserError: no file holds a line, or their times are of two kinds.
        """
        self._reading.check_times()
        rows = [sum(read.chunk_rows) for read in self.reads]
        if not sum(rows):
            raise UserError(f"{self.files[0].path}: holds no lines; nothing can be split into train, valid and test")
        return resolve(self.spec.split, rows, _Times([path for group in self.groups for path in group.chunks]))

    @cached_property
    def counts(self) -> list[GroupCounts]:
        """What is known of each group, once all are counted."""
        found = []
        for group in self.groups:
            content = self._finished(self._counts, group, "count")
            moments = {name: Moments(**each) for name, each in content.pop("moments").items()}
            found.append(GroupCounts(**content, moments=moments))
        return found

    @cached_property
    def moments(self) -> dict[str, Moments]:
        """Of each dense feature that is standardised, over the training split."""
        names = [dense.name for dense in self.spec.dense if dense.transform == "standardise"]
        return {name: moments_of(self.counts, name) for name in names}

    @property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """The parts of each split, in row order, once all are written."""
        written = [self._finished(self._parts, group, "write") for group in self.groups]
        return {split: tuple(Part(**each[split]) for each in written if split in each) for split in SPLITS}

    @property
    def vocabularies(self) -> list[Path]:
        """The Parquet files of all vocabularies, once they are made."""
        return [directory / f"{name}.parquet" for name, directory in self._vocabularies.items()]

    def num_embeddings(self, feature: str) -> int:
        """Rows of a feature's table, once its vocabulary is made."""
        sparse = self._sparse(feature)
        return sparse.num_embeddings or 1 + int(self._vocabulary(feature)["values"])

    def fingerprint(self, feature: str) -> str:
        """What the ids of a feature mean."""
        sparse = self._sparse(feature)
        if sparse.num_embeddings is not None:
            return f"hash modulo {sparse.num_embeddings}"
        return str(self._vocabulary(feature)["fingerprint"])

    def _sparse(self, feature: str) -> SparseColumn:
        return next(sparse for sparse in self.spec.sparse if sparse.name == feature)

    def _made(self, feature: str) -> dict[str, Any] | None:
        content: dict[str, Any] | None = load_json(self._vocabularies[feature] / f"{feature}.json")
        return content

    def _vocabulary(self, feature: str) -> dict[str, Any]:
        content = self._made(feature)
        if content is None:
            raise UserError(f"feature {feature} has no vocabulary yet; run `--pass vocabulary` first")
        return content

    def _finished(self, directory: Path, group: Group, argument: str) -> dict[str, Any]:
        content: dict[str, Any] | None = load_json(directory / f"{group.number:06}.json")
        if content is None:
            path = self.files[group.file].path
            raise UserError(f"{path}: rows from {group.start} on wait; run `--pass {argument}` for all shards first")
        return content

    def _part_names(self) -> list[dict[str, str]]:
        """Paths of each group's parts, numbered without gaps in each split; UserError where one would be empty."""
        numbers, names = dict.fromkeys(SPLITS, 0), []
        for counts in self.counts:
            names.append({s: f"{s}/part-{numbers[s]:05}.parquet" for s in SPLITS if counts.rows[s]})
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


class _Times(Sequence[Any]):
    """The time columns of chunks, read when they are looked at."""

    def __init__(self, chunks: Sequence[Path]) -> None:
        self._chunks = chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: Any) -> Any:
        return load_times(self._chunks[index])


def _make_vocabulary(directory: Path, feature: str, runs: list[Path], min_count: int, range_values: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    table = merge_runs(feature, runs, min_count, range_values)
    save_vocabulary(directory, feature, table)
    fingerprint = fingerprint_of(feature, table["value"]).hex()
    save_json(directory / f"{feature}.json", {"values": table.num_rows, "fingerprint": fingerprint})
