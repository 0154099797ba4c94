"""A job that torch elastic starts again is the same job."""

import os
from dataclasses import replace

from mlet_dist.config import Config


def for_this_attempt(config: Config) -> Config:
    """The config, of which torch elastic's restarts take no second `run.overwrite` or `never`: they go on."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return config
    resume = "auto" if config.train.resume == "never" else config.train.resume
    return replace(config, run=replace(config.run, overwrite=False), train=replace(config.train, resume=resume))
