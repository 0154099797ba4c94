"""`mlet export --dims`: one export of a run for each of several sizes."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist

from mlet_dist.checkpoint.writer import on_first_rank
from mlet_dist.config.validation_settings import VALIDATED
from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError, print_warning
from mlet_dist.export.collapse.run_collapse import (
    COLLECTIVE_TIMEOUT,
    SMALLEST_INT8,
    ExportOptions,
    collapse_source,
    open_run,
)
from mlet_dist.export.encoding import ENCODINGS
from mlet_dist.export.measured_split import MeasuredSplit, served_vectors
from mlet_dist.export.outputs import OUTPUTS
from mlet_dist.export.size_choice import Counts, counts_of, size_of, way_to
from mlet_dist.export.sized_model import How, Size, at_size
from mlet_dist.export.source import ModelSource
from mlet_dist.training.process_group import join_ranks


def export_sizes(
    run: Path, out: str, dims: Sequence[int], options: ExportOptions, data: str | None = None
) -> dict[str, Any]:
    """Export a run at several sizes, on all ranks that torchrun started: size r to ``out/dim<r>``.

    Args:
        run: the run.
        out: a directory or a URL.
        dims: the sizes, of at most d columns.
        options: of each export. A size that the run was not trained at has the outputs of mixed widths in the place of
            those of all rows, whose tables would have d columns.
        data: the data set whose counts weigh the rows of tables that are truncated; None for that of the run.

    Returns:
        ``out``, and ``sizes``: by size the result of ``export_run``, with ``how`` it was made, and of a truncated one
        ``lost``, by table the share of the squares of the vectors that training looked up, and ``valid_change``, that
        of the LogLoss of the split ``valid``, None without such a split.

    Raises:
        UserError: the run cannot be exported at a size, or as ``export_run``.
    """
    if len(set(dims)) < len(dims):
        raise UserError(f"--dims {' '.join(map(str, dims))} names a size twice; name each once")
    with join_ranks("auto", COLLECTIVE_TIMEOUT) as worker:
        source = open_run(run, options, worker)
        ways = {each: way_to(source, each) for each in dims}
        sizes: dict[int, tuple[Size | None, float | None]] = {}
        for each, how in ways.items():
            sizes[each] = (None, None) if how is None else _on_all_ranks(source, each, how, data)
        source.files.close()
        found = {}
        for each, (size, change) in sizes.items():
            opened = ModelSource.open(run, options.choice)
            sized = opened if size is None else at_size(opened, size)
            if size is not None and worker.is_first:
                _warn(source, size, change)
            found[str(each)] = {
                **collapse_source(sized, f"{out.rstrip('/')}/dim{each}", _options(options, size), worker),
                **({} if size is None else {"how": size.how}),
                **({} if size is None or size.how != "truncated" else {"lost": size.lost, "valid_change": change}),
            }
    return {"out": out, "sizes": found}


def _on_all_ranks(source: ModelSource, embedding_dim: int, how: How, data: str | None) -> tuple[Size, float | None]:
    """Return the size that rank 0 computes, which alone reads all tables for it, and its cost. A collective call."""
    found: list[Any] = [None]

    def compute() -> None:
        counts: Counts = counts_of(source, data) if how == "truncated" else lambda _: None
        size = size_of(source, embedding_dim, how, counts)
        found[0] = size, _change(source, size, data) if how == "truncated" else None

    on_first_rank(compute, f"{source.path}: its tables cannot be read", None)
    dist.broadcast_object_list(found, src=0)
    size, change = found[0]
    return size, change


def _change(source: ModelSource, size: Size, data: str | None) -> float | None:
    """Return the change of the LogLoss of the split ``valid`` with the tables of a size, if the data set has one."""
    location = data_set_path(data or str(source.config["data"]["path"]))
    if not DatasetSchema.load(location).rows.get(VALIDATED):
        return None
    split = MeasuredSplit(source, location, VALIDATED)
    model, vectors = split.model(source), split.read(source)
    served = {
        name: served_vectors(split.ids[name], each, size.tables[name], ENCODINGS["fp32"])
        for name, each in vectors.items()
    }
    return model.logloss(served) - model.logloss(vectors)


def _warn(source: ModelSource, size: Size, change: float | None) -> None:
    """Say what a size costs that the run was not trained at."""
    if size.how == "truncated":
        cost = "" if change is None else f" and changes the LogLoss of {VALIDATED} by {change:+.5f}"
        worst = max(size.lost, key=lambda name: size.lost[name])
        print_warning(
            f"{source.path}: was not trained at {size.embedding_dim} columns; its tables are cut to the "
            f"{size.embedding_dim} directions in which looked-up vectors are longest, which loses up to "
            f"{size.lost[worst]:.1%} of their squares (table {worst}){cost}; train with "
            f"model.nested_dims=[{size.embedding_dim}] for plain tables of this size"
        )
    if size.how == "padded":
        print_warning(
            f"{source.path}: the layers of {source.spec.model.builder} stay as they are, since which of their weights "
            f"belong to a column is not known; its tables have {size.embedding_dim} columns, and a server pads the "
            "vectors with zeros"
        )


def _options(options: ExportOptions, size: Size | None) -> ExportOptions:
    """Return the options of the export of a size, whose refitted tables are narrow in mixed widths alone."""
    if size is None or size.how == "columns":
        return options

    def mixed(name: str) -> str:
        return f"{name}-mixed" if OUTPUTS[name].form == "all" else name

    package = options.package
    if package is not None:
        package = "int8-mixed" if package == SMALLEST_INT8 else mixed(package)
    return dataclasses.replace(options, outputs=tuple(map(mixed, options.outputs)), package=package)
