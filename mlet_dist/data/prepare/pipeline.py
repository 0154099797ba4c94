"""Preparation of a data set from raw files, in the resumable passes read, count, vocabulary, write and merge."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from mlet_dist.atomic_directory import check_free
from mlet_dist.data.location import RemotePath, data_set_path
from mlet_dist.data.prepare.dataset_manifest import assemble
from mlet_dist.data.prepare.file_lists import check_distinct, expand
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.passes import Passes, Shard
from mlet_dist.data.prepare.raw_files import RawFile, inspect_file
from mlet_dist.data.prepare.raw_formats import MAX_MIN_COUNT, JsonLines, TableSpec, criteo
from mlet_dist.data.prepare.reading import NoRowsError
from mlet_dist.data.prepare.split_files import misleading_names, rule_of_lists
from mlet_dist.data.prepare.splits import whole
from mlet_dist.data.prepare.work_files import WorkDirectory
from mlet_dist.data.prepare.worker_pool import WorkerKilledError, Workers, check_main_guard
from mlet_dist.data.schema import FILE_NAME, SPLITS, DatasetSchema
from mlet_dist.errors import UserError, one_line
from mlet_dist.machine_limits import memory_bytes
from mlet_dist.remote_directory import RemoteDirectory

PASSES = ("read", "count", "vocabulary", "write", "merge")
SHARDED = ("read", "count", "write")  # passes that can be sharded

SMALL_BYTES = 24 << 20  # below this size, starting processes takes longer than preparing in one
PROCESS_BYTES = 512 << 20  # memory of a process beside vocabularies: a block as text, as columns and as Parquet
RANGE_VALUE_BYTES = 256  # memory per value while counts are merged: the value, its count and a hash table's entry

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resources:
    """Limits on memory and processes.

    Attributes:
        memory: bytes of all processes together, without vocabularies; None is half of the machine's memory.
        processes: largest number of processes; None is the number of cores.
    """

    memory: int | None = None
    processes: int | None = None

    @property
    def bytes(self) -> int:
        """``memory``, or its default."""
        if self.memory is None:
            return max(PROCESS_BYTES, memory_bytes()[0] // 2)
        return self.memory

    def workers(self, size: int) -> int:
        """Return the number of processes for ``size`` bytes of raw data."""
        if self.bytes < PROCESS_BYTES:
            raise UserError(f"memory is {self.bytes >> 20} MiB; at least {PROCESS_BYTES >> 20} MiB are needed")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = cores if self.processes is None else self.processes
        if size < SMALL_BYTES and self.processes is None:
            return 1
        return max(1, min(wanted, self.bytes // PROCESS_BYTES))


def prepare(
    spec: TableSpec,
    raw: Sequence[str | Path] | Mapping[str, Sequence[str | Path]],
    out: Path | str,
    *,
    like: LikeDataset | None = None,
    resources: Resources | None = None,
    only: str | None = None,
    shard: Shard | None = None,
    defaults: Mapping[str, str] | None = None,
) -> DatasetSchema | None:
    """Prepare the data set ``out`` from raw files, in the order given; how rows are split is printed to stderr.

    Finished results are kept in ``.<name>.prepare`` beside ``out`` until the data set is complete. The same call
    resumes from them; a call with other arguments reuses those that they do not affect (module ``fingerprints``).

    Worker processes import the script that calls this function, so call it under ``if __name__ == "__main__":``.

    Args:
        spec: description of the raw table and of the features to make from it.
        raw: paths or URLs that fsspec opens, of files, of directories, which stand for all files below them, or with
            ``*``, ``?``, ``[…]`` and ``**``; or such a list for each split, in place of ``spec.split``.
        out: a directory, or its URL, that does not exist or is empty. For a URL, the work directory is in the current
            directory, and the data set is uploaded when it is complete.
        like: take the vocabularies, sizes, means and deviations of this data set, whose features ``spec`` must make in
            the same way. A list for valid or test alone is then enough.
        resources: limits on memory and processes.
        only: run only this one of ``PASSES``, to share the work among machines; the passes before it must be finished.
        shard: this machine's shard of the pass ``only``.
        defaults: the value of columns that a file lacks, such as the label of rows that have none.

    Returns:
        The data set's schema, or None after a pass other than merge.

    Raises:
        UserError: ``out`` is not empty, a raw file is unusable or given twice, none has rows, a split is empty, the
            passes before ``only`` are not finished, or ``spec`` does not make the features of ``like``.
        WorkerKilledError: a worker process was killed.
    """
    resources = resources or Resources()
    if not raw:
        raise UserError("no raw file was given; name at least one")
    place = data_set_path(str(out))
    remote = RemoteDirectory(place.url) if isinstance(place, RemotePath) else None
    out = Path(remote.local_name) if remote is not None else Path(str(place))
    if not out.parts:  # Path("") is Path(".")
        raise UserError("out is empty or the current directory; name a directory that does not exist yet")
    if only is not None and only not in PASSES:
        raise UserError(f"pass {only!r} does not exist; the passes are {', '.join(PASSES)}")
    if shard is not None and only not in SHARDED:
        raise UserError(
            f"a shard goes with one of the passes {', '.join(SHARDED)}; {only or 'a whole run'} cannot be sharded"
        )
    for sparse in spec.sparse:
        if not 1 <= sparse.min_count <= MAX_MIN_COUNT:
            raise UserError(f"min_count is {sparse.min_count}; it must be at least 1 and at most {MAX_MIN_COUNT}")
    out = Path(os.path.realpath(out))
    check_main_guard()
    spec, paths = _split_lists(spec, raw, alone=like is not None)
    warnings = []
    if like is not None:
        spec, of_label = like.check(spec)
        warnings.append(of_label)
        if like.grows and "train" not in spec.split.splits:
            raise UserError(
                f"{like.path}: --grow takes new values from the training split, but all rows are "
                f"{' and '.join(spec.split.splits)}; give files with --train, or leave out --grow"
            )
    check_distinct(paths)
    # Inspect all files first, so that a missing last file is found before an hour of reading.
    lacking = tuple((defaults or {}).items())
    files = [inspect_file(path, spec.text, spec.used_columns, lacking) for path in paths]
    _check_keys(spec, files, like)
    processes = resources.workers(sum(file.size for file in files))
    passes = Passes(spec, files, out, max(1 << 16, resources.bytes // processes // RANGE_VALUE_BYTES), like)
    for warning in (*warnings, misleading_names(spec.split, paths)):
        if warning is not None:
            _logger.warning("%s", one_line(warning))
    if passes.is_published:  # by a run that was killed before it could remove the work directory
        passes.work.remove()
    passes.work.remove_leftovers()
    claim = passes.work.root / "claim"
    if remote is not None:
        if claim.exists() and remote.is_published(passes.data, FILE_NAME):
            passes.work.remove()
        remote.check_free(claim)
    with _os_errors(out):
        check_free(out)
    missing = [parent for parent in out.parents if not parent.exists()]
    with (
        _os_errors(out),
        passes.work.locked(shared=shard is not None),
        _kept_work(passes.work, missing, alone=shard is None),
        _arrow_threads(1),
        Workers(processes) as workers,
    ):
        if only in (None, "read"):
            passes.remove_stale()
            passes.read(workers, shard or Shard())
        if only in (None, "count"):
            passes.count(workers, shard or Shard())
        if only in (None, "vocabulary"):
            lines = passes.with_repairs(workers, passes.describe_splits)
            with suppress(OSError):  # stderr may be closed
                print(*map(one_line, lines), sep="\n", file=sys.stderr, flush=True)
            passes.vocabulary(workers)
        if only in (None, "write"):
            passes.write(workers, shard or Shard())
        if only not in (None, "merge"):
            return None
        passes.verify(workers)
        schema = passes.with_repairs(workers, lambda: assemble(passes))
        if remote is not None:
            remote.publish(passes.data, FILE_NAME, claim)
        else:
            if out.exists():
                out.rmdir()  # it is empty (check_free); renaming over it fails on some file systems
            passes.data.rename(out)
        passes.work.remove()
    return schema


def prepare_criteo(raw: Sequence[Path], out: Path, *, min_count: int = 1) -> DatasetSchema:
    """Prepare Criteo logs: the first 80% of the rows are train, the next 10% valid, the last 10% test."""
    schema = prepare(criteo(min_count), raw, out)
    assert schema is not None
    return schema


def _split_lists(
    spec: TableSpec, raw: Sequence[str | Path] | Mapping[str, Sequence[str | Path]], *, alone: bool
) -> tuple[TableSpec, list[str]]:
    """Return the description with the rule for ``raw``, and the raw files that ``raw`` names.

    ``alone`` lets the files of one split be all of them, also of valid or test.
    """
    if not isinstance(raw, Mapping):
        return spec, expand([str(path) for path in raw])
    lists = {split: expand([str(path) for path in paths]) for split, paths in raw.items()}
    if alone and len(lists) == 1 and set(lists) <= set(SPLITS):
        [(split, paths)] = lists.items()
        return replace(spec, split=whole(split)), paths
    return replace(spec, split=rule_of_lists(lists)), [path for split in SPLITS for path in lists.get(split, ())]


def _check_keys(spec: TableSpec, files: Sequence[RawFile], like: LikeDataset | None) -> None:
    """Warn of used columns that are keys of no object at the start of any file of JSON lines; an error with ``like``.

    Raises:
        UserError: as above, since rows without a column would be taken for rows of the same kind as before.
    """
    found = {name for file in files for name in (*file.columns, *(key for key, _ in file.constants))}
    if isinstance(spec.text, JsonLines) and found:
        for column in spec.used_columns:
            if column not in found and like is not None:
                raise UserError(
                    f"{files[0].path}: no object at the start of a file has the key {column!r}, which {like.path} was "
                    f"made from; the keys are {', '.join(sorted(found)):.300}"
                )
            if column not in found:
                _logger.warning(
                    "%s: no object at the start of a file has the key %r, so it is missing there; the keys are %.300s",
                    *(one_line(files[0].path), column, ", ".join(sorted(found))),
                )


@contextmanager
def _kept_work(work: WorkDirectory, missing: Sequence[Path], alone: bool) -> Iterator[None]:
    """On an error, keep finished results and name their directory; remove it if a new run could not use any of them.

    After an input error (UserError), finished files are worth keeping, but finished blocks of the faulty file are not,
    since the file will be replaced. After a full disk, an interrupt or a killed worker, finished blocks are, too. If
    this process is not ``alone``, other shards may be running, and nothing is removed.

    Args:
        work: the work directory.
        missing: parents of the data set that did not exist before; they are removed with the work directory.
        alone: whether no other shard can be running.
    """
    try:
        yield
    except BaseException as error:
        finished = work.has_finished_files() if type(error) is UserError else work.has_finished_blocks()
        finished = finished and not isinstance(error, NoRowsError)
        if alone and not finished:
            work.remove()
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()
        if finished and isinstance(error, UserError | OSError):
            # After an input error the same command would only fail again.
            same = isinstance(error, OSError | WorkerKilledError)
            use = "the same command resumes from it" if same else "it is used again once the error is corrected"
            kept = f"(finished work is kept in {work.root}; {use})"
            raise type(error)(f"{_reason(error)} {kept}") from error
        raise


@contextmanager
def _os_errors(out: Path) -> Iterator[None]:
    """Turn an OSError into a UserError that names the data set."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    # The system's text, since pyarrow's adds file positions and the like.
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


@contextmanager
def _arrow_threads(count: int) -> Iterator[None]:
    """Limit Arrow's thread pool, since the processes are the parallelism."""
    before = pa.cpu_count()
    pa.set_cpu_count(count)
    try:
        yield
    finally:
        pa.set_cpu_count(before)
