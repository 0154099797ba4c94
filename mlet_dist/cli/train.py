"""`mlet train`."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from mlet_dist.cli.options import add_config, add_nodes, load_checked
from mlet_dist.cli.output import Result, show
from mlet_dist.cli.process import before_torch, in_ranks, launched, rank_of
from mlet_dist.config.config_file import describe_settings, load_config
from mlet_dist.config.sections import Config
from mlet_dist.errors import UserError

TEXT = "Train a model and evaluate it, on one machine or as one of several."
EPILOG = f"settings, as section.key=value or in the YAML file:\n{describe_settings()}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's own options."""
    add_config(parser)
    add_nodes(parser)
    parser.add_argument(
        "--export", metavar="OUT", help="when it has finished, also export there and verify, on the first node"
    )
    parser.add_argument("--once", action="store_true", help="where the run has finished already, be content")


def run(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    """Run it; a result to show, and whether all is well."""
    if args.export is not None and rank_of(args) is not None:
        raise UserError("--export is for --nproc; under torchrun, call `mlet export` when the run has finished")
    summary = _train(args, arguments)
    if args.export is None or args.node_rank:
        return summary, True
    if summary is not None:
        show(summary, args.json)
    return _export_and_verify(load_config(Path(args.config), args.overrides), args.export)


def _train(args: argparse.Namespace, arguments: list[str]) -> Result | None:
    """The summary; None where a rank has shown it."""
    from mlet_dist.training.job import config_of_attempt, finished_summary
    from mlet_dist.training.run_directory import RunDirectory

    done = finished_summary(load_config(Path(args.config), args.overrides), by_any=args.once)
    if done is not None:
        return done

    def check() -> Config:
        config = load_checked(args)
        if not launched() and not args.node_rank:  # the first node's ranks write there while others' come
            RunDirectory(Path(config.run.dir)).check_available(config_of_attempt(config))
        return config

    if args.nproc is not None:
        in_ranks(args, arguments, check)
        return None
    config = check()
    before_torch()
    from mlet_dist.training.trainer import train

    return train(config, fingerprint=args.json)


def _export_and_verify(config: Config, out: str) -> tuple[Result, bool]:
    """In processes of their own: torch elastic has taken the signals of this one."""
    run = config.run.dir
    commands = [["verify", out, "--run", run, "--data", config.data.path, "--json"]]
    if not (Path(out) / "manifest.json").exists():  # it was renamed to its name when it was whole
        commands.insert(0, ["export", run, "--out", out])
    for command in commands:
        done = subprocess.run([sys.executable, "-m", "mlet_dist", *command], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise ChildProcessError(f"mlet {' '.join(command)}: failed with exit code {done.returncode}")
    found: Result = json.loads(done.stdout.splitlines()[-1])
    return found, bool(found["ok"])
