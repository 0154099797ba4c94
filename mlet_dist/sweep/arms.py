"""The arms of a sweep: which settings each model has, and the baselines that belong to it."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlet_dist.atomic_file import temporary_of
from mlet_dist.comparison import arm_configs
from mlet_dist.comparison_report import CONTROL, MLET
from mlet_dist.config.config_file import Config, config_text, load_config, save_config
from mlet_dist.config.parser import to_yaml
from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError, writing
from mlet_dist.models.spec import ModelSpec
from mlet_dist.sweep.sweep_file import SweepConfig

_PRESETS: dict[str, dict[str, list[Any]]] = {
    "paper": {"model.embedding_dim": [4, 8, 16, 32], "model.hidden_dim": [64, 128]},
}
_OF_W2 = {
    "optimizer.projections_learning_rate",
    "model.projection_init",
    "model.projection_init_std",
    "model.single_layer_up_to",
}
_PLACE = "run.dir=runs"  # of the check; each run has a directory of its own


@dataclass(frozen=True)
class Arm:
    """One model, before its settings are tuned.

    Attributes:
        name: unique in the sweep.
        config: its settings; ``run.dir`` and ``train.seed`` are replaced.
        kind: ``mlet``, ``single`` (no W2), ``single_compressed`` (the same within the budget of an MLET arm) or
            ``control`` (no W2, and the initial scale and effective learning rate of an MLET arm).
        control_of: of a control, the name of the MLET arm whose tuned settings it follows; it is not tuned itself.
        fixed: the names of settings that the sweep tunes, and the arm sets itself: they are not tuned for it.
    """

    name: str
    config: Config
    kind: str
    control_of: str | None = None
    fixed: frozenset[str] = frozenset()

    def tuned_settings(self, sweep: SweepConfig) -> list[str]:
        """Return the names of the settings that are tuned for this arm."""
        if self.control_of is not None:
            return []
        return [name for name in sweep.tune.settings if name not in self.fixed]


def arms_of(sweep: SweepConfig) -> list[Arm]:
    """Return the arms of a sweep, each checked as a config of `mlet train`.

    Raises:
        UserError: the settings of an arm are wrong; the message names the arm. Or two arms have the same settings, or
            an arm of the file has the name of a baseline.
    """
    found: dict[str, Arm] = {}
    for name, settings in _described(sweep).items():
        config = _load(Path(sweep.config), {**sweep.settings, **settings}, name)
        arm = Arm(
            name,
            config,
            MLET if config.model.has_two_layers else "single",
            fixed=frozenset(sweep.tune.settings) & settings.keys(),
        )
        for end in ("low", "high"):
            tuned = {each: getattr(sweep.tune.settings[each], end) for each in arm.tuned_settings(sweep)}
            _load(Path(sweep.config), {**sweep.settings, **settings, **tuned}, name)
        _add(found, arm, refuse=True)
    for arm in [each for each in found.values() if each.kind == MLET and sweep.baselines]:
        for kind, config in arm_configs(arm.config, spec_of(arm.config)).items():
            if kind != MLET:
                _add(found, Arm(f"{kind} of {arm.name}", config, kind, arm.name if kind == CONTROL else None))
    return list(found.values())


def with_settings(arm: Arm, settings: Mapping[str, Any], file: Path) -> Config:
    """Write the arm's config with ``settings`` into a file at once, below the arm's name, and return it.

    Raises:
        UserError: a setting is wrong; the message names the arm. Or the file cannot be written.
    """
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_of(file)
        save_config(arm.config, temporary)
        config = _load(temporary, settings, arm.name)
        temporary.write_text(f"# arm {json.dumps(arm.name)}\n{config_text(config)}", encoding="utf-8")
        temporary.replace(file)
    return config


def control_config(mlet: Config) -> Config:
    """Return the config of the control of an MLET config, for example of a tuned one."""
    return arm_configs(mlet, spec_of(mlet))[CONTROL]


def settings_of_control(config: Config, names: Iterable[str]) -> dict[str, float]:
    """Return the values that a control has, and not its MLET arm: of tuned settings by name, and of the rows' rate."""
    found = {}
    for name in dict.fromkeys((*names, "optimizer.rows_learning_rate")):
        value: Any = config.to_dict()
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if isinstance(value, int | float):
            found[name] = float(value)
    return found


def spec_of(config: Config) -> ModelSpec:
    """Return the model that a config describes for its data set.

    Raises:
        UserError: the data set cannot be read, or does not have what the config names.
    """
    return ModelSpec.of(config, DatasetSchema.load(data_set_path(config.data.path)))


def _described(sweep: SweepConfig) -> dict[str, Mapping[str, Any]]:
    """Return the settings of each arm that the file describes, by name."""
    found: dict[str, Mapping[str, Any]] = dict(sweep.arms)
    if sweep.grid:
        found = {
            _name(name, values): {**settings, **values}
            for name, settings in (found or {"": {}}).items()
            for values in _combinations(sweep.grid)
        }
    if sweep.preset is not None:
        found |= {_name("", values): values for values in _combinations(_PRESETS[sweep.preset])}
    return found


def _combinations(grid: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def _name(arm: str, values: Mapping[str, Any]) -> str:
    parts = [f"{name.rpartition('.')[2]}={_text(value)}" for name, value in values.items()]
    return " ".join([arm, *parts] if arm else parts)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else to_yaml(value)


def _load(file: Path, settings: Mapping[str, Any], arm: str) -> Config:
    overrides = [f"{name}={_text(value)}" for name, value in settings.items()]
    try:
        config = load_config(file, [*overrides, _PLACE], "settings of the sweep")
    except UserError as error:
        raise UserError(f"arm {arm!r}: {error}") from None
    if config.train.resume not in ("auto", "never"):
        raise UserError(
            f"arm {arm!r}: train.resume is {config.train.resume}; each run of a sweep begins by itself, so leave it "
            "out, or name the weights to begin with by train.initial_weights"
        )
    return config


def _add(arms: dict[str, Arm], arm: Arm, *, refuse: bool = False) -> None:
    """Add an arm unless one has its settings and is tuned as it is, which is an error if ``refuse``."""
    plain = _comparable(arm)
    same = [name for name, each in arms.items() if _comparable(each) == plain and each.kind != CONTROL]
    if same and arm.kind != CONTROL:
        if refuse:
            raise UserError(f"arm {arm.name!r} has the settings of arm {same[0]!r}; leave one of them out")
        return
    if arm.name in arms:
        raise UserError(
            f"arm {arm.name!r} of the file has the name of a baseline that the sweep adds; give it another name, or "
            "set baselines to false"
        )
    arms[arm.name] = arm


def _comparable(arm: Arm) -> tuple[Config, frozenset[str]]:
    """Return the config without the place of its run, and the settings that are not tuned for the arm.

    Where no table has a W2, both are without the settings of W2.
    """
    config = dataclasses.replace(arm.config, run=dataclasses.replace(arm.config.run, dir=""))
    if config.model.has_two_layers:
        return config, arm.fixed
    model = dataclasses.replace(
        config.model, projection_init="normal", projection_init_std=None, single_layer_up_to="auto"
    )
    optimizer = dataclasses.replace(config.optimizer, projections_learning_rate=None)
    return dataclasses.replace(config, model=model, optimizer=optimizer), arm.fixed - _OF_W2
