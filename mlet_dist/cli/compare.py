"""`mlet compare`."""

import argparse

from mlet_dist.cli.options import add_config, load_checked
from mlet_dist.cli.output import Result, write
from mlet_dist.cli.process import tie_children
from mlet_dist.config.config_file import describe_settings

TEXT = "Train, export and verify the single layer, MLET, and the single layer at MLET's effective learning rate."
EPILOG = f"settings, as section.key=value or in the YAML file:\n{describe_settings()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    add_config(parser)


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    from mlet_dist.comparison import compare, comparison_table

    config = load_checked(args)
    tie_children()
    result = compare(config, args.nproc or 1)
    if not args.json:
        write(comparison_table(result))
        write(f"\nWritten to {result['run']}: comparison.md, comparison.json, and each arm's run and export.")
        return None, result["ok"]
    return result, result["ok"]
