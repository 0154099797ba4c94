"""`mlet export --budget`: measure candidates within a number of bytes on the validation split, and export the best."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import distributed as dist

from mlet_dist.checkpoint.writer import on_first_rank
from mlet_dist.config.byte_sizes import bytes_within
from mlet_dist.config.validation_settings import VALIDATED
from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError, print_warning
from mlet_dist.export.budget.candidates import Candidate, CandidateMaker
from mlet_dist.export.collapse.run_collapse import COLLECTIVE_TIMEOUT, ExportOptions, collapse_source, open_run
from mlet_dist.export.collapse.work_directory import WorkDirectory
from mlet_dist.export.encoding import RowOverflow
from mlet_dist.export.measured_split import MeasuredSplit, served_vectors
from mlet_dist.export.size_choice import check_can_refit, counts_of
from mlet_dist.export.sized_model import Size, at_size
from mlet_dist.export.source import ModelSource
from mlet_dist.progress import Progress
from mlet_dist.training.process_group import join_ranks


def export_within(run: Path, out: str, budget: str, options: ExportOptions, data: str | None = None) -> dict[str, Any]:
    """Export a run with the tables that predict best within a budget, on all ranks that torchrun started.

    Rank 0 chooses: it measures each candidate on the split ``valid``, and holds the rows that this looks up in memory.

    Args:
        run: the run.
        out: a directory or a URL.
        budget: as ``bytes_within``, of the float32 tables of d columns.
        options: of the export; its outputs are those of the best candidate.
        data: the data set; None for that of the run.

    Returns:
        As ``export_run``, and ``budget``; ``table_bytes`` and ``logloss`` of the run with float32 tables; ``rows``, the
        number that was measured; ``candidates``, the best first, each with ``output``, ``rows``, ``embedding_dim``,
        ``bytes``, ``logloss`` and ``change``; and ``chosen``, the first of them.

    Raises:
        UserError: no candidate fits the budget, the data set has no split ``valid`` or does not fit, or as
            ``export_run``.
    """
    with join_ranks("auto", COLLECTIVE_TIMEOUT) as worker:
        source = open_run(run, options, worker)
        found: list[Any] = [None]

        def measure() -> None:
            work = WorkDirectory.of(out, source.path)
            with work.locked():  # now, and not only after the candidates have been measured
                work.check_free(options.overwrite)
            found[0] = choose(source, budget, data)

        on_first_rank(measure, f"{run}: its tables cannot be read", None)
        dist.broadcast_object_list(found, src=0)
        source.files.close()
        (output, size), result = found[0]
        opened = ModelSource.open(run, options.choice)
        sized = opened if size is None else at_size(opened, size)
        package = None if options.package is None else output
        exported = collapse_source(sized, out, dataclasses.replace(options, outputs=(output,), package=package), worker)
    return exported | result


def choose(source: ModelSource, budget: str, data: str | None) -> tuple[tuple[str, Size | None], dict[str, Any]]:
    """Return the output and the size of the best candidate, and what ``export_within`` returns of all.

    Args:
        source: the run.
        budget: of ``bytes_within``.
        data: the data set; None for that of the run.

    Raises:
        UserError: as ``export_within``.
    """
    check_can_refit(source, f"--budget {budget}")
    whole = sum(4 * table.num_embeddings * table.embedding_dim for table in source.tables.values())
    try:
        allowed = bytes_within(budget, whole)
    except ValueError as error:
        raise UserError(f"--budget: {error}; or write 12x, a twelfth of the float32 tables, or 5% of them") from None
    location = data_set_path(data or str(source.config["data"]["path"]))
    schema = DatasetSchema.load(location)
    source.spec.check_data(schema, location)
    if not schema.rows.get(VALIDATED):
        raise UserError(
            f"--budget {budget}: {location} has no rows of a split {VALIDATED}, on which sizes are compared; name "
            "a data set that has them with --data"
        )
    if not schema.rows.get("train"):
        raise UserError(
            f"--budget {budget}: {location} has no rows of a split train, by whose counts rows get their widths; name "
            "a data set that has them with --data"
        )
    split, counts = MeasuredSplit(source, location, VALIDATED), counts_of(source, data)
    base, fewest = split.model(source).logloss(split.read(source)), whole
    if not math.isfinite(base):
        raise UserError(
            f"--budget {budget}: the LogLoss of {source.path} on the split {VALIDATED} of {location} is {base}; sizes "
            "are compared by it, so it needs rows of weight above 0 with labels, and a model without infinite values"
        )
    measured: list[tuple[float, Candidate]] = []
    for columns, each in _widths(source):
        vectors, model = split.read(each), split.model(each)
        maker = CandidateMaker(each, columns, counts, model.curvatures(vectors), schema.rows["train"])
        fewest = min(fewest, maker.fewest_bytes())
        candidates = list(maker.within(allowed))
        name = f"budget, {maker.embedding_dim} columns"
        with Progress(name, len(candidates), "candidates", disable=not candidates) as progress:
            for candidate in candidates:
                try:
                    served = {
                        name: served_vectors(
                            split.ids[name], of_table, candidate.refitted.get(name), candidate.encoding
                        )
                        for name, of_table in vectors.items()
                    }
                    measured.append((model.logloss(served), candidate))
                except RowOverflow as error:
                    print_warning(f"--budget {budget}: {candidate.output} is no candidate: {error.reason}")
                progress.update(1)
    if not measured:
        raise UserError(
            f"--budget {budget}: the tables of {source.path} take at least {fewest:,} bytes, one row of each, and the "
            f"budget is {allowed:,} bytes; use a larger one"
        )
    measured.sort(key=lambda found: (math.isnan(found[0]), found[0], found[1].bytes))
    described = [
        {**candidate.describe(), "logloss": logloss, "change": logloss - base} for logloss, candidate in measured
    ]
    best = measured[0][1]
    return (best.output, best.size), {
        "budget": allowed,
        "table_bytes": whole,
        "logloss": base,
        "rows": split.rows,
        "chosen": described[0],
        "candidates": described,
    }


def _widths(source: ModelSource) -> Iterator[tuple[int | None, ModelSource]]:
    """Yield the widths of a run, d first as None, and its model at each of them."""
    yield None, source
    if source.spec.model.builder is None:
        for width in reversed(source.spec.model.nested_dims or ()):
            yield width, at_size(source, Size(width, "columns"))
