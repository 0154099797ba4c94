"""The export job: every rank collapses its share of a run's tables, and the first puts the export together."""

import os
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

from mlet_dist.checkpoint.writer import on_first
from mlet_dist.errors import UserError
from mlet_dist.export.collapse.assembly import Assembly
from mlet_dist.export.collapse.units import Unit, UnitWorker, worker_bytes
from mlet_dist.export.collapse.work_directory import DiskFull, WorkDirectory
from mlet_dist.export.outputs import OUTPUTS, Output
from mlet_dist.export.serving.quantised import Serving
from mlet_dist.export.source import Source
from mlet_dist.progress import Progress
from mlet_dist.training.process_group import Worker, join_ranks

MEMORY = 512 << 20
_OTHERS_MAY_TAKE = timedelta(hours=6)
_LOOK_SECONDS = 2.0  # between two looks at what is finished


@dataclass(frozen=True)
class ExportOptions:
    """How an export is made.

    Attributes:
        outputs: names of ``OUTPUTS``.
        package: the output whose tables go into a serving package, and which is made with it; None for no package.
        serving: what quantised tables are to be planned for; None for no plan.
        gather: one file a table.
        overwrite: replace an export that is there.
        memory: bytes that a process may use for rows.
    """

    outputs: tuple[str, ...] = ("dcp",)
    package: str | None = None
    serving: Serving | None = None
    gather: bool = False
    overwrite: bool = False
    memory: int = MEMORY

    @property
    def written(self) -> tuple[Output, ...]:
        """The outputs, with that of the package's tables."""
        names = self.outputs if self.package is None else (*self.outputs, self.package)
        return tuple(OUTPUTS[name] for name in dict.fromkeys(names))


def export_run(run: Path, out: Path, options: ExportOptions = ExportOptions()) -> dict[str, Any]:
    """Collapse the newest checkpoint of a finished run into the export ``out``, on all ranks that torchrun started.

    Returns:
        ``out``, the number of ``tables``, the ``bytes`` they take served in float32, ``trained_bytes``, and the bytes
        of each of the ``outputs``.

    Raises:
        UserError: the run never finished, a tensor is missing, damaged or not finite, or ``out`` is taken or cannot be
            written. What is finished by then is kept beside ``out`` and taken up by the next call.
    """
    with join_ranks("auto", _OTHERS_MAY_TAKE) as worker:
        return collapse_run(run, out, options, worker)


def collapse_run(run: Path, out: Path, options: ExportOptions, worker: Worker) -> dict[str, Any]:
    """``export_run`` for ranks that are joined already. A collective call."""
    if not out.parts:  # Path("") is Path(".")
        raise UserError("--out is empty or the current directory; name a directory that does not exist yet")
    work = WorkDirectory(Path(os.path.realpath(out)))
    source = Source.open(run)
    package = None if options.package is None else OUTPUTS[options.package]
    assembly = Assembly(source, options.written, options.gather, work, package, options.serving)
    threads = _threads(assembly, options.memory)
    result: dict[str, Any] = {}
    with source.files, ExitStack() as held:

        def begin() -> None:
            held.enter_context(work.locked())
            work.check_free(options.overwrite)
            assembly.check()
            work.begin(assembly.job(worker.device))
            missing = assembly.missing(worker.world_size)
            if missing is not None:
                raise UserError(f"{work.out}: cannot be written: {missing}")

        def finish() -> None:
            with _full_disk_explained(assembly, worker):
                result.update(assembly.finish())
            work.publish()

        on_first(begin, f"{work.out}: cannot be written", None)
        with _full_disk_explained(assembly, worker):
            _do_units(assembly, worker, threads)
            if options.gather:
                for table in assembly.unjoined()[worker.rank :: worker.world_size]:
                    assembly.join(table)
                dist.barrier()
        on_first(finish, f"{work.out}: cannot be written", None)
    return {"out": str(out), **result}


def _threads(assembly: Assembly, memory: int) -> int:
    """How many units a process does at a time: two a core, so that one reads while another multiplies, if they fit."""
    each = worker_bytes(assembly.source, assembly.outputs)
    if memory < each:
        raise UserError(f"--memory {memory:,} bytes is too little for these tables; it takes {each:,} at least")
    return min(memory // each, 2 * torch.get_num_threads())


def _do_units(assembly: Assembly, worker: Worker, threads: int) -> None:
    """This rank's share of the units that are not finished, some at a time; returns when all ranks have done theirs."""
    units = assembly.unfinished()
    total = sum(table.num_embeddings for table in assembly.source.tables.values())
    done = total - sum(unit.rows for unit in units)
    own = units[worker.rank :: worker.world_size]
    idle: SimpleQueue[UnitWorker] = SimpleQueue()
    with ExitStack() as held:
        held.enter_context(_one_thread_a_product())
        for _ in range(min(threads, len(own))):
            each = UnitWorker(assembly.source, assembly.outputs, assembly.work, assembly.directories, worker.device)
            held.callback(each.close)
            idle.put(each)

        def do(unit: Unit) -> None:
            each = idle.get()
            try:
                each.do(unit)
            finally:
                idle.put(each)

        progress = held.enter_context(Progress("export", total, "rows", disable=not worker.is_first, done=done))
        pool = ThreadPoolExecutor(max(1, threads))
        held.callback(pool.shutdown, cancel_futures=True)
        shown, looked = done, time.monotonic()
        for future in as_completed([pool.submit(do, unit) for unit in own]):
            future.result()
            # What the other ranks have done shows in the directory alone, which may be long.
            if worker.is_first and time.monotonic() - looked > _LOOK_SECONDS:
                now = total - sum(unit.rows for unit in assembly.unfinished())
                progress.update(now - shown)
                shown, looked = now, time.monotonic()
        dist.barrier()
        progress.update(total - shown)


@contextmanager
def _one_thread_a_product() -> Iterator[None]:
    """With more, the last bit of a product would depend on how many there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _full_disk_explained(assembly: Assembly, worker: Worker) -> Iterator[None]:
    try:
        yield
    except DiskFull as error:
        missing = assembly.missing(worker.world_size) or "others have written there, too"
        raise UserError(
            f"{error}: {missing}; finished work is kept in {assembly.work.root}, and the same command goes on from it"
        ) from None
