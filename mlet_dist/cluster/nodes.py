"""The nodes of a job, from the options that every node is given."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from mlet_dist.errors import UserError

_FIRST_PORT, _PORTS = 20_000, 10_000  # below the ephemeral ports of Linux


@dataclass(frozen=True)
class Nodes:
    """The nodes of a job, as one of them sees them.

    Attributes:
        min_count: the smallest number of nodes that may run the job; less than ``count`` for an elastic job.
        count: the number of nodes, for an elastic job the largest.
        rank: the rank of this node, from 0.
        master: the host name or address of node 0.
        port: the port on which node 0 listens.
        wait: how many seconds to wait for all nodes to join.
    """

    min_count: int
    count: int
    rank: int
    master: str
    port: int
    wait: float

    @property
    def is_elastic(self) -> bool:
        """Whether nodes may leave and join while the job runs."""
        return self.min_count < self.count

    @property
    def endpoint(self) -> str:
        """The host and port of the rendezvous."""
        return f"{self.master}:{self.port}"


def parse_node_count(text: str) -> tuple[int, int]:
    """Parse ``4`` or ``2:4`` into the smallest and the largest number of nodes.

    Raises:
        UserError: the text is neither.
    """
    match = re.fullmatch(r"(?:(\d{1,6}):)?(\d{1,6})", text)
    smallest, largest = (int(match[1] or match[2]), int(match[2])) if match else (0, 0)
    if not 1 <= smallest <= largest:
        raise UserError(
            f"--nnodes {text}: must be a number of nodes such as 4, or the smallest and the largest number, as in 2:4"
        )
    return smallest, largest


def job_id(arguments: Sequence[str], nproc: int, count: str) -> str:
    """Return the id that all nodes of a job, and no others, derive from the command that they are given.

    Args:
        arguments: the command line, without the options that differ between nodes.
        nproc: the number of ranks on each node.
        count: the number of nodes, as given by ``--nnodes``.
    """
    return hashlib.sha256("\0".join([*arguments, str(nproc), count]).encode()).hexdigest()[:16]


def default_port(job: str) -> int:
    """Return a port that every node derives from the job's id, and that two jobs on one host seldom share."""
    return _FIRST_PORT + int(job, 16) % _PORTS
