"""The passes over raw data: read, count, vocabulary, write. Each skips what is finished and may do a share of its work.

read        files -> chunks                          a share is a number of files
count       chunks -> counts of each value           a share is a number of groups
vocabulary  counts -> ids                            all at once
write       chunks -> parts                          a share is a number of groups
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

from mlet_dist.data.blocks import BLOCK_BYTES, Block, RawFile, parquet_blocks, text_blocks
from mlet_dist.data.chunks import CHUNK_VERSION, ChunkInfo, Rejected, load_info, load_times, save_chunk
from mlet_dist.data.counting import GroupCounts, Moments, count_group, moments_of
from mlet_dist.data.encoding import Encoder
from mlet_dist.data.groups import GROUP_ROWS, Group, make_groups
from mlet_dist.data.parse import MAX_EXAMPLES, parse_block
from mlet_dist.data.schema import FORMAT_VERSION, SPLITS, Part
from mlet_dist.data.splits import Splitter, resolve
from mlet_dist.data.table import TableSpec
from mlet_dist.data.vocabulary import fingerprint_of, merge_runs, save_vocabulary
from mlet_dist.data.work import WorkDirectory, key_of, load_json, save_json
from mlet_dist.data.workers import Workers
from mlet_dist.errors import UserError
from mlet_dist.progress import Progress

TOLERATED_LINES = 10  # malformed ones that are never an error, unless there are no others
EXPECTED_LINES = 10_000_000  # what a file is taken to have at least, until its end is seen
SHOWN_EXAMPLES = 3
PROCESSES_OF_A_FILE = 6  # as many parse what one thread decompresses

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Shard:
    """Share ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    def of(self, items: Sequence[Any]) -> Sequence[Any]:
        """Every ``count``-th item."""
        return items[self.index :: self.count]


@dataclass(frozen=True)
class FileRead:
    """What is known of a raw file once it is read.

    Attributes:
        chunk_rows: rows of each chunk.
        lines: lines in all, blank ones not counted.
        malformed: how many were skipped.
        examples: the first of them.
        times: the kinds of time in the split's column, each with the first line that has it.
    """

    chunk_rows: tuple[int, ...]
    lines: int
    malformed: int
    examples: tuple[Rejected, ...]
    times: dict[str, int]


class Passes:
    """The passes over ``files``; each needs what the ones before it have left in ``work``."""

    def __init__(self, spec: TableSpec, files: Sequence[RawFile], out: Path) -> None:
        self.spec, self.files = spec, files
        self._keys = [key_of(FORMAT_VERSION, CHUNK_VERSION, BLOCK_BYTES, GROUP_ROWS, spec, file) for file in files]
        self.work = WorkDirectory(out, self._keys, key_of(*self._keys))
        self.data = self.work.of("data")

    def read(self, workers: Workers, shard: Shard) -> None:
        """Parse the files into chunks.

        Raises:
            UserError: a file cannot be read or holds too many malformed lines.
        """
        mine = [index for index in shard.of(range(len(self.files))) if self._marker(index) is None]
        with Progress("read", sum(self.files[index].size for index in mine), "bytes") as progress:
            # Text that is compressed is read by a thread of this process, one a file.
            threads = max(1, min(len(mine), workers.processes // PROCESSES_OF_A_FILE))
            stopped = Event()
            with ThreadPoolExecutor(threads) as pool:
                reads = [pool.submit(self._read_file, workers, index, progress, threads, stopped) for index in mine]
                try:
                    for read in as_completed(reads):
                        read.result()
                finally:
                    stopped.set()

    def count(self, workers: Workers, shard: Shard) -> None:
        """Count the values of the training split, and the rows of every split."""
        directory = self.work.of("count")
        directory.mkdir(parents=True, exist_ok=True)
        left = [g for g in shard.of(self.groups) if load_json(directory / f"{g.number:06}.json") is None]
        calls = ((self.spec, self.splitter, group, directory / f"{group.number:06}.run") for group in left)
        with Progress("count", sum(group.rows for group in left), "rows") as progress:
            for group, counts in zip(left, workers.map(count_group, calls), strict=True):
                save_json(directory / f"{group.number:06}.json", asdict(counts))
                progress.update(group.rows)

    def vocabulary(self, workers: Workers, range_values: int) -> None:
        """Merge the counts into vocabularies; ``range_values`` of them are held at a time."""
        directory = self.work.of("vocabulary")
        directory.mkdir(parents=True, exist_ok=True)
        runs = [self.work.of("count") / f"{group.number:06}.run" for group in self.groups]
        _ = self.counts  # all of them are there
        counted = [sparse for sparse in self.spec.sparse if sparse.encoding == "vocabulary"]
        left = [sparse for sparse in counted if load_json(directory / f"{sparse.name}.json") is None]
        calls = ((directory, sparse.name, runs, sparse.min_count, range_values) for sparse in left)
        with Progress("vocabulary", len(left), "features") as progress:
            for _ in workers.map(_make_vocabulary, calls):
                progress.update(1)

    def write(self, workers: Workers, shard: Shard) -> None:
        """Write the parts of every split.

        Raises:
            UserError: a split has no rows.
        """
        directory = self.work.of("write")
        for path in (*(self.data / split for split in SPLITS), directory):
            path.mkdir(parents=True, exist_ok=True)
        encoder = Encoder(self.spec, self.work.of("vocabulary"), self.moments)
        names = self._part_names()
        for sparse in self.spec.sparse:
            self.num_embeddings(sparse.name)
        left = [g for g in shard.of(self.groups) if load_json(directory / f"{g.number:06}.json") is None]
        calls = ((encoder, self.splitter, group, self.data, names[group.number], directory) for group in left)
        with Progress("write", sum(group.rows for group in left), "rows") as progress:
            for group, parts in zip(left, workers.map(Encoder.write, calls), strict=True):
                save_json(directory / f"{group.number:06}.json", {split: asdict(p) for split, p in parts.items()})
                progress.update(group.rows)

    @property
    def renamed(self) -> bool:
        """Whether the data set has its name already: then what says that parts are written is no longer so."""
        return self.work.of("write").is_dir() and not self.data.is_dir()

    @cached_property
    def reads(self) -> list[FileRead]:
        """What is known of each file, once all are read."""
        found = []
        for index, file in enumerate(self.files):
            content = self._marker(index)
            if content is None:
                raise UserError(f"{file.path}: is not read yet; run `--pass read` for all shards first")
            examples = tuple(Rejected(**each) for each in content.pop("examples"))
            found.append(FileRead(tuple(content.pop("chunk_rows")), **content, examples=examples))
        return found

    @cached_property
    def groups(self) -> list[Group]:
        """The groups of all files."""
        return make_groups(
            [
                [(self._chunk(index, number), rows) for number, rows in enumerate(read.chunk_rows)]
                for index, read in enumerate(self.reads)
            ]
        )

    @cached_property
    def splitter(self) -> Splitter:
        """Says the split of each row.

        Raises:
            UserError: no file holds a line, or their times are of two kinds.
        """
        _one_kind_of_time(
            self.spec, [(file.path, read.times) for file, read in zip(self.files, self.reads, strict=True)]
        )
        rows = [sum(read.chunk_rows) for read in self.reads]
        if not sum(rows):
            raise UserError(f"{self.files[0].path}: holds no lines; nothing can be split into train, valid and test")
        return resolve(self.spec.split, rows, _Times([path for group in self.groups for path in group.chunks]))

    @cached_property
    def counts(self) -> list[GroupCounts]:
        """What is known of each group, once all are counted."""
        found = []
        for group in self.groups:
            content = self._finished("count", group, "count")
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
        written = [self._finished("write", group, "write") for group in self.groups]
        return {split: tuple(Part(**each[split]) for each in written if split in each) for split in SPLITS}

    def num_embeddings(self, feature: str) -> int:
        """Rows of a feature's table, once its vocabulary is made."""
        [sparse] = [sparse for sparse in self.spec.sparse if sparse.name == feature]
        if sparse.num_embeddings is not None:
            return sparse.num_embeddings
        return 1 + int(self._vocabulary(feature)["values"])

    def fingerprint(self, feature: str) -> str:
        """What the ids of a feature mean."""
        [sparse] = [sparse for sparse in self.spec.sparse if sparse.name == feature]
        if sparse.num_embeddings is not None:
            return f"hash modulo {sparse.num_embeddings}"
        return str(self._vocabulary(feature)["fingerprint"])

    def _vocabulary(self, feature: str) -> dict[str, Any]:
        content: dict[str, Any] | None = load_json(self.work.of("vocabulary") / f"{feature}.json")
        if content is None:
            raise UserError(f"feature {feature} has no vocabulary yet; run `--pass vocabulary` first")
        return content

    def _finished(self, name: str, group: Group, argument: str) -> dict[str, Any]:
        content: dict[str, Any] | None = load_json(self.work.of(name) / f"{group.number:06}.json")
        if content is None:
            path = self.files[group.file].path
            raise UserError(f"{path}: rows from {group.start} on wait; run `--pass {argument}` for all shards first")
        return content

    def _marker(self, index: int) -> dict[str, Any] | None:
        content: dict[str, Any] | None = load_json(self.work.raw(self._keys[index]) / "done.json")
        return content

    def _chunk(self, index: int, number: int) -> Path:
        return self.work.raw(self._keys[index]) / f"{number:06}.arrow"

    def _read_file(self, workers: Workers, index: int, progress: Progress, files_at_once: int, stopped: Event) -> None:
        raw = self.files[index]
        self.work.raw(self._keys[index]).mkdir(parents=True, exist_ok=True)
        infos: list[ChunkInfo] = []
        examples: list[Rejected] = []
        times: dict[str, int] = {}
        lines = malformed = passed = 0
        calls = self._calls(index, progress.update, workers.processes > 1)
        for info in workers.map(_read_block, calls, at_once=-(-workers.processes // files_at_once)):
            if stopped.is_set():  # by an interrupt, or what is wrong with another file
                return
            infos.append(info)
            room = MAX_EXAMPLES - len(examples)
            examples += [Rejected(passed + each.line, each.reason, each.text) for each in info.examples[:room]]
            times = {kind: passed + line for kind, line in info.times.items()} | times
            _one_kind_of_time(self.spec, [(raw.path, times)])
            lines, malformed, passed = lines + info.count, malformed + info.malformed, passed + info.passed
            # Bad lines at the beginning are no reason, but a file of another format need not be read to its end.
            if malformed > self._tolerated(max(lines, EXPECTED_LINES)):
                raise _too_malformed(raw.path, malformed, lines, examples, "the first ")
        if not lines:
            raise UserError(f"{raw.path}: holds no lines; raw data is expected")
        if malformed == lines or malformed > self._tolerated(lines):
            raise _too_malformed(raw.path, malformed, lines, examples)
        if malformed:
            shown = "; ".join(f"line {each.line}: {each.reason}" for each in examples[:SHOWN_EXAMPLES])
            _logger.warning("%s: skipped %d malformed of %d lines, e.g. %s", raw.path, malformed, lines, shown)
        found = FileRead(tuple(info.rows for info in infos), lines, malformed, tuple(examples), times)
        save_json(self.work.raw(self._keys[index]) / "done.json", asdict(found))

    def _tolerated(self, lines: int) -> float:
        return max(TOLERATED_LINES, self.spec.max_malformed * lines)

    def _calls(self, index: int, update: Callable[[int], None], aside: bool) -> Iterator[tuple[Any, ...]]:
        raw = self.files[index]
        blocks = text_blocks if self.spec.text is not None else parquet_blocks
        for block in blocks(raw, update):
            path = self._chunk(index, block.index)
            if path.exists():
                yield self.spec, raw.columns, None, path
            else:
                yield self.spec, raw.columns, block.put_aside(path.with_suffix(".text")) if aside else block, path

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


def _one_kind_of_time(spec: TableSpec, found: Sequence[tuple[str, dict[str, int]]]) -> None:
    """Refuse times of two kinds, which have no order, over files and the first line of each kind in them."""
    first: dict[str, str] = {}
    for path, times in found:
        for kind, line in times.items():
            first.setdefault(kind, f"{kind} ({path}: line {line})")
    if len(first) > 1:
        raise UserError(
            f"{found[0][0]}: {spec.split.column} must hold times of one kind in all files, but holds "
            f"{' and '.join(first.values())}"
        )


def _too_malformed(path: str, malformed: int, lines: int, examples: list[Rejected], which: str = "") -> UserError:
    first = examples[0]
    return UserError(
        f"{path}: {malformed} of {which}{lines} lines are malformed, e.g. line {first.line}: {first.reason}"
    )


class _Times(Sequence[Any]):
    """The time columns of chunks, read when they are looked at."""

    def __init__(self, chunks: Sequence[Path]) -> None:
        self._chunks = chunks

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, index: Any) -> Any:
        return load_times(self._chunks[index])


def _read_block(spec: TableSpec, columns: tuple[str, ...], block: Block | None, path: Path) -> ChunkInfo:
    if block is None:
        info = load_info(path)
        assert info is not None
        return info
    table, info = parse_block(spec, columns, block)
    save_chunk(path, table, info)
    return info


def _make_vocabulary(directory: Path, feature: str, runs: list[Path], min_count: int, range_values: int) -> None:
    table = merge_runs(feature, runs, min_count, range_values)
    save_vocabulary(directory, feature, table)
    fingerprint = fingerprint_of(feature, table["value"]).hex()
    save_json(directory / f"{feature}.json", {"values": table.num_rows, "fingerprint": fingerprint})
