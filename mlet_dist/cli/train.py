"""`mlet train`."""

import argparse
from pathlib import Path

from mlet_dist.cli.checked_config import load_checked
from mlet_dist.cli.options import add_config
from mlet_dist.cli.output import Result
from mlet_dist.cli.process import before_torch, in_ranks, launched
from mlet_dist.config import describe_settings

TEXT = "Train a model and evaluate it; torchrun -m mlet_dist train … does on many hosts."
EPILOG = f"settings, as section.key=value or in the YAML file:\n{describe_settings()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    add_config(parser)


def run(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    from mlet_dist.training.attempt import finished_before, for_this_attempt
    from mlet_dist.training.run_directory import RunDirectory

    config = load_checked(args)
    if (summary := finished_before(config)) is not None:
        return summary, True
    if not launched():
        RunDirectory(Path(config.run.dir)).check_free(for_this_attempt(config))
    if args.nproc is not None:
        return in_ranks(args, arguments)
    before_torch()
    from mlet_dist.training.trainer import train

    return train(config, fingerprint=args.json), True
