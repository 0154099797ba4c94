"""A job that is started again: what its settings mean then, and the result if an earlier attempt finished."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlet_dist.config.config_file import Config
from mlet_dist.config.parser import to_yaml
from mlet_dist.errors import UserError
from mlet_dist.training.run_directory import RunDirectory

_SHOWN = 5  # settings that differ


def config_of_attempt(config: Config) -> Config:
    """Return the config without ``run.overwrite`` and ``train.resume: never`` if torch elastic restarted this job."""
    if not _is_restart():
        return config
    resume = "auto" if config.train.resume == "never" else config.train.resume
    return replace(config, run=replace(config.run, overwrite=False), train=replace(config.train, resume=resume))


def finished_summary(config: Config, *, by_any: bool = False) -> dict[str, Any] | None:
    """Return the summary of a run that an earlier attempt of this job finished without printing it, or None.

    Args:
        config: the resolved settings.
        by_any: whether any earlier job counts as an attempt, and not only those restarted by torch elastic.

    Raises:
        UserError: the summary cannot be read; or ``by_any``, and the run that finished had other settings.
    """
    run = RunDirectory(Path(config.run.dir))
    if not (by_any or _is_restart()) or not run.summary.exists():
        return None
    saved, _, summary = run.load()
    differing = _differing(config_of_attempt(saved), config_of_attempt(config))
    if not differing:
        return summary
    if by_any and not config.run.overwrite:
        raise UserError(
            f"run.dir {run.path} holds a run that finished with other settings: {differing}; change them back, choose "
            "another run.dir, or replace it with run.overwrite=true"
        )
    return None


def _differing(saved: Config, wanted: Config) -> str:
    """Return the settings in which two configs differ, with both values; "" if there are none."""
    before, now = saved.to_dict(), wanted.to_dict()
    found = [
        f"{section}.{key} was {to_yaml(before[section][key])}, is {to_yaml(value)}"
        for section, values in now.items()
        for key, value in values.items()
        if before[section][key] != value
    ]
    return "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _is_restart() -> bool:
    return restarts() > 0


def restarts() -> int:
    """Return how often the ranks of this job have been restarted."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
