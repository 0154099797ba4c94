"""Compares MLET with single layers, plain or compressed, and with a control of MLET's scale and learning rate."""

import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlet_dist.atomic_file import replaced_file
from mlet_dist.child_command import run_child_command
from mlet_dist.comparison_report import CONTROL, MLET, SINGLE, SINGLE_COMPRESSED, comparison_table
from mlet_dist.config.compression_section import CompressionConfig, TableCompressionConfig
from mlet_dist.config.config_file import Config, load_config, save_config
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.table_settings import TableModelConfig, TableSettings
from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError, writing
from mlet_dist.formatting import load_json, to_json
from mlet_dist.models.spec import ModelSpec
from mlet_dist.quality.paired_bootstrap import paired_differences
from mlet_dist.quality.scores_file import read_scores
from mlet_dist.training.run_directory import RunDirectory

_CONTENTS = "data.json"  # fingerprints of the data set that each arm was trained on


def compare(config: Config, nproc: int) -> dict[str, Any]:
    """Train, export and verify the arms below ``run.dir``, each by the commands that a user would type.

    The arms are the single layer; MLET; and the control, a single layer with MLET's effective learning rate (kσ² times
    the single layer's under SGD) and initial scale (σ√k times). What MLET gains over the control is due to the
    factorisation. With compression they are the single layer without compression, the single layer within the budget,
    and, unless ``model.hidden_dim`` is null, MLET within the budget. There is no control then: rows of d columns have
    no W2, and under Adagrad the effective learning rate of the others depends on their width. All tables of the single
    layers and of the control are single-layer tables; those of MLET have the sizes that the config gives them.

    Arms that an earlier comparison trained to the end with the same settings are not trained again, unless
    ``run.overwrite`` is set. The predictions of valid and test are kept beside them, for `mlet report`.

    Returns:
        ``ok`` (whether every export is within its tolerance on these splits), ``run`` (the directory), ``split``
        (test, or valid if there is no test), ``arms``: by name, the results of train and verify, and ``served_bytes``
        of export, by output; and ``differences``: the names of an ``arm`` and ``of`` the one that it is compared with,
        and for ``auc`` and ``logloss`` the ``value`` of the difference on the split and the ends ``low`` and ``high``
        of its interval (``paired_bootstrap``); with several labels they are those of each ``label``.

    Raises:
        UserError: ``model.hidden_dim`` is null without compression, a file below ``run.dir`` is in the way, the data
            set has neither of the splits, or arms that are not trained again had another one.
        SystemExit: one of the commands failed, and has printed why.
        ChildProcessError: one of the commands was killed.
    """
    if not config.model.has_two_layers and config.compression.policy == "none":
        raise UserError(
            "model.hidden_dim is null, so that there is no MLET model to compare; set it, preferably above 4 times "
            "model.embedding_dim"
        )
    data = data_set_path(config.data.path)
    schema = DatasetSchema.load(data)
    splits = [split for split in ("valid", "test") if split in schema.parts]
    if not splits:
        raise UserError(f"{data}: has neither a test nor a valid split, so that there is nothing to compare models on")
    split = splits[-1]
    base = Path(config.run.dir)
    configs = arm_configs(config, ModelSpec.of(config, schema))
    finished = {arm for arm in configs if _finished(configs[arm])}
    content = {each: schema.content_id(each) for each in schema.parts} | {"vocabulary": schema.vocabulary_id}
    contents = _contents(base / _CONTENTS)
    _check_contents(base, content, {arm: contents.get(arm, content) for arm in configs if arm in finished})
    for arm in configs:
        if arm not in finished:
            RunDirectory(base / arm).check_available(configs[arm])
        _check_export(base / f"{arm}-export", config.run.overwrite or arm in finished)
    with writing(base):
        base.mkdir(parents=True, exist_ok=True)
        for arm, arm_config in configs.items():
            save_config(arm_config, base / f"{arm}.yaml")
        # The results of an earlier comparison are not those of arms that are trained and scored now.
        for old in ("comparison.json", "comparison.md"):
            (base / old).unlink(missing_ok=True)
    for arm in configs:
        load_config(base / f"{arm}.yaml")  # every arm's settings are checked before the first is trained
    arms: dict[str, dict[str, Any]] = {}
    # A budget that is too small is found when a compressed arm begins, and MLET needs the larger one.
    for arm in configs if config.compression.policy == "none" else reversed(configs):
        run, export = base / arm, base / f"{arm}-export"
        if arm in finished:
            print(
                f"{run} is a finished run with the same settings; it is not trained again", file=sys.stderr, flush=True
            )
            _, _, trained = RunDirectory(run).load()
        else:
            trained = _run_command("train", str(base / f"{arm}.yaml"), "--nproc", str(nproc))
            contents[arm] = content
            with writing(base), replaced_file(base / _CONTENTS) as file:
                file.write(to_json(contents, indent=1).encode())
        with writing(export):
            if export.exists():
                shutil.rmtree(export)
        smaller = {"none": [], "static": ["dcp-kept", "dcp-mixed"], "adaptive": ["dcp-kept"]}
        outputs = ["dcp", *smaller[configs[arm].compression.policy]]
        exported = _run_command("export", str(run), "--out", str(export), "--outputs", *outputs)
        scores = base / f"{arm}-scores"
        with writing(scores):
            if scores.exists():
                shutil.rmtree(scores)
        verified = []
        for scored in splits:
            of_data = ["--data", config.data.path, "--split", scored, "--scores", str(scores / scored)]
            verified.append(_run_command("verify", str(export), "--run", str(run), *of_data))
        arms[arm] = trained | {
            "served_bytes": exported["served_bytes"],
            "ok": all(each["ok"] for each in verified),
            "max_abs_logit_diff": _largest(each["outputs"]["dcp"]["max_abs_logit_diff"] for each in verified),
        }
    result = {
        "ok": all(arm["ok"] for arm in arms.values()),
        "run": str(base),
        "split": split,
        "arms": {arm: arms[arm] for arm in configs},
        "differences": _differences(base, list(configs), split, schema.labels),
    }
    with writing(base):
        (base / "comparison.md").write_text(comparison_table(result) + "\n", encoding="utf-8")
        with replaced_file(base / "comparison.json") as file:
            file.write((to_json(result, indent=1) + "\n").encode())
    return result


def _differences(base: Path, arms: Sequence[str], split: str, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return how MLET, or without it the compressed single layer, differs from each other arm, as ``compare`` does."""
    arm = MLET if MLET in arms else arms[-1]
    files = {each: base / f"{each}-scores" / split / "dcp.parquet" for each in arms}
    found = []
    for label in labels:
        prefix, named = ("", {}) if len(labels) == 1 else (f"{label}_", {"label": label})
        scores = read_scores(files[arm], prefix)
        for other in arms:
            if other != arm:
                differences = paired_differences(scores, read_scores(files[other], prefix))
                metrics = {name: dataclasses.asdict(each) for name, each in differences.items()}
                found.append({"arm": arm, "of": other, **named, "rows": len(scores), **metrics})
    return found


def _largest(differences: Iterable[float | None]) -> float | None:
    """Return the largest difference; None, as JSON has it, if one is infinite."""
    found = list(differences)
    return None if None in found else max(each for each in found if each is not None)


def arm_configs(config: Config, spec: ModelSpec) -> dict[str, Config]:
    """Return the config of each arm by name, in the order of the table; ``spec`` is MLET's."""

    def arm(name: str, **changes: Any) -> Config:
        run = dataclasses.replace(config.run, dir=str(Path(config.run.dir) / name))
        checkpoints = config.train.checkpoint_dir
        train = config.train
        if checkpoints is not None:
            train = dataclasses.replace(train, checkpoint_dir=f"{checkpoints.rstrip('/')}/{name}")
        return dataclasses.replace(config, run=run, train=train, **changes)

    single = config.model.single_layer()
    if config.compression.policy != "none":
        within = single_layer_compression(config.compression, spec.embedding_dims)
        arms = {
            SINGLE: arm(SINGLE, model=single, compression=CompressionConfig()),
            SINGLE_COMPRESSED: arm(SINGLE_COMPRESSED, model=single, compression=within),
        }
        return arms | {MLET: arm(MLET)} if config.model.has_two_layers else arms
    rate = config.optimizer.rows_learning_rate or config.optimizer.learning_rate
    control, rate_factor = single_layer_control(config.model, config.optimizer.name, spec.table_settings)
    control_optimizer = dataclasses.replace(config.optimizer, rows_learning_rate=rate * rate_factor)
    return {
        SINGLE: arm(SINGLE, model=single),
        MLET: arm(MLET),
        CONTROL: arm(CONTROL, model=control, optimizer=control_optimizer),
    }


def single_layer_compression(compression: CompressionConfig, embedding_dims: Mapping[str, int]) -> CompressionConfig:
    """Return the compression of a single layer to the same budget: with no width above d of a table.

    Args:
        compression: of MLET.
        embedding_dims: d of each table.
    """
    dims, widths = set(embedding_dims.values()), compression.widths
    limits = {}
    for name, d in embedding_dims.items():
        own = compression.limits(name)
        if own != TableCompressionConfig():
            most = None if own.max_width is None else min(own.max_width, d)
            limits[name] = TableCompressionConfig(min(own.min_width, d), most)
    if widths is not None:
        widths = tuple(sorted({*dims, *(width for width in widths if width < max(dims))}, reverse=True))
    if not compression.nested:
        d = max(dims)  # that of all tables
        chunks = max((number for number in range(2, compression.chunks + 1) if d % (4 * number) == 0), default=None)
        if chunks is None:  # the kernels need chunks of 4 columns, of which d has only one
            return dataclasses.replace(compression, widths=(d,), nested=True)
        return dataclasses.replace(compression, chunks=chunks)
    return dataclasses.replace(compression, widths=widths, tables=limits)


def single_layer_control(
    model: ModelConfig, optimizer: str, own: Mapping[str, TableSettings] = MappingProxyType({})
) -> tuple[ModelConfig, float]:
    """Return the control's model, and the factor by which its rows' learning rate differs from MLET's.

    At initialisation E[W2ᵀW2] = kσ²I, so that rows of W = W1·W2 are σ√k times as large as rows of W1. Under SGD a step
    moves W kσ² times as far as it moves a single layer, for the same gradient g. Under Adagrad the first step moves W1
    by the learning rate times sign(g·W2ᵀ), and so W by kσ/√d times as far along g as a single layer, on average over
    Gaussian W2 and g.

    The initial scale is that of each table, by its own k and σ. The learning rate is one for the rows of all tables,
    and the factor that of the tables without settings of their own: with σ = 1/√k and SGD it is 1 for all.

    Args:
        model: the MLET model.
        optimizer: ``sgd`` for the factor under SGD; any other name for the factor under Adagrad.
        own: the settings of the tables that have some of their own, by name.
    """
    of_all = model.of_all_tables
    control = dataclasses.replace(
        model.single_layer(),
        rows_init_gain=model.rows_init_gain * _gain(of_all),
        tables={
            name: TableModelConfig(
                embedding_dim=each.embedding_dim,
                pooling=each.pooling,
                rows_init=each.rows_init,
                rows_init_std=each.rows_init_std,
                rows_init_gain=each.rows_init_gain * _gain(each),
            )
            for name, each in own.items()
        },
    )
    gain = _gain(of_all)
    return control, gain * gain if optimizer == "sgd" else gain * math.sqrt(of_all.row_width / of_all.embedding_dim)


def _gain(table: TableSettings) -> float:
    """Return σ√k, by which W = W1·W2 is larger than W1 at initialisation; 1 for a single-layer table."""
    if table.hidden_dim is None:
        return 1.0
    std = 1 / math.sqrt(table.hidden_dim) if table.projection_init_std is None else table.projection_init_std
    return std * math.sqrt(table.hidden_dim)


def _finished(config: Config) -> bool:
    """Return whether an earlier comparison trained this arm to the end with the same settings."""
    run = RunDirectory(Path(config.run.dir))
    if config.run.overwrite or not run.summary.exists():
        return False
    return dataclasses.replace(run.load_config(), run=config.run) == config


def _contents(file: Path) -> dict[str, Any]:
    """Return the fingerprints of the data sets that arms were trained on; earlier versions did not record them."""
    try:
        found = load_json(file)
        return dict(found)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file}: cannot be read: {error}; remove it, if the data set is still the same") from None


def _check_contents(base: Path, content: Mapping[str, str], of_arms: Mapping[str, Mapping[str, str]]) -> None:
    """Raise UserError if an arm was trained with other data, whose results do not compare with those of this data.

    Args:
        base: the directory of the comparison.
        content: fingerprints of the splits and the vocabulary as they are now.
        of_arms: those of the arms that are not trained again.
    """
    for arm, before in of_arms.items():
        parts = [name for name in sorted(before.keys() | content.keys()) if before.get(name) != content.get(name)]
        if parts:
            raise UserError(
                f"{base / arm}: was trained on another data set, of which {', '.join(parts)} differ; choose another "
                "run.dir, or train all models again with run.overwrite=true"
            )


def _check_export(export: Path, replace: bool) -> None:
    """Raise UserError unless the directory is free, or is an export that may be replaced."""
    try:
        if not export.exists() or not any(export.iterdir()):
            return
        content = load_json(export / "manifest.json")
        if not {"format_version", "model"} <= set(content):  # checkpoints and data sets also have a manifest.json
            raise KeyError("model")
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{export} is in the way and not an export of `mlet export`; move it away, or choose another run.dir"
        ) from None
    if not replace:
        raise UserError(
            f"{export} is an export of another run; choose another run.dir, or replace it with run.overwrite=true"
        )


def _run_command(*arguments: str) -> dict[str, Any]:
    """Run an `mlet` command in a new process and return its JSON result."""
    result: dict[str, Any] = json.loads(run_child_command(*arguments, "--json"))
    return result
