"""Options that several commands share, and checks of them and of the config before torch is imported."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mlet_dist.cli.process import is_launched_rank, rank_of
from mlet_dist.cluster.nodes import Nodes, default_port, job_id, parse_node_count
from mlet_dist.config.config_file import Config, load_config
from mlet_dist.config.parser import shorten
from mlet_dist.errors import UserError, print_warning

if TYPE_CHECKING:
    from mlet_dist.models.spec import ModelSpec
    from mlet_dist.training.run_checkpoints import CheckpointChoice

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_LAST_PORT = 65_535
_MAX_DIGITS = 15  # numbers of rows, ranks and seconds
_MAX_RANKS_OF_A_NODE, _MAX_WAIT_S, _MAX_RESTARTS = 1024, 10_000_000, 1_000_000


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError for a wrong command line, and does not accept abbreviated options."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, settings that replace those of the file, and ``--nproc``."""
    add_settings(parser)
    add_nproc(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, and settings that replace those of the file."""
    parser.add_argument(
        "config", metavar="CONFIG", help="YAML file of settings, for example configs/criteo_kaggle.yaml"
    )
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace those of the file"
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add ``--data`` and ``--split``."""
    parser.add_argument("--data", required=True, metavar="DATA", help="directory of the data set, or its URL")
    parser.add_argument(
        "--split", choices=["train", "valid", "test"], default="test",
        help="split of the data set to evaluate on (default: %(default)s)",
    )  # fmt: skip


def add_checkpoint_choice(
    parser: argparse.ArgumentParser, of: str = "RUN", default: str = "that of the last step of a finished run"
) -> None:
    """Add ``--step`` and ``--best``, which choose a checkpoint of the run ``of``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--step",
        type=_step,
        metavar="N",
        help=f"take the checkpoint of {of} after step N, also of a run that has not finished (default: {default})",
    )
    group.add_argument(
        "--best",
        action="store_true",
        help=f"take the best checkpoint of {of} so far, by its train.keep_best, also of a run that has not finished",
    )


def add_run_or_export(parser: argparse.ArgumentParser) -> None:
    """Add ``RUN_OR_EXPORT``, and the options that choose a checkpoint of a run."""
    parser.add_argument(
        "target",
        metavar="RUN_OR_EXPORT",
        help="directory that `mlet train` or `mlet export` made, or of a checkpoint of a run",
    )
    add_checkpoint_choice(parser, "a run")


def choice_of(args: argparse.Namespace) -> "CheckpointChoice":
    """Return what ``--step`` and ``--best`` choose; imports torch."""
    from mlet_dist.training.run_checkpoints import CheckpointChoice

    return CheckpointChoice(args.step, args.best)


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """Add ``--nproc``."""
    parser.add_argument(
        "--nproc",
        type=up_to(_MAX_RANKS_OF_A_NODE),
        metavar="N",
        help="start N ranks on this machine with torch elastic; not needed when torchrun starts the ranks",
    )


def add_nodes(parser: argparse.ArgumentParser) -> None:
    """Add the options of a job of several nodes."""
    parser.add_argument(
        "--nnodes",
        metavar="N",
        help="number of nodes of the job, each of which runs this command; 2:4 for an elastic job of 2 to 4 nodes, "
        "which may leave and join while it runs",
    )
    parser.add_argument("--node-rank", type=int, metavar="I", help="number of this node, from 0")
    parser.add_argument("--master-addr", metavar="HOST", help="host name or address of node 0")
    parser.add_argument(
        "--master-port",
        type=positive,
        metavar="PORT",
        help="port on which node 0 listens (default: a port computed from the command, the same on all nodes)",
    )
    parser.add_argument(
        "--wait",
        type=up_to(_MAX_WAIT_S),
        default=40,
        metavar="SECONDS",
        help="seconds to wait for all nodes to join (default: %(default)s)",
    )


def add_max_restarts(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-restarts``."""
    parser.add_argument(
        "--max-restarts",
        type=_restarts,
        default=0,
        metavar="N",
        help="after a failure of a rank or of another node, let all nodes meet again and restart their ranks, which "
        "resume from the latest checkpoint; a failure of this node's ranks is forgiven N times in a row without a new "
        "checkpoint in between (default: 0, which ends the command)",
    )


def _step(text: str) -> int:
    return 0 if text.strip("0") == "" and text else positive(text)


def _restarts(text: str) -> int:
    return 0 if text == "0" else up_to(_MAX_RESTARTS)(text)


def positive(text: str) -> int:
    """Return the value of an option that is a whole number of at least 1."""
    if not text.isdecimal() or not text.strip("0"):
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not a whole number of at least 1")
    if len(text.lstrip("0")) > _MAX_DIGITS:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} has more than {_MAX_DIGITS} digits")
    return int(text)


def up_to(most: int) -> Callable[[str], int]:
    """Return the type of an option that is a whole number from 1 to ``most``."""

    def limited(text: str) -> int:
        value = positive(text)
        if value > most:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {most}")
        return value

    return limited


def byte_size(text: str) -> int:
    """Return the value of an option in bytes, where K, M, G or T after the number are powers of 1,024."""
    number, unit = text.rstrip("BbIi"), 1
    if number and number[-1].upper() in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1].upper()]
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 4G or 512M") from None


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError if an option of a job of several nodes lacks an option that it needs."""
    for name in ("node_rank", "master_addr", "master_port"):
        if getattr(args, name, None) is not None and args.nnodes is None:
            raise UserError(f"--{name.replace('_', '-')} needs --nnodes, the number of nodes of the job")
    if getattr(args, "nnodes", None) is not None and args.nproc is None:
        raise UserError("--nnodes needs --nproc, the number of ranks on each node")
    if getattr(args, "max_restarts", None) and args.nproc is None:
        raise UserError("--max-restarts needs --nproc, the number of ranks on each node; torchrun has its own")


def load_checked_config(args: argparse.Namespace) -> Config:
    """Return the config, checked against the data set and the number of ranks; torch is not imported for it."""
    from mlet_dist.config.validation_settings import check_validation_split
    from mlet_dist.data.location import data_set_path
    from mlet_dist.data.schema import DatasetSchema
    from mlet_dist.models.spec import ModelSpec

    config = load_config(Path(args.config), args.overrides)
    schema = DatasetSchema.load(data_set_path(config.data.path))
    config.check_features(schema.dense, list(schema.num_embeddings))
    config.check_labels(schema.labels)
    check_validation_split(config.train, config.data.path, schema.rows, schema.label_counts)
    ranks = args.nproc or 1
    config.check_world_size(ranks * node_count(args))
    if not is_launched_rank():
        most = ranks * parse_node_count(getattr(args, "nnodes", None) or "1")[1]
        world_size = int(os.environ["WORLD_SIZE"]) if rank_of(args) is not None else most
        _check_memory(config, ModelSpec.of(config, schema), ranks, world_size)
    if not rank_of(args) and not is_launched_rank():
        print_warnings(config)
    return config


def _check_memory(config: Config, spec: "ModelSpec", ranks: int, world_size: int) -> None:
    """Raise UserError if the host's memory cannot hold the layers that every rank has."""
    from mlet_dist.cluster.software_checks import has_nvidia_driver
    from mlet_dist.machine_limits import memory_bytes
    from mlet_dist.models.dense_memory import check_dense_memory

    device = config.train.device
    on_cuda = device == "cuda" or (device == "auto" and has_nvidia_driver())
    try:
        _, available = memory_bytes()
    except (KeyError, ValueError):  # not Linux
        return
    check_dense_memory(config, spec, ranks, world_size, available, on_cuda)


def print_warnings(config: Config) -> None:
    """Print the warnings about a config."""
    for warning in config.warnings():
        print_warning(warning)


def node_count(args: argparse.Namespace) -> int:
    """Return the number of nodes; 1 for an elastic job, whose ranks check the world size themselves."""
    count = getattr(args, "nnodes", None) or "1"
    return int(count) if count.isdecimal() else 1


def nodes_of(args: argparse.Namespace, arguments: Sequence[str]) -> tuple[Nodes | None, str]:
    """Return the nodes of the job and its name; None and no name if the job has no ``--nnodes``."""
    if getattr(args, "nnodes", None) is None:
        return None, ""
    fewest, count = parse_node_count(args.nnodes)
    if args.node_rank is None or not 0 <= args.node_rank < count:
        found = "is not set" if args.node_rank is None else f"is {args.node_rank}"
        raise UserError(f"--node-rank {found}; it must be this node's number, from 0 to {count - 1}")
    if count > 1 and args.master_addr is None:
        raise UserError("--master-addr is not set; it must be the name or address of node 0, the same on all nodes")
    job = job_id(arguments, args.nproc, args.nnodes)
    if args.master_port is not None and args.master_port > _LAST_PORT:
        raise UserError(f"--master-port is {args.master_port}; it must be from 1 to {_LAST_PORT}")
    master, port = args.master_addr or "localhost", args.master_port or default_port(job)
    return Nodes(fewest, count, args.node_rank, master, port, args.wait), job


def without_launch_options(arguments: list[str]) -> list[str]:
    """Return the command without the options of launching: what the ranks run, and the same on all nodes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_nproc(parser)
    add_nodes(parser)
    add_max_restarts(parser)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--export")
    return parser.parse_known_args(arguments)[1]
