"""Reports a run to Weights & Biases; project, mode and API key come from W&B's own environment variables."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar

from mlet_dist.errors import UserError
from mlet_dist.training.tracked_run import Metrics, Outcome, TrackedRun

if TYPE_CHECKING:
    import wandb

_PROJECT = "mlet"
_STEP = "step"


class WandbTracker:
    """A run of W&B, whose files lie in ``trackers/`` of the run directory; with ``WANDB_MODE=offline`` all of it.

    Settings and tags are its config, and the files of the run an artifact. Numbers are plotted by ``step``, a number
    of each record, since W&B's own count of steps cannot go back when a run is resumed.
    """

    name: ClassVar[str] = "wandb"

    def __init__(self) -> None:
        self._run: wandb.Run | None = None

    @classmethod
    def check(cls) -> None:
        """Check that the package is installed."""
        if find_spec("wandb") is None:
            raise UserError("run.trackers names wandb, which is not installed: pip install wandb")

    def begin(self, run: TrackedRun, known: str | None) -> str:
        """Begin or continue the run; its id is that of the run directory, so that a killed job leaves no second one."""
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or _PROJECT,
            id=known or run.directory.run_id,
            resume="allow",
            name=run.name,
            dir=str(run.directory.trackers),
            config={**run.settings, **run.tags},
            allow_val_change=True,
            # What it prints, and what it would send of the process besides: the console may show what it should not.
            settings=wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True),
        )
        self._run.define_metric(_STEP)
        self._run.define_metric("*", step_metric=_STEP)
        return str(self._run.id)

    def log(self, records: Sequence[Metrics]) -> None:
        """Record numbers by step."""
        for step, values in records:
            self._open.log({_STEP: step, **values})

    def end(self, run: TrackedRun, outcome: Outcome) -> None:
        """Keep the run's files as an artifact, and end it; waits for what is not uploaded yet."""
        import wandb

        artifact = wandb.Artifact(f"run-{self._open.id}", type="mlet-run")
        for file in run.files:
            artifact.add_file(str(file))
        self._open.log_artifact(artifact)
        self._open.finish(exit_code=0 if outcome == "finished" else 1)

    @property
    def _open(self) -> "wandb.Run":
        assert self._run is not None
        return self._run
