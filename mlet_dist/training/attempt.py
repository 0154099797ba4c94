"""A job that torch elastic starts again is the same job."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlet_dist.config.sections import Config
from mlet_dist.training.run_directory import RunDirectory


def for_this_attempt(config: Config) -> Config:
    """The config, of which torch elastic's restarts take no second `run.overwrite` or `never`: they go on."""
    if not _is_restart():
        return config
    resume = "auto" if config.train.resume == "never" else config.train.resume
    return replace(config, run=replace(config.run, overwrite=False), train=replace(config.train, resume=resume))


def finished_before(config: Config, *, by_any: bool = False) -> dict[str, Any] | None:
    """The summary of a run that an earlier attempt has finished, but did not live to show; None where there is none.

    Args:
        by_any: whether any earlier job counts as an attempt, and not those of this torch elastic alone.

    Raises:
        UserError: it cannot be read.
    """
    run = RunDirectory(Path(config.run.dir))
    if not (by_any or _is_restart()) or not run.summary.exists():
        return None
    saved, _, summary = run.load()
    return summary if for_this_attempt(saved) == for_this_attempt(config) else None


def _is_restart() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
