"""Options that several commands share."""

import argparse
from typing import Any, NoReturn

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
