"""`mlet export`: every rank collapses its share of a run's tables, and rank 0 assembles the export."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import distributed as dist

from mlet_dist.checkpoint.writer import on_first_rank
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.errors import UserError, print_warning
from mlet_dist.export.collapse.assembly import Assembly
from mlet_dist.export.collapse.units import Unit, UnitWorker, worker_bytes
from mlet_dist.export.collapse.work_directory import DiskFull, WorkDirectory
from mlet_dist.export.kept_rows import KeptRows
from mlet_dist.export.outputs import OUTPUTS, Output
from mlet_dist.export.serving.quantised import Serving
from mlet_dist.export.serving.raw_inputs import data_set_of, has_raw_rows, preprocessing_of
from mlet_dist.export.source import ModelSource
from mlet_dist.progress import Progress
from mlet_dist.training.process_group import Worker, join_ranks
from mlet_dist.training.run_checkpoints import LAST, CheckpointChoice
from mlet_dist.training.validation_state import better_step

MEMORY = 512 << 20
SMALLEST_INT8 = "smallest int8"
NO_PREPROCESSING = "none"
COLLECTIVE_TIMEOUT = timedelta(hours=6)  # ranks wait in a barrier until the slowest has finished its units
_PROGRESS_SECONDS = 2.0  # between two listings of the finished units of all ranks


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export.

    Attributes:
        outputs: names of ``OUTPUTS``.
        package: the output whose tables the serving package contains, and which is written, too; ``SMALLEST_INT8`` for
            ``int8``, or ``int8-kept`` if rows are not stored; None for no package.
        serving: the devices for which the serving of quantised tables is planned; None for no plan.
        gather: write one file per table.
        overwrite: replace an existing export.
        memory: bytes that a process may use for rows.
        choice: the checkpoint of the run.
        preprocessing: path or URL of the data set whose vocabularies the export carries; None for that of the run, if
            it can be read; ``NO_PREPROCESSING`` for nothing.
    """

    outputs: tuple[str, ...] = ("dcp",)
    package: str | None = None
    serving: Serving | None = None
    gather: bool = False
    overwrite: bool = False
    memory: int = MEMORY
    choice: CheckpointChoice = LAST
    preprocessing: str | None = None

    def package_output(self, source: ModelSource) -> Output | None:
        """Return the output whose tables the package contains."""
        if self.package is None:
            return None
        if self.package == SMALLEST_INT8:
            kept = [KeptRows.of(table) for table in source.tables.values()]
            return OUTPUTS["int8-kept" if any(each.count < each.num_embeddings for each in kept) else "int8"]
        return OUTPUTS[self.package]


def export_run(run: Path, out: Path | str, options: ExportOptions = ExportOptions()) -> dict[str, Any]:
    """Collapse a checkpoint of a run into the export ``out``, on all ranks that torchrun started.

    ``out`` is a directory or a URL. To a URL the export is uploaded once it is complete beside ``run``.

    Returns:
        ``out``, the number of ``tables``, their ``bytes`` in float32 and ``trained_bytes``, the bytes of each of the
        ``outputs``, and ``served_bytes``, those of the tables of each output in a server's memory, W2 included.
        ``kept_ids_bytes`` are, by output, those of the ids of kept rows, for outputs that need them.

    Raises:
        UserError: the run never finished and no checkpoint is chosen, or the chosen one is not there, a tensor is
            missing, damaged or not finite, or ``out`` exists or cannot be written. Finished units are kept beside
            ``out``, and the next call resumes from them.
    """
    with join_ranks("auto", COLLECTIVE_TIMEOUT) as worker:
        return collapse_run(run, out, options, worker)


def collapse_run(run: Path, out: Path | str, options: ExportOptions, worker: Worker) -> dict[str, Any]:
    """Run ``export_run`` on ranks whose process group exists. A collective call."""
    source = open_run(run, options, worker)
    return collapse_source(source, out, options, worker)


def open_run(run: Path, options: ExportOptions, worker: Worker) -> ModelSource:
    """Open the checkpoint of a run that an export is made from; warn if a better one is kept."""
    source = ModelSource.open(run, options.choice)
    better = None if options.choice else better_step(run, source.summary)
    if better is not None and worker.is_first:
        print_warning(f"{better}; --best exports it")
    return source


def collapse_source(source: ModelSource, out: Path | str, options: ExportOptions, worker: Worker) -> dict[str, Any]:
    """Collapse an open model into the export ``out``, and close its files. A collective call.

    Returns:
        As ``export_run``.

    Raises:
        UserError: as ``export_run``.
    """
    run, work = source.path, WorkDirectory.of(out, source.path)
    package = options.package_output(source)
    outputs = dict.fromkeys([*(OUTPUTS[name] for name in options.outputs), *([] if package is None else [package])])
    refused = next((each for each in outputs if each.encoding.is_quantised or each is package), None)
    if source.spec.sequence_tables and refused is not None:
        raise UserError(
            f"{run}: model.sequences names features whose vectors are not pooled, which outputs dcp and safetensors "
            f"alone can hold, but {refused.name} is asked for; leave it out"
        )
    assembly = Assembly(source, list(outputs), options.gather, work, package, options.serving)
    threads = _num_threads(assembly, options.memory)
    result: dict[str, Any] = {}
    preprocessing: LikeDataset | None = None
    with source.files, ExitStack() as stack:

        def begin() -> None:
            nonlocal preprocessing
            stack.enter_context(work.locked())
            work.check_free(options.overwrite)
            preprocessing = _preprocessing(source, options.preprocessing)
            assembly.check()
            work.begin(assembly.job(worker.device))
            missing = assembly.missing_space(worker.world_size)
            if missing is not None:
                raise UserError(f"{work}: cannot be written: {missing}")

        def finish() -> None:
            with _explaining_full_disk(assembly, worker):
                result.update(assembly.finish(preprocessing))
            work.publish()

        on_first_rank(begin, f"{work}: cannot be written", None)
        with _explaining_full_disk(assembly, worker):
            _run_units(assembly, worker, threads)
            if options.gather:
                for group, table in assembly.unjoined()[worker.rank :: worker.world_size]:
                    assembly.join(group, table)
                dist.barrier()
        on_first_rank(finish, f"{work}: cannot be written", None)
    return {"out": str(out), **result}


def _preprocessing(source: ModelSource, data_set: str | None) -> LikeDataset | None:
    """Return what makes the model's inputs from raw rows; None, with a warning, if it cannot be found by itself."""
    if data_set == NO_PREPROCESSING:
        return None
    if data_set is not None:
        return preprocessing_of(source.spec, data_set)
    try:
        data_set = data_set_of(source.config, source.path)
        return preprocessing_of(source.spec, data_set) if has_raw_rows(data_set) else None
    except UserError as error:
        print_warning(
            f"{source.path}: the export carries no vocabularies and rules for raw rows: {error}; name the data set "
            f"with --preprocessing, or give --preprocessing {NO_PREPROCESSING}"
        )
        return None


def _num_threads(assembly: Assembly, memory: int) -> int:
    """Return the units per process at a time: two per core, so that one reads while another multiplies, if they fit."""
    each = worker_bytes(assembly.tables.values(), assembly.outputs)
    if memory < each:
        raise UserError(f"--memory {memory:,} bytes is too little for these tables; use {each:,} or more")
    return min(memory // each, 2 * torch.get_num_threads())


def _run_units(assembly: Assembly, worker: Worker, threads: int) -> None:
    """Run this rank's share of the unfinished units in ``threads`` threads, and wait for the other ranks."""
    units = assembly.unfinished()
    total = sum(unit.rows for unit in assembly.units)
    done = total - sum(unit.rows for unit in units)
    own = units[worker.rank :: worker.world_size]
    idle: SimpleQueue[UnitWorker] = SimpleQueue()
    with ExitStack() as stack:
        stack.enter_context(_single_threaded_products())
        for _ in range(min(threads, len(own))):
            each = UnitWorker(
                assembly.source.files,
                assembly.tables,
                {name: group.outputs for name, group in assembly.groups.items()},
                assembly.work,
                assembly.directories,
                worker.device,
            )
            stack.callback(each.close)
            idle.put(each)

        failed = threading.Event()

        def run(unit: Unit) -> None:
            if failed.is_set():  # the error is raised from its own future
                return
            each = idle.get()
            try:
                each.run(unit)
            except BaseException:
                failed.set()
                raise
            finally:
                idle.put(each)

        progress = stack.enter_context(Progress("export", total, "rows", disable=not worker.is_first, done=done))
        pool = ThreadPoolExecutor(max(1, threads))
        stack.callback(pool.shutdown, cancel_futures=True)
        shown, listed = done, time.monotonic()
        for future in as_completed([pool.submit(run, unit) for unit in own]):
            future.result()
            # The units of other ranks are known only from a listing of the directory, which can be slow.
            if worker.is_first and time.monotonic() - listed > _PROGRESS_SECONDS:
                now = total - sum(unit.rows for unit in assembly.unfinished())
                progress.update(now - shown)
                shown, listed = now, time.monotonic()
        dist.barrier()
        progress.update(total - shown)


@contextmanager
def _single_threaded_products() -> Iterator[None]:
    """Compute matrix products in one thread each: their last bit can depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _explaining_full_disk(assembly: Assembly, worker: Worker) -> Iterator[None]:
    """Add to the error of a full disk how much space is missing, and how to resume."""
    try:
        yield
    except DiskFull as error:
        missing = assembly.missing_space(worker.world_size) or "other processes have written there, too"
        raise UserError(
            f"{error}: {missing}; finished units are kept in {assembly.work.root}, and the same command resumes from "
            "them"
        ) from None
