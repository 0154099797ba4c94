"""`mlet verify`: compare the predictions of all models of an export, and all of its tables, with the trained model."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from mlet_dist.checkpoint.store import Checkpoint
from mlet_dist.config.model_section import NETWORK_SETTINGS
from mlet_dist.data.label_classes import check_classes
from mlet_dist.data.loading.loader import Batch
from mlet_dist.data.location import DataPath
from mlet_dist.data.preprocessing import find_difference
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError, print_warning, writing
from mlet_dist.export.encoding import ENCODINGS
from mlet_dist.export.export_directory import PACKAGE, ExportDirectory
from mlet_dist.export.outputs import open_output
from mlet_dist.export.scores_writer import written_scores
from mlet_dist.export.seen_rows import SeenRows, renumber
from mlet_dist.export.served_layout import ServedLayout
from mlet_dist.export.sized_model import Size, at_size
from mlet_dist.export.source import ModelSource
from mlet_dist.export.verify.compared_models import output_model, package_models, trained_model
from mlet_dist.export.verify.form_check import check_form
from mlet_dist.export.verify.form_models import form_model
from mlet_dist.export.verify.table_check import CheckedTable, StoredOutput, check_table
from mlet_dist.export.verify.tolerances import DEFAULT_TOLERANCES, Comparison, Tolerances
from mlet_dist.models.spec import ModelSpec
from mlet_dist.progress import Progress
from mlet_dist.training.evaluation import evaluation_loader
from mlet_dist.training.label_metrics import LabelMetrics, metric_prefixes
from mlet_dist.training.process_group import Worker
from mlet_dist.training.run_checkpoints import LAST, CheckpointChoice, finished_steps

_INDEX_PATTERNS = {"distcp": ".metadata", "safetensors": "*.json"}
_SINGLE_PROCESS = Worker(rank=0, world_size=1, local_world_size=1, device=torch.device("cpu"))


def verify_export(
    export: Path,
    run: Path,
    data: DataPath,
    split: str = "test",
    tolerances: Tolerances = DEFAULT_TOLERANCES,
    choice: CheckpointChoice = LAST,
    scores: Path | None = None,
) -> dict[str, Any]:
    """Compare the factorised model of a run with every model of its export on every row of a split.

    Without a ``choice``, the checkpoint is the one that the export was made from if the run has it, else the last one.

    This runs in one process on the CPU. It reads all files of the export and of the run's checkpoint, and keeps the
    rows that the split looks up in memory. A package is loaded with all its tables.

    With ``scores``, a directory that must be empty or not exist, the predictions of each output are written there, as
    ``int8.parquet``; those of a package's models as ``package-model.pt.parquet``. See ``ScoresWriter``.

    Returns:
        ``ok``, ``split``, ``rows``, ``auc_run``, ``logloss_run``, and ``outputs``: by name ``ok``, ``encoding``,
        ``max_abs_logit_diff`` (of a package ``max_abs_probability_diff``), ``worst_row`` (its number in the split),
        ``auc``, ``auc_change``, ``logloss``, ``logloss_change``, ``tolerance``, and ``tables``: by name
        ``max_abs_error`` of a value against W1·W2, ``worst_row`` (of the table) and ``relative_error``. A package's
        tables are those of the output that it was made from. With several labels, AUC and LogLoss are by label, as
        ``click_auc`` and ``click_auc_run``.

    Raises:
        UserError: ``export`` is not an export, ``run`` is not a run, they do not fit each other or the data, or a file
            is damaged. Or ``scores`` has files, or cannot be written.
    """
    if scores is not None:
        _make_empty(scores)
    directory = ExportDirectory(export)
    with ExitStack() as stack:
        served, manifest = directory.load()
        source: ModelSource = ModelSource.of_run(run, choice or _exported(manifest, run))
        stack.enter_context(source.files)
        size = Size.from_manifest(export, manifest)
        if size is not None:
            _check_size(export, size, run, source)
            source = at_size(source, size)
        trained = source.spec
        if _shapes(served) != _shapes(trained):
            raise UserError(
                f"{export}: its inputs, its network or the sizes of its tables are not those of {run}; name the run "
                "that it was exported from"
            )
        _check_same_inputs(export, served, run, trained)
        if manifest["run"]["checkpoint_sha256"] != source.digest:
            problem = f"{export} was made from another checkpoint than {source.checkpoint} of {run}"
            print_warning(f"{problem}; export again, or name its run")
        schema = DatasetSchema.load(data)
        warning = trained.check_data(schema, data)
        if warning is not None:
            print_warning(f"{run}: {warning}")
        schema.check_split(data, split)
        described = _check_outputs(directory, manifest)
        directory.check_preprocessing(manifest)
        for warning in check_classes(data, schema, [split]):
            if any(entry["encoding"] != "fp32" for entry in described.values()):
                raise UserError(
                    f"{warning}; quantised tables are compared by their AUC, so use another split or data set"
                )
            print_warning(warning)
        outputs = {}
        for name, entry in described.items():
            # Files of tables are verified as they are read; only their index is verified here.
            directory.check_files(name, manifest, _INDEX_PATTERNS.get(entry["format"], "*"))
            if name != PACKAGE:
                files = open_output(*directory.output(name, manifest), entry["format"])
                stack.callback(files.close)
                outputs[name] = StoredOutput(name, ENCODINGS[entry["encoding"]], files, _layout_of(entry))

        def batches() -> Iterator[Batch]:
            batch_size = int(source.config["data"]["eval_batch_size"])
            return iter(evaluation_loader(data, split, trained, batch_size, _SINGLE_PROCESS))

        table_of = {feature.name: feature.table_name for feature in trained.sparse}
        rows = _seen_rows(batches(), table_of, schema.rows[split])
        tables = _check_tables(source, outputs, rows)
        predict_logits = trained_model(source, tables)
        models = {
            name: (output_model if output.layout is None else form_model)(served, source, output, tables)
            for name, output in outputs.items()
        }
        if PACKAGE in described:
            of_package = described[PACKAGE]
            models |= package_models(export / PACKAGE, of_package["encoding"], _layout_of(of_package), outputs)

        labels, weighted = trained.labels, schema.sample_weight
        of_run = LabelMetrics(labels, _SINGLE_PROCESS.device, weighted=weighted)
        comparisons = {name: Comparison(each, labels, weighted=weighted) for name, each in models.items()}
        writers = {} if scores is None else {
            name: stack.enter_context(written_scores(scores / f"{name.replace('/', '-')}.parquet", labels))
            for name in models
        }  # fmt: skip
        with Progress("verify", schema.rows[split], "rows") as progress, torch.inference_mode():
            for batch in batches():
                bags = renumber(batch.sparse, {feature: rows[table] for feature, table in table_of.items()})
                logits, of_rows, weights = batch.predicted(predict_logits(batch, bags))
                of_run.update(logits, of_rows, weights)
                for name, comparison in comparisons.items():
                    found = comparison.add(logits, comparison.model.predict(batch, bags), of_rows, weights)
                    if name in writers:
                        writers[name].add(found, of_rows, weights)
                progress.update(len(of_rows))
    metrics = of_run.compute()
    results = {
        name: each.result(
            metrics,
            {table: checked.errors[each.model.of_tables] for table, checked in tables.items()},
            tolerances,
        )
        for name, each in comparisons.items()
    }
    return {
        "ok": all(result["ok"] for result in results.values()),
        "split": split,
        "rows": int(metrics["rows"]),
        **{
            f"{prefix}{name}_run": metrics[f"{prefix}{name}"]
            for prefix in metric_prefixes(trained.labels)
            for name in ("auc", "logloss")
        },
        "outputs": results,
    }


def _make_empty(directory: Path) -> None:
    """Create a directory; raise UserError if it has files."""
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise UserError(f"{directory}: is not empty; name another directory for the scores, or remove it")


def _check_size(export: Path, size: Size, run: Path, source: ModelSource) -> None:
    """Raise UserError unless an export of a size can be one of a run."""
    spec = source.spec
    rows = {name: sum(each.rows for each in table.ranges) for name, table in size.tables.items()}
    columns = size.embedding_dim if size.how == "columns" else size.columns
    nested = columns is None or columns in (spec.model.nested_dims or ())
    if not nested or (rows and rows != {table.name: table.num_embeddings for table in spec.tables}):
        raise UserError(
            f"{export}: its size, {size.embedding_dim} columns, is none of {run}; name the run that it was exported "
            "from"
        )


def _exported(manifest: Mapping[str, Any], run: Path) -> CheckpointChoice:
    """Return the checkpoint that an export was made from, by its name, if the run still has it; else the last one."""
    found = Checkpoint.at(str(manifest["run"].get("checkpoint")))
    return LAST if found is None or found.step not in finished_steps(run) else CheckpointChoice(found.step)


def _shapes(spec: ModelSpec) -> tuple[object, ...]:
    """Return what must be equal for the predictions of two models to be compared."""
    model = spec.model
    tables = tuple((table.name, table.embedding_dim, table.settings.pooling) for table in spec.tables)
    sizes = model.embedding_dim, model.bottom_mlp, model.top_mlp, tables
    network = (getattr(model, name) for name in NETWORK_SETTINGS)
    return spec.dense, spec.sparse, spec.labels, spec.table_prefixes, *sizes, *network


def _check_same_inputs(export: Path, served: ModelSpec, run: Path, trained: ModelSpec) -> None:
    """Raise UserError if the inputs of an export and of a run were made in different ways, where both record it."""
    if served.preprocessing is not None and trained.preprocessing is not None:
        difference = find_difference(served.preprocessing, trained.preprocessing, "there", f"in {run}")
        if difference is not None:
            raise UserError(f"{export}: {difference.text}; name the run that it was exported from")


def _check_outputs(directory: ExportDirectory, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's outputs; raise UserError if their entries are incomplete."""
    try:
        outputs = dict(manifest["outputs"])
        for name, entry in outputs.items():
            if not {"directory", "format", "files"} <= set(entry) or entry["encoding"] not in ENCODINGS:
                raise KeyError(name)
            _layout_of(entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory.path}: broken manifest: {error!r}; export again") from None
    return outputs


def _seen_rows(batches: Iterator[Batch], table_of: Mapping[str, str], total: int) -> dict[str, torch.Tensor]:
    seen = SeenRows(table_of)
    with Progress("ids", total, "rows") as progress:
        for batch in batches:
            seen.add(batch.sparse)
            progress.update(batch.num_rows)
    return seen.rows()


def _layout_of(entry: Mapping[str, Any]) -> ServedLayout | None:
    return ServedLayout.from_dict(entry["layout"]) if "layout" in entry else None


def _check_tables(
    source: ModelSource, outputs: Mapping[str, StoredOutput], rows: Mapping[str, torch.Tensor]
) -> dict[str, CheckedTable]:
    whole = {name: output for name, output in outputs.items() if output.layout is None}
    total = sum(table.num_embeddings for table in source.tables.values())
    total += sum(p.num_embeddings for output in outputs.values() if output.layout for p in output.layout.parts)
    checked = {}
    with Progress("tables", total, "rows") as progress:
        for name, table in source.tables.items():
            checked[name] = check_table(table, whole, rows[name], progress.update)
            for output in outputs.values():
                if output.layout is not None:
                    check_form(table, output, rows[name], checked[name], progress.update)
    return checked
