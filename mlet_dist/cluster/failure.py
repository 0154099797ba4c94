"""Why an attempt to run the ranks of a job failed, as one node tells it to the others."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

Kind = Literal["crash", "connection", "aborted", "timeout", "input", "stopped", "rank_stopped", "lost"]

CONSEQUENCES: tuple[Kind, ...] = ("connection", "aborted")
"""The kinds that follow from a failure elsewhere, as a rule: that one is the reason if it becomes known in time."""


@dataclass(frozen=True)
class Failure:
    """Why an attempt failed.

    Attributes:
        kind: ``crash`` if a rank crashed, was killed or was stopped for too long; ``connection`` if one lost its
            connection to another; ``aborted`` if SIGABRT ended one, by which NCCL's watchdog ends a rank that waits for
            another in vain; ``timeout`` if a rank took no part in a collective; ``input`` for an input error;
            ``stopped`` if a signal asked the node to stop; ``rank_stopped`` if it asked a rank alone, for which all
            nodes end; ``lost`` if the node gives no sign of life.
        node: the number of the node that failed.
        text: the reason in one line, which names the node.
    """

    kind: Kind
    node: int
    text: str

    def to_json(self) -> str:
        """Return the failure as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, data: bytes) -> "Failure":
        """Return the failure that ``to_json`` wrote."""
        return cls(**json.loads(data))
