"""MLET beside the single layer, and beside the control that separates its gain from a larger learning rate."""

import dataclasses
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mlet_dist.config.config_file import load_config, save_config
from mlet_dist.config.sections import Config, ModelConfig, RunConfig
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.training.run_directory import RunDirectory

SINGLE, MLET, CONTROL = "single", "mlet", "control"
_TITLES = {SINGLE: "single layer", MLET: "MLET", CONTROL: "single layer, MLET's rate and scale"}
_CAPTION = """\
The last row is the control: what MLET gains over it is due to the factorisation, the rest to a larger learning rate.
One seed; learning rates are not tuned for each arm. The logit difference is the largest, over all test rows, between
the trained model and its export in plain TorchRec."""


def compare(config: Config, nproc: int) -> dict[str, Any]:
    """Train, export and verify three arms below ``run.dir``, each by the commands a user would type.

    The arms: the single layer; MLET; and the single layer at MLET's effective learning rate (times kσ² under SGD) and
    initial scale (times σ√k). What MLET gains over the last is what the factorisation itself brings.

    Where an earlier comparison was stopped, the arms that it trained to the end with the same settings are not trained
    again, unless ``run.overwrite`` is set.

    Returns:
        ``ok`` (every export serves what was trained) and ``arms``: by name, what train and verify found.

    Raises:
        UserError: ``model.hidden_dim`` is null, or what is below ``run.dir`` is in the way.
        SystemExit: one of the commands failed, and has shown why.
        ChildProcessError: one of them was killed.
    """
    if config.model.hidden_dim is None:
        raise UserError("model.hidden_dim is null: there is no MLET arm to compare; set it, best above 4 times d")
    base = Path(config.run.dir)
    configs = _arm_configs(config)
    finished = {arm for arm in configs if _finished(configs[arm])}
    for arm in configs:
        if arm not in finished:
            RunDirectory(base / arm).check_available(configs[arm])
        _check_export(base / f"{arm}-export", config.run.overwrite or arm in finished)
    with _writing(base):
        base.mkdir(parents=True, exist_ok=True)
        for arm, arm_config in configs.items():
            save_config(arm_config, base / f"{arm}.yaml")
    for arm in configs:
        load_config(base / f"{arm}.yaml")  # every arm's settings are checked before the first is trained
    arms: dict[str, dict[str, Any]] = {}
    for arm in configs:
        run, export = base / arm, base / f"{arm}-export"
        if arm in finished:
            print(f"{run} holds this arm's finished run: not trained again", file=sys.stderr, flush=True)
            _, _, trained = RunDirectory(run).load()
        else:
            trained = _run_command("train", str(base / f"{arm}.yaml"), "--nproc", str(nproc))
        with _writing(export):
            if export.exists():
                shutil.rmtree(export)
        _run_command("export", str(run), "--out", str(export))
        verified = _run_command("verify", str(export), "--run", str(run), "--data", config.data.path)
        largest = verified["outputs"]["dcp"]["max_abs_logit_diff"]
        arms[arm] = trained | {"ok": verified["ok"], "max_abs_logit_diff": largest}
    result = {"ok": all(arm["ok"] for arm in arms.values()), "run": str(base), "arms": arms}
    with _writing(base):
        (base / "comparison.json").write_text(to_json(result, indent=1) + "\n", encoding="utf-8")
        (base / "comparison.md").write_text(comparison_table(result) + "\n", encoding="utf-8")
    return result


def comparison_table(result: dict[str, Any]) -> str:
    """The arms as a Markdown table, readable on a terminal."""
    header = ["", "tables trained", "tables served", "test AUC", "test LogLoss", "largest logit difference"]
    rows = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for name, arm in result["arms"].items():
        rows.append(
            [
                _TITLES[name],
                _size(arm["trained_table_bytes"]),
                _size(arm["served_table_bytes"]),
                _metric(arm["test_auc"]),
                _metric(arm["test_logloss"]),
                _difference(arm["max_abs_logit_diff"]),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = []
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _CAPTION])


def _arm_configs(config: Config) -> dict[str, Config]:
    from mlet_dist.comparison import single_layer_control

    def arm(name: str, **changes: Any) -> Config:
        run = RunConfig(str(Path(config.run.dir) / name), config.run.overwrite)
        checkpoints = config.train.checkpoint_dir
        train = config.train
        if checkpoints is not None:
            train = dataclasses.replace(train, checkpoint_dir=f"{checkpoints.rstrip('/')}/{name}")
        return dataclasses.replace(config, run=run, train=train, **changes)

    rate = config.optimizer.rows_learning_rate or config.optimizer.learning_rate
    control, rate_factor = single_layer_control(config.model, config.optimizer.name)
    control_optimizer = dataclasses.replace(config.optimizer, rows_learning_rate=rate * rate_factor)
    return {
        SINGLE: arm(SINGLE, model=dataclasses.replace(config.model, hidden_dim=None)),
        MLET: arm(MLET),
        CONTROL: arm(CONTROL, model=control, optimizer=control_optimizer),
    }


def _finished(config: Config) -> bool:
    """Whether an earlier comparison trained this arm to the end with the same settings, and may be taken up."""
    run = RunDirectory(Path(config.run.dir))
    if config.run.overwrite or not run.summary.exists():
        return False
    return dataclasses.replace(load_config(run.config), run=config.run) == config


def _check_export(export: Path, replace: bool) -> None:
    """Raise UserError unless the directory is free, or an export that is to be replaced."""
    try:
        if not export.exists() or not any(export.iterdir()):
            return
        content = json.loads((export / "manifest.json").read_text(encoding="utf-8"))
        if not {"format_version", "model"} <= set(content):  # checkpoints and data sets have a manifest.json too
            raise KeyError("model")
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{export} is not an export of `mlet export`; move it away") from None
    if not replace:
        raise UserError(f"{export} holds an export of another run; replace it with run.overwrite=true")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _run_command(*arguments: str) -> dict[str, Any]:
    print("$", shlex.join(["mlet", *arguments]), file=sys.stderr, flush=True)
    # In a session of its own it does not see Ctrl-C, but only what follows from it here.
    command = [sys.executable, "-m", "mlet_dist", *arguments, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as child:
        try:
            output, _ = child.communicate()
        except KeyboardInterrupt:
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(30)
            child.kill()
            raise
    if child.returncode < 0:
        raise ChildProcessError(f"`mlet {shlex.join(arguments)}` was killed by signal {-child.returncode}")
    lines = output.splitlines()
    if not lines:
        raise SystemExit(child.returncode)
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def _metric(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _difference(value: float | None) -> str:
    if value is None:
        return "infinite"
    return f"{value:.1e}" if value else "none, bit for bit"


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count < 1e9 else f"{count / 1e9:,.1f} GB"


def single_layer_control(model: ModelConfig, optimizer: str) -> tuple[ModelConfig, float]:
    """The single layer at MLET's initial scale, and the factor on the rows' learning rate that makes them equal.

    At initialisation E[W2ᵀW2] = kσ²I. MLET draws its rows σ√k times larger. Under SGD it steps W kσ² times further for
    the same gradient g. Under Adagrad a first step moves W1 by its learning rate times sign(g·W2ᵀ), and so W by kσ/√d
    times what a single layer moves along g, on average over Gaussian W2 and g.

    Args:
        model: the MLET model.
        optimizer: ``sgd`` or ``adagrad``.
    """
    if model.hidden_dim is None:
        return model, 1.0
    std = 1 / math.sqrt(model.hidden_dim) if model.projection_init_std is None else model.projection_init_std
    gain = std * math.sqrt(model.hidden_dim)
    control = dataclasses.replace(model, hidden_dim=None, rows_init_gain=model.rows_init_gain * gain)
    if optimizer == "sgd":
        return control, gain * gain
    return control, gain * math.sqrt(model.hidden_dim / model.embedding_dim)
