"""Raw data becomes a data set: read, count, vocabulary, write and merge, each of them restartable."""

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from mlet_dist.atomic_directory import check_free
from mlet_dist.data.prepare.dataset_manifest import assemble
from mlet_dist.data.prepare.passes import Passes, Shard
from mlet_dist.data.prepare.raw_blocks import examine
from mlet_dist.data.prepare.raw_formats import MAX_MIN_COUNT, TableSpec, avazu, criteo
from mlet_dist.data.prepare.reading import refuse_repeated
from mlet_dist.data.prepare.splits import PAPER_AVAZU, PAPER_CRITEO_FILES, PAPER_CRITEO_ROWS, SplitRule
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.prepare.work_files import WorkDirectory
from mlet_dist.data.prepare.worker_pool import Workers, refuse_main_import
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError

PASSES = ("read", "count", "vocabulary", "write", "merge")
SHARDED = ("read", "count", "write")

# Below this, starting processes takes longer than the work.
SMALL_BYTES = 24 << 20
# What a process holds at most beside the vocabulary: a block as text, as columns and as Parquet.
PROCESS_BYTES = 512 << 20
RANGE_VALUE_BYTES = 256  # of a value, its count and the hash table that adds them up


@dataclass(frozen=True)
class Resources:
    """What a run may use.

    Attributes:
        memory: bytes of all processes together, vocabularies aside; None is half of the machine's.
        processes: at most so many; None is all cores.
    """

    memory: int | None = None
    processes: int | None = None

    @property
    def bytes(self) -> int:
        """``memory``, as a number."""
        if self.memory is None:
            return max(PROCESS_BYTES, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
        return self.memory

    def workers(self, size: int) -> int:
        """How many processes read ``size`` bytes of raw data."""
        if self.bytes < PROCESS_BYTES:
            raise UserError(f"memory is {self.bytes >> 20} MiB; at least {PROCESS_BYTES >> 20} MiB are needed")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        wanted = cores if self.processes is None else self.processes
        if size < SMALL_BYTES and self.processes is None:
            return 1
        return max(1, min(wanted, self.bytes // PROCESS_BYTES))


def prepare(
    spec: TableSpec,
    raw: Sequence[str | Path],
    out: Path,
    *,
    resources: Resources | None = None,
    only: str | None = None,
    shard: Shard | None = None,
) -> DatasetSchema | None:
    """Make the data set ``out`` from raw files, taken in the order given.

    Finished work is kept in ``.<name>.prepare`` beside ``out`` until the data set is whole. The same call goes on from
    it, and so does one with other arguments from whatever these do not change (``keys.py``).

    It starts processes, which import the script that calls it: the call belongs under ``if __name__ == "__main__":``.

    Args:
        spec: what the files hold and what becomes of it.
        raw: paths, or URLs that fsspec opens.
        out: a directory that does not exist or is empty.
        resources: what may be used.
        only: one of ``PASSES``, for work that several machines share; all that is needed before it must be done.
        shard: this machine's share of the pass.

    Returns:
        The data set's schema; None after a pass that does not finish it.

    Raises:
        UserError: ``out`` is taken, a file is unusable or given twice, a split is empty, or what a pass needs is not
            there.
        WorkerKilledError: a process was killed.
    """
    resources = resources or Resources()
    if not raw:
        raise UserError("no raw file was given; name at least one")
    if not out.parts:  # Path("") is Path(".")
        raise UserError("out is empty or the current directory; name a directory that does not exist yet")
    if only is not None and only not in PASSES:
        raise UserError(f"pass {only!r} does not exist; the passes are {', '.join(PASSES)}")
    if shard is not None and only not in SHARDED:
        raise UserError(
            f"a shard goes with one of the passes {', '.join(SHARDED)}; {only or 'a whole run'} has no shares"
        )
    for sparse in spec.sparse:
        if not 1 <= sparse.min_count <= MAX_MIN_COUNT:
            raise UserError(f"min_count is {sparse.min_count}; it must be at least 1 and at most {MAX_MIN_COUNT}")
    out = Path(os.path.realpath(out))
    refuse_main_import()
    refuse_repeated([str(path) for path in raw])
    # All of them first: a missing last file should not cost an hour.
    files = [examine(str(path), spec.text, spec.used_columns) for path in raw]
    processes = resources.workers(sum(file.size for file in files))
    passes = Passes(spec, files, out)
    if passes.renamed:  # by a run that was killed before it could remove the rest
        passes.work.remove()
    passes.work.drop_removed()
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
            passes.drop_stale()
            passes.read(workers, shard or Shard())
        if only in (None, "count"):
            passes.count(workers, shard or Shard())
        if only in (None, "vocabulary"):
            passes.vocabulary(workers, max(1 << 16, resources.bytes // processes // RANGE_VALUE_BYTES))
        if only in (None, "write"):
            passes.write(workers, shard or Shard())
        if only not in (None, "merge"):
            return None
        schema = assemble(passes)
        if out.exists():
            out.rmdir()  # empty, as check_free saw; a rename over it fails on some file systems
        passes.data.rename(out)
        passes.work.remove()
    return schema


def prepare_criteo(raw: Sequence[Path], out: Path, *, min_count: int = 1) -> DatasetSchema:
    """``prepare`` of Criteo logs: the first 80% of the rows are train, the next 10% valid, the last 10% test."""
    schema = prepare(criteo(min_count), raw, out)
    assert schema is not None
    return schema


@contextmanager
def _kept_work(work: WorkDirectory, missing: Sequence[Path], alone: bool) -> Iterator[None]:
    """On an error, keep finished work and say so; remove it, with the parents, where there is nothing to go on from.

    Of a file that cannot be used, the blocks before the fault are nothing to go on from: it will be another file. After
    a full disk, an interrupt or a killed process they are. Other shards may be at work where this one is not ``alone``:
    then nothing is removed.
    """
    try:
        yield
    except BaseException as error:
        finished = work.finished(whole_files=type(error) is UserError)
        if alone and not finished:
            work.remove()
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()
        if finished and isinstance(error, UserError | OSError):
            kept = f"(finished work is kept in {work.root}; the same command goes on from it)"
            raise type(error)(f"{_reason(error)} {kept}") from error
        raise


@contextmanager
def _os_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    # pyarrow's own words hold the file's position and more.
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)


@contextmanager
def _arrow_threads(count: int) -> Iterator[None]:
    """Processes are what runs side by side here; Arrow's threads beside them would only wait for one another."""
    before = pa.cpu_count()
    pa.set_cpu_count(count)
    try:
        yield
    finally:
        pa.set_cpu_count(before)


MIN_COUNT = 2


def prepare_from(args: argparse.Namespace) -> DatasetSchema | None:
    """Run ``prepare`` as the command line says."""
    if args.format is None:
        raise UserError("the format is missing; it is criteo, avazu or table (see `mlet prepare --help`)")
    if not args.raw:
        raise UserError("no raw file was given; name at least one (see `mlet prepare --help`)")
    if args.out is None:
        raise UserError("--out is missing; name the directory for the data set (see `mlet prepare --help`)")
    return prepare(
        _spec(args),
        args.raw,
        Path(args.out),
        resources=Resources(args.memory, args.processes),
        only=args.only,
        shard=None if args.shard is None else _shard(args.shard),
    )


def _spec(args: argparse.Namespace) -> TableSpec:
    if args.format == "table":
        if args.schema is None:
            raise UserError("--schema is missing; `mlet prepare table` needs a YAML description of the columns")
        for name, value in (("--min-count", args.min_count), ("--split", args.split), ("--seed", args.seed)):
            if value is not None:
                raise UserError(f"{name} goes with criteo and avazu; of a table, {args.schema} says it")
        spec = load_table(Path(args.schema))
    else:
        if args.schema is not None:
            raise UserError(f"--schema goes with `mlet prepare table`; the columns of {args.format} are known")
        known = criteo if args.format == "criteo" else avazu
        spec = known(MIN_COUNT if args.min_count is None else args.min_count, _split(args))
    if args.max_malformed is not None:
        if not 0 <= args.max_malformed <= 1:
            raise UserError(f"--max-malformed {args.max_malformed} is not a share from 0 to 1")
        spec = replace(spec, max_malformed=args.max_malformed)
    return spec


def _split(args: argparse.Namespace) -> SplitRule | None:
    if args.seed is not None and args.split != "random" and not (args.format == "avazu" and args.split != "rows"):
        raise UserError("--seed goes with --split random")
    seed = 0 if args.seed is None else args.seed
    if seed < 0:
        raise UserError(f"--seed {seed} is negative; it must be a whole number, 0 or more")
    if args.split == "paper" and args.format == "criteo":
        return PAPER_CRITEO_ROWS if len(args.raw) == 1 else PAPER_CRITEO_FILES
    if args.split == "rows" or (args.split is None and args.format == "criteo"):
        return SplitRule("rows")
    return replace(PAPER_AVAZU, seed=seed)


def _shard(text: str) -> Shard:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard {text!r} is not i/N with i from 0 to N-1, such as 0/8")
    return Shard(int(index), int(count))
