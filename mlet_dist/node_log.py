"""Lines that each node of a job logs about itself: when it starts, meets the others, restarts, resumes and ends."""

import os
import sys
from contextlib import suppress

from mlet_dist.errors import one_line
from mlet_dist.json_log import JsonLog, timestamp


def log_of_node(rank: int, count: int, text: str) -> None:
    """Print a line on stderr, in a job of several nodes with the time (UTC) and the number of the node.

    Where stderr is a JsonLog, these are fields: `time`, `node` and `nodes`.

    Args:
        rank: the number of this node.
        count: the number of nodes of the job.
        text: the line.
    """
    with suppress(OSError):  # stderr may be closed
        if isinstance(sys.stderr, JsonLog):
            sys.stderr.log(one_line(text), node=rank, nodes=count)
            return
        where = f"{timestamp()} node {rank} of {count}: " if count > 1 else ""
        print(f"mlet: {where}{one_line(text)}", file=sys.stderr, flush=True)


def log_of_first_rank(text: str) -> None:
    """Print a line for this node if this process is the first of its ranks, and the node is not the first of the job.

    Rank 0 logs what it does itself.
    """
    first_of_node = os.environ.get("LOCAL_RANK") == "0" and os.environ.get("RANK") != "0"
    if first_of_node and "GROUP_RANK" in os.environ:
        log_of_node(int(os.environ["GROUP_RANK"]), int(os.environ.get("GROUP_WORLD_SIZE", "1")), text)
