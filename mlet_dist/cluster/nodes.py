"""The nodes of a job, as each of them is told about them."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlet_dist.errors import UserError

_FIRST_PORT, _PORTS = 20_000, 10_000  # below the ports that systems hand out by themselves


@dataclass(frozen=True)
class Nodes:
    """How many nodes a job has, which of them this is, and where they meet.

    Attributes:
        fewest: with which it may go on; less than ``count`` for an elastic job.
        count: of all.
        rank: of this one, from 0.
        master: name or address of node 0.
        port: on which node 0 listens.
        wait: seconds that nodes may take to come.
    """

    fewest: int
    count: int
    rank: int
    master: str
    port: int
    wait: float

    @property
    def is_elastic(self) -> bool:
        """Whether nodes may leave and come while it runs."""
        return self.fewest < self.count

    @property
    def endpoint(self) -> str:
        """Where they meet."""
        return f"{self.master}:{self.port}"


def parse_count(text: str) -> tuple[int, int]:
    """``4`` or ``2:4`` as the fewest and the most nodes.

    Raises:
        UserError: it is neither.
    """
    match = re.fullmatch(r"(?:(\d{1,6}):)?(\d{1,6})", text)
    fewest, most = (int(match[1] or match[2]), int(match[2])) if match else (0, 0)
    if not 1 <= fewest <= most:
        raise UserError(f"--nnodes {text}: must be a number of nodes such as 4, or the fewest and the most, as in 2:4")
    return fewest, most


def job_of(arguments: Sequence[str], nproc: int, count: str) -> str:
    """What all nodes of a job, and no others, call it: they are given the same command.

    Args:
        arguments: of the command, without what differs between nodes.
    """
    return hashlib.sha256("\0".join([*arguments, str(nproc), count]).encode()).hexdigest()[:16]


def port_of(job: str) -> int:
    """A port that every node of the job works out by itself, and that jobs on one host seldom share."""
    return _FIRST_PORT + int(job, 16) % _PORTS
