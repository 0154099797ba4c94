"""What trackers are told of a run, and what a tracker is: MLflow's and W&B's have files of their own."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from mlet_dist import __version__
from mlet_dist.config.config_file import Config
from mlet_dist.config.parser import to_yaml
from mlet_dist.training.run_directory import RunDirectory

Outcome = Literal["finished", "stopped", "failed"]
"""How a job ended; a run that a signal stopped is resumed later."""

Metrics = tuple[int, dict[str, float]]
"""The step of a record, and its numbers by name, such as ``train/loss``."""

_SECRET_NAME = re.compile(r"TOKEN|PASSWORD|SECRET|KEY")
_CREDENTIALS = re.compile(r"//[^/@\s]*@")
_SHORTEST_SECRET = 6  # shorter values are part of too many words


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers show it.

    Attributes:
        directory: the run directory.
        tags: what describes the run besides its settings.
        settings: the resolved settings, ``section.key`` to its value as text.
    """

    directory: RunDirectory
    tags: Mapping[str, str]
    settings: Mapping[str, str]

    @classmethod
    def of(cls, config: Config, directory: RunDirectory, world_size: int, device: str) -> "TrackedRun":
        """Return what trackers are told of a run with these settings, ranks and kind of device."""
        tags = {
            "mlet.version": __version__,
            "mlet.run_dir": str(directory.path.absolute()),
            "mlet.ranks": str(world_size),
            "mlet.device": device,
            **({} if directory.run_id is None else {"mlet.run_id": directory.run_id}),
            **{name: str(value) for name, value in config.run.tags.items()},
        }
        settings = {key: without_credentials(value) for key, value in _flat(config.to_dict(), "")}
        return cls(directory, {name: without_credentials(value) for name, value in tags.items()}, settings)

    @property
    def name(self) -> str:
        """The name of the run."""
        return self.directory.path.absolute().name

    @property
    def files(self) -> list[Path]:
        """The files to keep with the run: config, model, plan, summary, and the pages in the run directory."""
        run = self.directory
        return [
            *(file for file in (run.config, run.model, run.plan, run.summary) if file.exists()),
            *sorted(run.path.glob("*.html")),
        ]


class Tracker(Protocol):
    """A service, or files, that show runs. A thread of its own makes all calls; what they raise stops nothing."""

    name: ClassVar[str]
    """As in ``run.trackers``."""

    @classmethod
    def check(cls) -> None:
        """Check, before anything is trained, that its package is installed and its environment is set.

        Raises:
            UserError: something is missing.
        """

    def begin(self, run: TrackedRun, known: str | None) -> str:
        """Begin the run, or continue it, and return the id by which ``known`` names it when it is resumed."""

    def log(self, records: Sequence[Metrics]) -> None:
        """Record numbers; they may have been recorded before, by a call that failed."""

    def end(self, run: TrackedRun, outcome: Outcome) -> None:
        """Keep the run's files, and end it."""


def without_credentials(text: str) -> str:
    """Return a text without user names and passwords in URLs, and without secrets of the environment."""
    shown = _CREDENTIALS.sub("//***@", text)
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name.upper()) and len(value) >= _SHORTEST_SECRET:
            shown = shown.replace(value, "***")
    return shown


def _flat(values: Mapping[str, Any], prefix: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value if isinstance(value, str) else to_yaml(value)))
    return found
