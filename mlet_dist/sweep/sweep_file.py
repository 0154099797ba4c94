"""The YAML file of `mlet sweep`: which settings are tried, how they are tuned, and with which seeds."""

import dataclasses
import json
import typing
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlet_dist.config.config_file import Config
from mlet_dist.config.limits import MAX_STEPS
from mlet_dist.config.overrides import COMMAND_LINE, apply_override
from mlet_dist.config.parser import did_you_mean, parse_section, setting, to_yaml
from mlet_dist.config.strict_yaml import load_yaml
from mlet_dist.config.validation_settings import names_metric
from mlet_dist.errors import UserError

_SET_BY_THE_SWEEP = {"run.dir": "--out or runs", "train.seed": "seeds"}
_MAX_TRIALS, _MAX_WORKERS, _MAX_RANKS = 10_000, 1024, 1024


@dataclass(frozen=True)
class Interval:
    """The values of a setting among which the best one is searched, on a logarithmic scale."""

    low: float = setting("The smallest value.", above=0, at_most=1e30)
    high: float = setting("The largest value.", above=0, at_most=1e30)


@dataclass(frozen=True)
class TuneConfig:
    """How the settings of each arm are chosen: from the same number of trials, steps and values for every arm."""

    settings: dict[str, Interval] = field(
        default_factory=dict,
        metadata={
            "meaning": "The settings that are tuned, by name, as optimizer.learning_rate: {low: 0.001, high: 0.3}: "
            "numbers with a fraction, searched on a logarithmic scale. None: all arms are trained with "
            "the settings that they have."
        },
    )
    trials: int = setting("Number of combinations that are tried for each arm.", 16, at_least=1, at_most=_MAX_TRIALS)
    steps: int = setting("Steps of a whole trial.", 1000, at_least=1, at_most=MAX_STEPS)
    first_steps: int | None = setting(
        "Steps after which the trials of an arm are compared for the first time, and again after keep times as many, "
        "and so on: one of keep trials goes on each time. null: all trials take all steps.",
        None,
        at_least=1,
        at_most=MAX_STEPS,
    )
    keep: int = setting("One of so many trials goes on after each comparison.", 3, at_least=2, at_most=_MAX_TRIALS)
    metric: str = setting(
        "logloss or auc, of the split valid, by which trials are compared. With several labels those are of the first "
        "one, and click_auc and click_logloss are of the label click.",
        "logloss",
    )

    @property
    def compared_at(self) -> list[int]:
        """The numbers of steps after which a trial is measured, of which the last is that of a whole trial."""
        found = []
        at = self.first_steps or self.steps
        while at < self.steps:
            found.append(at)
            at *= self.keep
        return [*found, self.steps]


@dataclass(frozen=True)
class SweepConfig:
    """The content of the file."""

    config: str = setting(
        "YAML file of settings, as of `mlet train`; a relative path begins at the sweep's file, on the command line at "
        "the working directory."
    )
    settings: dict[str, Any] = field(
        default_factory=dict, metadata={"meaning": "Settings of all arms, by name, which replace those of config."}
    )
    arms: dict[str, Any] = field(
        default_factory=dict,
        metadata={"meaning": "Settings of each arm, by its name: {single: {model.hidden_dim: null}}."},
    )
    grid: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "meaning": "Lists of values of settings, by name: each combination is one more arm, or if there are arms, "
            "one of each arm."
        },
    )
    preset: Literal["paper"] | None = setting(
        "paper: the grid of the MLET paper (arXiv:2006.05623), which is d of 4, 8, 16 and 32 with k of 64 and 128 and "
        "its single layers. null: none.",
        None,
    )
    baselines: bool = setting(
        "true: add the single layer of every MLET arm, and its control, a single layer with the arm's initial scale "
        "and effective learning rate; false: do not.",
        True,
    )
    tune: TuneConfig = field(default_factory=TuneConfig)
    seeds: tuple[int, ...] = setting(
        "Values of train.seed with which each arm is trained to the end, with the best settings that were found.",
        (0, 1, 2, 3, 4),
        at_least=0,
        at_most=2**63 - 1,
        min_length=1,
    )
    outputs: tuple[Literal["dcp", "fp16", "int8", "int4"], ...] = setting(
        "Outputs of `mlet export` in which each run with a seed is measured, of a compressed run their mixed or kept "
        "variants: `mlet report` needs the predictions. []: none.",
        ("dcp", "fp16", "int8", "int4"),
    )
    runs: str | None = setting(
        "Directory of the runs, in which other sweeps with it find what they share; a relative path begins as that "
        "of config. null: runs in the directory of the results.",
        None,
    )
    workers: int = setting("Number of arms that are trained at the same time.", 1, at_least=1, at_most=_MAX_WORKERS)
    nproc: int = setting("Number of ranks of each run.", 1, at_least=1, at_most=_MAX_RANKS)


def load_sweep(path: Path, overrides: Sequence[str] = ()) -> SweepConfig:
    """Read the file of a sweep; paths in it become relative to the working directory.

    Args:
        path: the file.
        overrides: keys that replace those of the file, as ``workers=8``, ``tune.steps=500``,
            ``tune.settings.optimizer.learning_rate.low=0.01`` or ``settings.data.path=logs``.

    Raises:
        UserError: the file cannot be read, or a key is unknown, missing, of the wrong type or out of range.
    """
    content = load_yaml(path, "sweep")
    content = {} if content is None else content
    sources: dict[str, str] = {}
    if isinstance(content, dict):  # parse_section reports all else
        for override in overrides:
            _apply(content, override, sources)
    sweep: SweepConfig = parse_section(SweepConfig, content, "", str(path), sources)
    for name, interval in sweep.tune.settings.items():
        if not _has_fractions(name):
            raise UserError(
                f"{path}: tune.settings.{name}: only numbers with a fraction are tuned; try its values as arms, by "
                f"grid: {{{name}: [VALUE, VALUE]}}"
            )
        if not interval.low < interval.high:
            raise UserError(f"{path}: tune.settings.{name}: low {interval.low:g} is not below high {interval.high:g}")
    if sweep.tune.first_steps is not None and sweep.tune.first_steps > sweep.tune.steps:
        raise UserError(f"{path}: tune.first_steps {sweep.tune.first_steps} is above tune.steps {sweep.tune.steps}")
    if not names_metric(metric := sweep.tune.metric):
        raise UserError(
            f"{path}: tune.metric: expected logloss, auc, or one of these of a label, as click_auc, found {metric}"
            f"{did_you_mean(metric, ('logloss', 'auc'))}"
        )
    for key, entries, kind, expected in (
        ("arms", sweep.arms, Mapping, "settings by name"),
        ("grid", sweep.grid, list, "a list of values"),
    ):
        for name, value in entries.items():
            if not isinstance(value, kind) or not value:
                raise UserError(f"{path}: {key}.{name}: expected {expected}, found {to_yaml(value)}")
    for name in sweep.arms:
        if not name.strip() or any(unicodedata.category(each) in ("Cc", "Zl", "Zp") for each in name):
            raise UserError(
                f"{path}: arms: {json.dumps(name)} is no name of an arm; use visible characters in one line"
            )
    arms = {f"arms.{name}": settings for name, settings in sweep.arms.items()}
    named = {"settings": sweep.settings, "grid": sweep.grid, "tune.settings": sweep.tune.settings, **arms}
    for key, settings in named.items():
        for name in _SET_BY_THE_SWEEP.keys() & settings.keys():
            raise UserError(f"{path}: {key}.{name}: each run of a sweep has its own; use {_SET_BY_THE_SWEEP[name]}")
    for key, values in (("seeds", sweep.seeds), ("outputs", sweep.outputs)):
        if len(set(values)) < len(values):
            raise UserError(f"{path}: {key} is {to_yaml(list(values))}; name each {key.removesuffix('s')} once")
    if not (sweep.arms or sweep.grid or sweep.preset):
        raise UserError(f"{path}: names no arms; set arms, grid or preset")
    begin = {key: Path() if key in sources else path.parent for key in ("config", "runs")}
    return dataclasses.replace(
        sweep,
        config=str(begin["config"] / Path(sweep.config).expanduser()),
        runs=None if sweep.runs is None else str(begin["runs"] / Path(sweep.runs).expanduser()),
    )


def _has_fractions(name: str) -> bool:
    """Return whether a setting takes numbers with a fraction; true of an unknown one, which the arms report."""
    kind: Any = Config
    for part in name.split("."):
        if not dataclasses.is_dataclass(kind):
            return True  # inside of values by name, as model.arguments
        kind = next((each.type for each in dataclasses.fields(kind) if each.name == part), Any)
    return kind is Any or float in (kind, *typing.get_args(kind))


def _apply(content: dict[str, Any], override: str, sources: dict[str, str]) -> None:
    """Write one override into the content of the file, and its source into ``sources``."""
    key, equals, text = override.partition("=")
    section, _, name = key.partition(".")
    settings = content.get(section)
    if section == "settings" and name and equals and isinstance(settings, dict | None):
        content[section] = {**(settings or {}), name: text}  # as it was typed: its type is that of the setting
        sources[key] = COMMAND_LINE
    else:
        apply_override(SweepConfig, content, override, sources)
