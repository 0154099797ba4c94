"""The read pass: raw files become chunks, within a limit on malformed lines; times must be of one kind."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

from mlet_dist.data.prepare.chunks import ChunkInfo, Rejected, label_column, load_info, save_chunk
from mlet_dist.data.prepare.fingerprints import read_spec
from mlet_dist.data.prepare.list_columns import BEYOND, EMPTY, SPLIT
from mlet_dist.data.prepare.parsing import parse_block
from mlet_dist.data.prepare.raw_blocks import Block, parquet_blocks, text_blocks
from mlet_dist.data.prepare.raw_files import RawFile
from mlet_dist.data.prepare.raw_formats import RAW_FORMATS, JsonLines, LabelColumn, TableSpec
from mlet_dist.data.prepare.raw_values import MISSING_NUMBERS
from mlet_dist.data.prepare.sealed_files import DamagedPieceError, load_record, save_record
from mlet_dist.data.prepare.splits import DATES, FRACTIONS, WHOLE_NUMBERS
from mlet_dist.data.prepare.text_lines import MAX_EXAMPLES
from mlet_dist.data.prepare.worker_pool import Workers
from mlet_dist.errors import UserError, one_line
from mlet_dist.progress import Progress

TOLERATED_LINES = 10  # so many malformed lines are never an error, unless a file has no other lines
EXPECTED_LINES = 10_000_000  # a file is assumed to have at least so many lines until its end is read
MAX_OTHER_LABELS = 1e-4  # largest share of lines whose label is a number other than 0 and 1
SHOWN_EXAMPLES = 3  # malformed lines, or files without rows, in a message
PROCESSES_PER_FILE = 6  # so many processes parse as fast as one thread decompresses

_SET_ENCODING = "set `encoding` in the description, such as cp1252 or latin-1"

_logger = logging.getLogger(__name__)


class NoRowsError(UserError):
    """No raw file has rows, so that no finished work is worth keeping."""


@dataclass(frozen=True)
class FileRead:
    """Statistics of a raw file that was read.

    Attributes:
        chunk_rows: number of rows of each chunk.
        lines: number of lines without blank ones.
        malformed: number of malformed lines, which were skipped.
        examples: the first malformed lines.
        times: the kinds of times in the split's column, each with the number of its first line.
        other_labels, counts: as in ``ChunkInfo``, of the whole file.
    """

    chunk_rows: tuple[int, ...]
    lines: int
    malformed: int
    examples: tuple[Rejected, ...]
    times: dict[str, int]
    other_labels: dict[str, dict[str, int]]
    counts: dict[str, dict[str, int]]


class Reading:
    """Reads ``files`` into chunks.

    Args:
        spec: description of the table.
        files: the raw files, in order.
        directories: the directory of each file's chunks.
    """

    def __init__(self, spec: TableSpec, files: Sequence[RawFile], directories: Sequence[Path]) -> None:
        self._spec, self._max_malformed, self._rule = read_spec(spec), spec.max_malformed, spec.split
        self._is_fixed = spec.source in RAW_FORMATS
        self._files, self._directories = files, directories
        self._warned: Path | None = None

    def run(self, workers: Workers, numbers: Sequence[int]) -> None:
        """Read the files with these numbers, except those that were read before.

        Raises:
            UserError: a file cannot be read or has too many malformed lines.
        """
        left = []
        for number in numbers:
            found = self._load(number)
            if found is None:
                left.append(number)
            else:
                self._report_malformed(number, found)
        self.read_again(workers, left)
        reads = [found for number in numbers if (found := self._load(number)) is not None]
        self._report_labels(reads)
        self._report_lists(reads)
        self._report_empty(numbers)

    def read_again(self, workers: Workers, left: Sequence[int], damaged: Path | None = None) -> None:
        """Read the files with these numbers, even if they were read before; sound chunks of theirs are kept.

        Args:
            damaged: a piece of which a warning was given before.
        """
        self._warned = damaged
        with Progress("read", sum(self._files[number].size for number in left), "bytes") as progress:
            # Compressed and remote text is read by threads of this process, one per file.
            threads = max(1, min(len(left), workers.processes // PROCESSES_PER_FILE))
            stopped = Event()
            with ThreadPoolExecutor(threads) as pool:
                reads = [pool.submit(self._read, workers, number, progress, threads, stopped) for number in left]
                try:
                    for read in as_completed(reads):
                        read.result()
                finally:
                    stopped.set()

    @cached_property
    def reads(self) -> list[FileRead]:
        """The statistics of each file.

        Raises:
            UserError: a file was not read yet or has too many malformed lines.
        """
        reads = []
        for number, file in enumerate(self._files):
            found = self._load(number)
            if found is None:
                raise UserError(f"{file.path}: is not read yet; run `--pass read` for all shards first")
            self._check_malformed(number, found)
            reads.append(found)
        return reads

    def chunk(self, number: int, index: int) -> Path:
        """Return the path of chunk ``index`` of file ``number``."""
        return self._directories[number] / f"{index:06}.arrow"

    def check_times(self) -> None:
        """Raise UserError if the times of the files are of two kinds."""
        self._check_one_kind([(file.path, read.times) for file, read in zip(self._files, self.reads, strict=True)])

    def _load(self, number: int) -> FileRead | None:
        content: dict[str, Any] | None = load_record(self._directories[number] / "done.json")
        if content is None:
            return None
        examples = tuple(Rejected(**each) for each in content.pop("examples"))
        return FileRead(tuple(content.pop("chunk_rows")), **content, examples=examples)

    def _read(self, workers: Workers, number: int, progress: Progress, files_at_once: int, stopped: Event) -> None:
        raw = self._files[number]
        self._directories[number].mkdir(parents=True, exist_ok=True)
        infos: list[ChunkInfo] = []
        examples: list[Rejected] = []
        times: dict[str, int] = {}
        labels = {label.column_name: Counter[str]() for label in self._spec.labels}
        counted = (*map(label_column, labels), *(s.name for s in self._spec.sparse if s.multi_valued))
        counts = {name: Counter[str]() for name in counted}
        lines = malformed = passed = 0
        calls = self._calls(number, progress.update, workers.processes > 1)
        for info in workers.map(_read_block, calls, at_once=-(-workers.processes // files_at_once)):
            if stopped.is_set():  # by an interrupt, or by an error in another file
                return
            infos.append(info)
            missing = MAX_EXAMPLES - len(examples)
            examples += [Rejected(passed + each.line, each.reason, each.text) for each in info.examples[:missing]]
            times = {kind: passed + line for kind, line in info.times.items()} | times
            self._check_one_kind([(raw.path, times)])
            lines, malformed, passed = lines + info.count, malformed + info.malformed, passed + info.passed
            for name, found in info.other_labels.items():
                labels[name].update(found)
            for name, found in info.counts.items():
                counts[name].update(found)
            self._check_labels(raw.path, labels, max(lines, EXPECTED_LINES))
            # Malformed lines may all be at the start, but a file of another format need not be read to its end.
            if malformed > self._tolerated(max(lines, EXPECTED_LINES)):
                raise self._too_malformed(raw.path, malformed, lines, examples, "the first ")
        self._check_labels(raw.path, labels, lines)
        if malformed and malformed == lines:
            raise self._too_malformed(raw.path, malformed, lines, examples)
        result = FileRead(
            tuple(info.rows for info in infos),
            lines,
            malformed,
            tuple(examples),
            times,
            {name: dict(found) for name, found in labels.items()},
            {name: dict(found) for name, found in counts.items()},
        )
        # Save before the check, so that a run with a higher limit need not read the file again.
        save_record(self._directories[number] / "done.json", asdict(result))
        self._report_malformed(number, result)

    def _report_labels(self, reads: Sequence[FileRead]) -> None:
        """Warn of labels of the description that occur nowhere, such as yes where the column holds Yes."""
        for label in self._spec.labels:
            found = set[str]().union(*(read.counts.get(label_column(label.column_name), {}) for read in reads))
            for key, listed in (("positive", label.positive), ("negative", label.negative)):
                if absent := [each for each in listed or () if each not in found]:
                    text = "label.%s: %s occurs in no row of column %s; are these the labels as the files write them?"
                    _logger.warning(text, key, one_line(", ".join(map(repr, absent))), label.column)

    def _report_lists(self, reads: Sequence[FileRead]) -> None:
        """Warn of elements of lists that were left out, and of separators that occur nowhere."""
        for sparse in self._spec.sparse:
            if not sparse.multi_valued:
                continue
            counts = Counter[str]()
            for read in reads:
                counts.update(read.counts[sparse.name])
            if counts[EMPTY]:
                _logger.warning("%s: left out %d empty or missing elements of lists", sparse.name, counts[EMPTY])
            if counts[BEYOND]:
                text = "%s: left out %d values of lists with more than max_len %d values"
                _logger.warning(text, sparse.name, counts[BEYOND], sparse.max_len)
            if sparse.separator is not None and not counts[SPLIT]:
                text = "%s: the separator %r occurs in no row of column %s, so that each row has one value at most"
                _logger.warning(text, sparse.name, sparse.separator, sparse.column)

    def _report_malformed(self, number: int, found: FileRead) -> None:
        """Raise UserError if too many lines of a file are malformed; log a warning if some are."""
        self._check_malformed(number, found)
        if found.malformed:
            shown = "; ".join(f"line {each.line}: {each.reason}" for each in found.examples[:SHOWN_EXAMPLES])
            if any(map(self._lacks_encoding, found.examples)):
                shown += f" ({_SET_ENCODING})"
            _logger.warning(
                "%s: skipped %d malformed of %d lines, e.g. %s",
                *(one_line(self._files[number].path), found.malformed, found.lines, one_line(shown)),
            )

    def _report_empty(self, numbers: Sequence[int]) -> None:
        """Log a warning if some of the files have no rows, as part files of Spark and Hive may."""
        empty = [one_line(self._files[number].path) for number in numbers if not self._lines_of(number)]
        if empty and len(empty) < len(self._files):
            more = f", … ({len(empty)} files)" if len(empty) > SHOWN_EXAMPLES else ""
            _logger.warning("no rows in %s%s: passed over", ", ".join(empty[:SHOWN_EXAMPLES]), more)

    def _lines_of(self, number: int) -> int:
        found = self._load(number)
        return 0 if found is None else found.lines

    def _check_malformed(self, number: int, found: FileRead) -> None:
        if found.malformed > self._tolerated(found.lines):
            raise self._too_malformed(self._files[number].path, found.malformed, found.lines, found.examples)

    def _check_labels(self, path: str, others: Mapping[str, Mapping[str, int]], lines: int) -> None:
        """Raise UserError if more than a stray row has a number other than 0 and 1 as its label."""
        for label in self._spec.labels:
            self._check_label(path, label, others[label.column_name], lines)

    def _check_label(self, path: str, label: LabelColumn, others: Mapping[str, int], lines: int) -> None:
        # A description can say what other numbers mean; a fixed format cannot.
        if sum(others.values()) <= max(MAX_OTHER_LABELS * lines, TOLERATED_LINES if self._is_fixed else 0):
            return
        held = ", ".join(f"{value} ({count:,} times)" for value, count in sorted(others.items()))
        example = _positive_label(others)
        advice = (
            f"say which labels are positive: `positive_from: {example}` in `label` makes those from {example} on 1 and "
            f"the others 0, and `positive: [{example}]` makes the listed ones 1"
        )
        if self._is_fixed:
            advice = "labels of this format are 0 and 1; describe other files for `mlet prepare table`"
        raise UserError(f"{path}: the label column {label.column!r} holds {held:.200} besides 0 and 1; {advice}")

    def _tolerated(self, lines: int) -> float:
        return max(TOLERATED_LINES, self._max_malformed * lines)

    def _calls(self, number: int, update: Callable[[int], None], spill: bool) -> Iterator[tuple[Any, ...]]:
        """Yield the arguments of ``_read_block`` for each block of a file; a finished block is not passed on."""
        raw = self._files[number]
        text = self._spec.text
        for block in parquet_blocks(raw, update) if text is None else text_blocks(raw, update, text.encoding):
            path = self.chunk(number, block.index)
            try:
                info = load_info(path)
            except DamagedPieceError as damage:
                if path != self._warned:
                    _logger.warning("%s; it is made again", damage)
                info = None
            if info is not None:
                yield self._spec, raw, info, path
            else:
                yield self._spec, raw, block.spill(path.with_suffix(".text")) if spill else block, path

    def _too_malformed(
        self, path: str, malformed: int, lines: int, examples: Sequence[Rejected], which: str = ""
    ) -> UserError:
        first = examples[0]
        advice = "check the format of the file"
        if self._is_text_label(first):
            advice = 'list the labels that mean 1 in `label`, such as `positive: ["yes"]`'
        elif self._lacks_label(first):
            advice = "set `missing: unknown` for a label that rows may lack"
        elif "holds a list instead of a text" in first.reason:
            advice = "set `multi_valued: true` for lists"
        elif self._lacks_encoding(first):
            advice = _SET_ENCODING
        elif isinstance(self._spec.text, JsonLines) and "JSON object" in first.reason:
            advice = "each line must be one JSON object"
        # A file of malformed lines alone is never accepted.
        limit = "" if malformed == lines and not which else ", or raise --max-malformed"
        return UserError(
            f"{path}: {malformed} of {which}{lines} lines are malformed, e.g. line {first.line}: {first.reason}; "
            f"{advice}{limit}"
        )

    def _is_text_label(self, example: Rejected) -> bool:
        """Return whether a line is malformed since its label is a text that a description could map."""
        found = re.fullmatch(r"(.*) is (['\"])(.+)\2 instead of 0 or 1", example.reason)
        columns = [label.column for label in self._spec.labels]
        is_label = found is not None and found[1] in columns and not self._is_fixed
        return is_label and found is not None and found[3].lower() not in MISSING_NUMBERS

    def _lacks_label(self, example: Rejected) -> bool:
        """Return whether a line is malformed since it lacks one of several labels."""
        columns = [label.column for label in self._spec.more_labels and self._spec.labels]
        return any(re.match(rf"{re.escape(name)} is (''|None) instead of ", example.reason) for name in columns)

    def _lacks_encoding(self, example: Rejected) -> bool:
        """Return whether a description could name the encoding of a malformed line."""
        return "is not UTF-8" in example.reason and not self._is_fixed

    def _check_one_kind(self, found: Sequence[tuple[str, dict[str, int]]]) -> None:
        """Raise UserError for times of two kinds, which cannot be ordered; ``found`` has each file's ``times``."""
        first: dict[str, str] = {}
        for path, times in found:
            for kind, line in times.items():
                shown = WHOLE_NUMBERS if kind == FRACTIONS else kind  # they are ordered together
                first.setdefault(shown, f"{kind} ({path}: line {line})")
        if len(first) > 1:
            raise UserError(
                f"{found[0][0]}: {self._spec.split.column} must hold times of one kind in all files, but holds "
                f"{' and '.join(first.values())}"
            )
        if self._rule.starts_are_dates and DATES not in first and first:
            raise UserError(
                f"split.starts are dates or times, but {self._rule.column} holds {next(iter(first.values()))}; write "
                "them as the column does"
            )


def _positive_label(others: Mapping[str, int]) -> str:
    """Return the label that is most likely positive: the largest of those besides 0 and 1, or 1."""
    numbers = [text for text in others if re.fullmatch(r"-?[0-9.]+", text)]
    return max([*numbers, "1"], key=float)


def _read_block(spec: TableSpec, file: RawFile, block: Block | ChunkInfo, path: Path) -> ChunkInfo:
    """Parse a block into the chunk ``path``; a block whose chunk is finished is given by its statistics."""
    if isinstance(block, ChunkInfo):
        return block
    table, info = parse_block(spec, file.columns, block, file.constants)
    save_chunk(path, table, info)
    return info
