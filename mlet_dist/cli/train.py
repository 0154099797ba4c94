"""`mlet train`."""

import argparse
import json
import signal
from contextlib import suppress
from pathlib import Path

from mlet_dist.atomic_directory import check_free
from mlet_dist.child_command import run_child_command
from mlet_dist.cli.interrupts import InterruptOnStopSignal
from mlet_dist.cli.options import add_config, add_max_restarts, add_nodes, load_checked_config
from mlet_dist.cli.output import Result, print_result, print_text
from mlet_dist.cli.process import (
    configure_torch,
    is_launched_rank,
    leave_result_to_parent,
    rank_of,
    result_is_left_to_parent,
)
from mlet_dist.cli.ranks import run_in_ranks
from mlet_dist.cli.verify import verification_table
from mlet_dist.config.config_file import Config, load_config
from mlet_dist.config.setting_help import describe_keys
from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import Interrupted, UserError
from mlet_dist.training.signals import STOP_SIGNALS
from mlet_dist.urls import is_url

TEXT = "Train a model and evaluate it, on one machine or as one node of several."
_STOP_SECONDS = 5.0  # of the 30 s that schedulers give by default; finished work of an export is kept
EPILOG = f"settings, as section.key=value or in the YAML file:\n{describe_keys(Config)}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    add_config(parser)
    add_nodes(parser)
    add_max_restarts(parser)
    parser.add_argument(
        "--export",
        metavar="DIR",
        help="when the run has finished, export it to this directory and verify the export, on the first node; --json "
        "then prints one object, whose key `export` holds the result of `mlet verify`",
    )
    parser.add_argument(
        "--once",
        action="store_true",
        help="if the run has finished already with the same settings, print its result instead of an error",
    )


def run(args: argparse.Namespace, arguments: list[str]) -> tuple[Result | None, bool]:
    """Run the command; return the result to print, or None, and whether it succeeded."""
    if args.export is not None and rank_of(args) is not None:
        raise UserError("--export needs --nproc; under torchrun, call `mlet export` when the run has finished")
    summary = _train(args, arguments)
    if args.export is None or args.node_rank:
        return summary, True
    config = load_config(Path(args.config), args.overrides)
    if not args.json and summary is not None:
        print_result(summary, as_json=False)
    try:
        with InterruptOnStopSignal():
            verified, ok = _export_and_verify(config, args.export)
    except KeyboardInterrupt as stopped:
        if not stopped.args:  # Ctrl-C
            raise
        name = signal.Signals(stopped.args[0]).name
        raise Interrupted(f"{name}: the run has finished; run the same command again to complete its export") from None
    if not args.json:
        print_text(verification_table(verified))
        return None, ok
    if summary is None:
        from mlet_dist.training.run_directory import RunDirectory

        _, _, summary = RunDirectory(Path(config.run.dir)).load()
    return summary | {"export": verified}, ok


def _train(args: argparse.Namespace, arguments: list[str]) -> Result | None:
    """Return the summary of the run; None if a rank has printed it, or with ``--export --json`` left it to be read."""
    from mlet_dist.training.attempts import config_of_attempt, finished_summary
    from mlet_dist.training.run_directory import RunDirectory

    config = load_config(Path(args.config), args.overrides)
    # Whoever asks for an export of a finished run does not want to train it again.
    exports = args.export is not None and not config.run.overwrite
    done = finished_summary(config, by_any=args.once or exports)
    if done is not None:
        return done
    if args.export is not None and not args.node_rank:
        _check_export(args.export)

    def check() -> Config:
        config = load_checked_config(args)
        # Ranks of the first node may already write there. A run that a restart finds finished is not trained again.
        if not is_launched_rank() and not args.node_rank and finished_summary(config) is None:
            RunDirectory(Path(config.run.dir)).check_available(config_of_attempt(config))
        return config

    if args.nproc is not None:
        if args.export is not None and args.json:  # one object, with the result of the export
            leave_result_to_parent()
        summary_file = RunDirectory(Path(config.run.dir)).summary
        before = _identity(summary_file)
        try:
            run_in_ranks(args, arguments, check)
        except KeyboardInterrupt as stopped:
            # torch elastic reports a signal even if it came when the ranks had finished the run.
            finished = _identity(summary_file) not in (None, before)
            by_stop_signal = stopped.args[:1] in [(number,) for number in STOP_SIGNALS]
            if not (finished and by_stop_signal) or args.export is not None:
                raise
        return None
    config = check()
    configure_torch()
    from mlet_dist.training.trainer import train

    summary = train(config)
    return None if result_is_left_to_parent() else summary


def _identity(file: Path) -> tuple[int, int] | None:
    """Return what differs if the file is replaced; None if there is none."""
    with suppress(OSError):
        status = file.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def _check_export(out: str) -> None:
    """Raise UserError if the run could not be exported to ``out`` when it has finished."""
    if is_url(out):
        raise UserError(
            f"--export {out}: must be a local directory, where the export is verified; `mlet export RUN --out {out}` "
            "exports a finished run to a URL"
        )
    try:
        check_free(Path(out))
    except UserError as error:
        raise UserError(f"--export {error}") from None


def _export_and_verify(config: Config, out: str) -> tuple[Result, bool]:
    """Export the run and verify the export, in new processes: torch elastic handles the signals of this one."""
    run = config.run.dir
    if not (Path(out) / "manifest.json").exists():  # an export gets its name when it is complete
        run_child_command("export", run, "--out", out, "--json", stop_seconds=_STOP_SECONDS)
    parts = DatasetSchema.load(data_set_path(config.data.path)).parts
    split = next(each for each in ("test", "valid", "train") if each in parts)
    verify = ("verify", out, "--run", run, "--data", config.data.path, "--split", split, "--json")
    found: Result = json.loads(run_child_command(*verify, stop_seconds=_STOP_SECONDS))
    return found, bool(found["ok"])
