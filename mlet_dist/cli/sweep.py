"""`mlet sweep`."""

import argparse
from pathlib import Path

from mlet_dist.cli.output import Result, print_text
from mlet_dist.cli.process import make_children_die_with_parent
from mlet_dist.config.setting_help import describe_keys
from mlet_dist.sweep.sweep_file import SweepConfig, load_sweep

TEXT = "Tune models of many settings, each from the same budget, and train them with several seeds."
EPILOG = f"""\
The arms of a sweep are named in its file, one by one or as a grid; the single layer and the control of every MLET arm
are added. The settings of each arm are tuned on the split valid, by successive halving: the same number of trials and
steps for every arm. Each arm is then trained with every seed. The directory gets results.parquet, with a row for each
run, results.txt, a table of the arms, and arms, their YAML files with the chosen settings.

The same command again goes on where it was interrupted. A run is found again by its settings, so that a changed file,
or another sweep with the same `runs`, repeats nothing. Runs that diverged, and those whose dense arch returns the same
for all rows, are named and left out of all means.

Keys on the command line replace those of the file, so that one file serves several data sets:

  mlet sweep configs/sweeps/smaller_tables.yaml config=configs/avazu.yaml settings.data.path=data/avazu workers=8 \\
      tune.steps=84225 tune.settings.optimizer.rows_learning_rate.low=0.001 --out sweeps/avazu

keys of the file, or as key=value:
{describe_keys(SweepConfig)}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.add_argument("sweep", metavar="SWEEP", help="YAML file of the sweep, for example configs/sweeps/criteo.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="keys that replace those of the file"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="directory of the results")


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    sweep, out = load_sweep(Path(args.sweep), args.overrides), Path(args.out)
    # Only now, because this imports torch: errors in the file are found at once.
    from mlet_dist.sweep.run_sweep import run_sweep

    make_children_die_with_parent()
    result = run_sweep(sweep, out)
    if not args.json:
        print_text((out / "results.txt").read_text(encoding="utf-8").rstrip())
        return None, True
    return result, True
