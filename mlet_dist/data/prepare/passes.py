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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mlet_dist.data.id_counts import counts_to_plain
from mlet_dist.data.prepare.chunks import ChunkGroup
from mlet_dist.data.prepare.counting import count_group
from mlet_dist.data.prepare.fingerprints import (
    count_spec,
    write_spec,
)
from mlet_dist.data.prepare.known_values import KnownValues, make_known_vocabulary
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.pass_results import PassResults
from mlet_dist.data.prepare.raw_files import RawFile
from mlet_dist.data.prepare.raw_formats import SparseColumn, TableSpec
from mlet_dist.data.prepare.sealed_files import (
    Repairs,
    check_sealed,
    check_seals,
    save_record,
    seal_of,
)
from mlet_dist.data.prepare.vocabulary import lookup_path, make_vocabulary
from mlet_dist.data.prepare.worker_pool import Workers
from mlet_dist.data.prepare.writing import Encoder
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


class Passes(PassResults):
    """The passes over raw files; each reads the results of the passes before it from the work directory.

    Results are verified where they are read. A pass makes those again that are damaged, with a warning, whichever pass
    made them first.

    Args:
        spec: the table's description.
        files: the raw files, in order.
        out: the directory of the data set.
        range_values: about how many counts are in memory at a time while vocabularies are merged.
        like: the data set whose vocabularies and statistics are taken over, if any.
    """

    def __init__(
        self,
        spec: TableSpec,
        files: Sequence[RawFile],
        out: Path,
        range_values: int,
        like: LikeDataset | None = None,
    ) -> None:
        super().__init__(spec, files, out, like)
        self._range_values = range_values
        self._intact: set[int] = set()  # groups whose parts this process has written or verified
        self._repairs = Repairs()

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
        calls = (
            (self._vocabularies[name], self._counted[name], runs, self._range_values, self._known_values(name))
            for name in left
        )
        with Progress("vocabulary", len(left), "tables") as progress:
            for _ in workers.map(_make_vocabulary, calls):
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
        encoder = Encoder(write_spec(self.spec), self._vocabularies, self.scales)
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


def _make_vocabulary(
    directory: Path, sparse: SparseColumn, runs: list[Path], range_values: int, known: KnownValues | None
) -> None:
    if known is None:
        make_vocabulary(directory, sparse, runs, range_values)
    else:
        make_known_vocabulary(directory, sparse, runs, range_values, known)


def _run(workers: Workers, function: Callable[..., object], calls: Iterable[tuple[Any, ...]]) -> None:
    for _ in workers.map(function, calls):
        pass
