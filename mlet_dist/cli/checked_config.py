"""The config of a command, checked before torch is imported."""

import argparse
import sys
from pathlib import Path

from mlet_dist.cli.nodes import node_count
from mlet_dist.cli.process import launched, rank_of
from mlet_dist.config.sections import Config, load_config


def load_checked(args: argparse.Namespace) -> Config:
    """The config, checked against the data set and the number of ranks before torch is imported."""
    from mlet_dist.data.location import data_set_path
    from mlet_dist.data.schema import DatasetSchema

    config = load_config(Path(args.config), args.overrides)
    schema = DatasetSchema.load(data_set_path(config.data.path))
    config.check_features(schema.dense, list(schema.num_embeddings))
    config.check_world_size((args.nproc or 1) * node_count(args))
    if not rank_of(args) and not launched():
        warn(config)
    return config


def warn(config: Config) -> None:
    """Print what is allowed and rarely meant."""
    for warning in config.warnings():
        print(f"mlet: warning: {warning}", file=sys.stderr)
