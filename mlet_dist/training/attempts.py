"""A job that is started again: what its settings mean then, and the result if an earlier attempt finished."""

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlet_dist.config.config_file import Config
from mlet_dist.config.parser import to_yaml
from mlet_dist.errors import UserError
from mlet_dist.training.run_directory import RunDirectory

ENDED = "ended"
"""The file beside a rank's error file that says to its launcher that the rank has succeeded."""

_ATTEMPT = "MLET_ATTEMPT"
_NOT_REPLACED = "MLET_RUN_NOT_REPLACED"
_SHOWN = 5  # settings that differ


def mark_attempt(number: int, name: str = "", *, has_replaced: bool = True) -> None:
    """Tell this process, and the ranks that it starts, which attempt of its nodes to run the job this is, from 0.

    Args:
        number: how often the nodes have started their ranks before.
        name: a name that no other attempt has.
        has_replaced: whether an earlier attempt has replaced the run that ``run.dir`` held before the job.
    """
    os.environ[_ATTEMPT] = f"{number}.{name}"
    os.environ[_NOT_REPLACED] = "" if has_replaced else "1"


def run_to_replace(config: Config) -> str | None:
    """Return a digest of the run in ``run.dir``, which changes when ranks replace it; None if the settings keep it.

    A rank may crash before it has replaced the run. What is there then is not a result of this job.
    """
    if not (config.run.overwrite or config.train.resume == "never"):
        return None
    with suppress(OSError):
        return hashlib.sha256(RunDirectory(Path(config.run.dir)).config.read_bytes()).hexdigest()
    return ""


def name_of_attempt() -> str:
    """Return a name that all ranks of this attempt share, and no other attempt has; "" if no launcher gave one."""
    return os.environ.get(_ATTEMPT, "").partition(".")[2]


def config_of_attempt(config: Config) -> Config:
    """Return the config without ``run.overwrite`` and ``train.resume: never`` if an earlier attempt has obeyed them."""
    if not _is_restart():
        return config
    resume = "auto" if config.train.resume == "never" else config.train.resume
    return replace(config, run=replace(config.run, overwrite=False), train=replace(config.train, resume=resume))


def finished_summary(config: Config, *, by_any: bool = False) -> dict[str, Any] | None:
    """Return the summary of a run that an earlier attempt of this job finished without printing it, or None.

    Args:
        config: the resolved settings.
        by_any: whether any earlier job counts as an attempt, and not only those whose ranks were restarted.

    Raises:
        UserError: the summary cannot be read; or ``by_any``, and the run that finished had other settings.
    """
    run = RunDirectory(Path(config.run.dir))
    if not (by_any or _is_restart()) or not run.summary.exists():
        return None
    saved, _, summary = run.load()
    saved = replace(saved, run=replace(saved.run, overwrite=False))  # what the run replaced is gone
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
    """Return whether what ``run.dir`` holds may come from an earlier attempt of this job."""
    return restarts() > 0 and not os.environ.get(_NOT_REPLACED)


def restarts() -> int:
    """Return how often the ranks of this job have been restarted, by the launcher or by torch elastic."""
    by_launcher = os.environ.get(_ATTEMPT, "").partition(".")[0]
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) + int(by_launcher or 0)
