"""`mlet doctor`."""

import argparse

from mlet_dist.cli.output import Result, write

TEXT = "Check this machine: versions, devices, memory; says what to type when something is off."
EPILOG = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    """It has none of its own."""


def run(args: argparse.Namespace, _: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    from mlet_dist.doctor import report, run_doctor

    result = run_doctor()
    if not args.json:
        write(report(result))
        return None, result["ok"]
    return result, result["ok"]
