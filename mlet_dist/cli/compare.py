"""`mlet compare`."""

import argparse

from mlet_dist.cli.options import add_config, load_checked_config
from mlet_dist.cli.output import Result, print_text
from mlet_dist.cli.process import make_children_die_with_parent
from mlet_dist.config.config_file import Config
from mlet_dist.config.setting_help import describe_keys

TEXT = "Compare MLET with single-layer tables: train, export and verify both, and a control."
EPILOG = f"""\
The command trains, exports and verifies three models: single-layer tables; MLET; and the control, which is a single
layer with the initial scale of MLET's product W1·W2 and with MLET's effective learning rate. What MLET gains over the
control is due to the factorisation. With compression they are single-layer tables without it, and single-layer tables
and MLET within the budget. How MLET differs from the others is shown with intervals of a paired bootstrap over the
rows. Each model is written to a directory below run.dir. The same command again does not repeat the models that were
trained to the end.

settings, as section.key=value or in the YAML file:
{describe_keys(Config)}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_config(parser)


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    from mlet_dist.comparison import compare
    from mlet_dist.comparison_report import comparison_report

    config = load_checked_config(args)
    make_children_die_with_parent()
    result = compare(config, args.nproc or 1)
    if not args.json:
        print_text(comparison_report(result))
        return None, result["ok"]
    return result, result["ok"]
