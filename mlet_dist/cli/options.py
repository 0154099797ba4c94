"""Options that several commands share, and the config that they load before torch is imported."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from mlet_dist.cli.process import launched, rank_of
from mlet_dist.cluster.nodes import Nodes, default_port, job_id, parse_node_count
from mlet_dist.config.config_file import load_config
from mlet_dist.config.sections import Config
from mlet_dist.errors import UserError

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose mistakes are UserErrors of one line, and whose options are not abbreviated."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG, settings and ``--nproc``."""
    add_settings(parser)
    add_nproc(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """CONFIG, and settings that replace its own."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, for example configs/criteo_kaggle.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="settings that replace the file's"
    )


def add_data(parser: argparse.ArgumentParser) -> None:
    """``--data`` and ``--split``."""
    parser.add_argument("--data", required=True, help="directory of the data set, or its URL")
    parser.add_argument("--split", choices=["train", "valid", "test"], default="test", help="default %(default)s")


def add_nproc(parser: argparse.ArgumentParser) -> None:
    """``--nproc``."""
    parser.add_argument("--nproc", type=positive, metavar="N", help="start N local ranks through torch elastic")


def positive(text: str) -> int:
    """The type of an option: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def byte_size(text: str) -> int:
    """The type of an option: bytes, with K, M, G or T behind the number for powers of 1,024."""
    number, unit = text.rstrip("BbIi"), 1
    if number and number[-1].upper() in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1].upper()]
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes such as 4G or 512M") from None


_LAST_PORT = 65_535


def add_nodes(parser: argparse.ArgumentParser) -> None:
    """Nodes of the job."""
    parser.add_argument(
        "--nnodes", metavar="N", help="this is one of N nodes, or of 2:4 that may leave and come; all get this command"
    )
    parser.add_argument("--node-rank", type=int, metavar="I", help="which one, from 0")
    parser.add_argument("--master-addr", metavar="HOST", help="name or address of node 0")
    parser.add_argument(
        "--master-port", type=positive, metavar="PORT", help="default: one that follows from the command"
    )
    parser.add_argument(
        "--wait", type=positive, default=40, metavar="SECONDS", help="for all nodes to come (default %(default)s)"
    )


def nodes_of(args: argparse.Namespace, arguments: Sequence[str]) -> tuple[Nodes | None, str]:
    """The job's nodes, as checked options say, and its name; None where this is the only node."""
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


def check_options(args: argparse.Namespace) -> None:
    """Raise UserError where options of nodes lack what they go with."""
    for name in ("node_rank", "master_addr", "master_port"):
        if getattr(args, name, None) is not None and args.nnodes is None:
            raise UserError(f"--{name.replace('_', '-')} is for several nodes; say how many by --nnodes")
    if getattr(args, "nnodes", None) is not None and args.nproc is None:
        raise UserError("--nnodes needs --nproc, the ranks of each node")


def node_count(args: argparse.Namespace) -> int:
    """1 for an elastic job as well, whose ranks check how many they are."""
    count = getattr(args, "nnodes", None) or "1"
    return int(count) if count.isdecimal() else 1


def without_launch(arguments: list[str]) -> list[str]:
    """The command as ranks are given it, and as it is the same on all nodes."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_nproc(parser)
    add_nodes(parser)
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--export")
    return parser.parse_known_args(arguments)[1]


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
