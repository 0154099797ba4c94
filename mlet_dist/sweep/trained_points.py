"""Trains each config once: a run's directory follows from its settings, so that a finished one is found again."""

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlet_dist.atomic_file import replaced_file
from mlet_dist.config.config_file import Config, save_config
from mlet_dist.data.location import data_set_path
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError, writing
from mlet_dist.formatting import load_json, to_json
from mlet_dist.sweep.logged_commands import LoggedCommands, end_of
from mlet_dist.sweep.shared_directory import exclusive
from mlet_dist.training.run_directory import RunDirectory

_WITHOUT_EFFECT = (
    "log_every", "metrics_port", "device", "pipelined", "resume", "checkpoint_every", "checkpoint_minutes",
    "checkpoint_dir", "checkpoint_async", "checkpoint_failure", "keep_last", "keep_every", "collective_timeout_s",
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Attributes:
        run: its directory.
        summary: the run's summary; empty if it diverged.
        seconds: how long it took.
        diverged: the reason, if a loss or gradient was not finite.
        runs_at_once: how many runs its sweep trained at the same time, at most; None if that was not recorded.
        found: whether it had ended before, so that nothing was trained now.
    """

    run: Path
    summary: Mapping[str, Any]
    seconds: float
    diverged: str | None = None
    runs_at_once: int | None = None
    found: bool = dataclasses.field(default=False, compare=False)


class TrainedPoints:
    """Trains configs by `mlet train`, in directories below one, unless they are trained already. Thread-safe.

    Args:
        path: the directory of all runs.
        nproc: ranks of each run.
        commands: runs `mlet train`.
        runs_at_once: how many runs are trained at the same time, at most, which is kept with their results.
    """

    def __init__(self, path: Path, nproc: int, commands: LoggedCommands, runs_at_once: int = 1) -> None:
        self._path, self._nproc, self._commands, self._runs_at_once = path, nproc, commands, runs_at_once

    def directory(self, config: Config) -> Path:
        """Return the directory of the run of a config, which is the same for all sweeps and data sets' places."""
        return self._path / digest_of(config)

    def find(self, config: Config) -> Outcome | None:
        """Return the outcome of a run that has ended; None if it has not."""
        run = self.directory(config)
        file = _outcome_file(run)
        try:
            found = load_json(file)
            return Outcome(
                run, found["summary"], found["seconds"], found["diverged"], found.get("runs_at_once"), found=True
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{file}: not the result of a run; remove it, and the run is trained again") from None

    def train(self, config: Config, start: Config | None = None, *, keep: bool = False) -> Outcome:
        """Train a config, or return the outcome of an earlier time.

        Args:
            config: the settings; ``run.dir`` and the intervals of checkpoints are replaced.
            start: that of a finished run with fewer steps, which this one continues if its checkpoint is there.
            keep: its last checkpoint is wanted: a run whose checkpoint was removed is trained again, and
                ``forget_checkpoints`` does not remove it.

        Raises:
            UserError: the run failed for another reason than that it diverged; its log says why.
            Interrupted: the sweep was stopped.
        """
        run = self.directory(config)
        with writing(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
        # Two arms, and other sweeps, may want the same run.
        with exclusive(self._path / f".{run.name}.lock", self._commands.wait):
            found = self.find(config)
            if keep:
                with writing(self._path):
                    _kept_file(run).touch()
                    found = self._with_checkpoint(run, found)
            return found or self._train(config, start)

    def _with_checkpoint(self, run: Path, found: Outcome | None) -> Outcome | None:
        """Return the outcome of a run that has its last checkpoint or diverged; prepare any other to be trained."""
        finished, saved = RunDirectory(run).summary.exists(), RunDirectory(run).checkpoints.is_dir()
        if (found is not None and found.diverged is not None) or (finished and saved):
            return found
        # The outcome goes first, so that a run whose training is interrupted again is not taken for finished.
        _outcome_file(run).unlink(missing_ok=True)
        if finished:  # a trial with the same settings, whose checkpoint was removed
            shutil.rmtree(run)
        return None

    def forget_checkpoints(self, config: Config) -> None:
        """Remove the checkpoints of a finished run, of which the results stay, unless they are to be kept."""
        run = self.directory(config)
        checkpoints, removed = RunDirectory(run).checkpoints, run / ".removed-checkpoints"
        if _kept_file(run).exists():
            return
        with exclusive(self._path / f".{run.name}.lock", self._commands.wait):
            # Another sweep may have begun to keep them.
            if not _kept_file(run).exists() and checkpoints.is_dir():
                shutil.rmtree(removed, ignore_errors=True)
                with writing(run):
                    checkpoints.replace(removed)  # at once, so that none is left of which a part is missing
                shutil.rmtree(removed, ignore_errors=True)

    def _train(self, config: Config, start: Config | None) -> Outcome:
        run = self.directory(config)
        resume, initial_weights = "auto", config.train.initial_weights
        # Learning rates that decay towards the end of a run are others in a longer one, which cannot go on from it.
        if config.optimizer.decay != "constant":
            start = None
        if start is not None and RunDirectory(self.directory(start)).checkpoints.is_dir():
            resume = str(self.directory(start))
            initial_weights = None  # the run that it goes on from had them
        train = dataclasses.replace(
            config.train,
            resume=resume,
            initial_weights=initial_weights,
            checkpoint_dir=None,
            keep_last=1,
            on_non_finite="stop",
        )
        # A run that is there is one of the same settings, which goes on.
        placed_run = dataclasses.replace(config.run, dir=str(run), overwrite=False)
        placed = dataclasses.replace(config, train=train, run=placed_run)
        with writing(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            file = run.with_suffix(".yaml")
            save_config(placed, file)
            started = time.monotonic()
            # One rank needs no launcher, which takes seconds to start.
            ranks = () if self._nproc == 1 else ("--nproc", str(self._nproc))
            log = run.with_suffix(".log")
            code = self._commands.run("train", str(file), "--once", *ranks, log=log, ranks=self._nproc)
            seconds = time.monotonic() - started
            outcome = self._outcome(run, code, seconds)
            content = {
                "summary": outcome.summary,
                "seconds": seconds,
                "diverged": outcome.diverged,
                "runs_at_once": self._runs_at_once,
            }
            with replaced_file(_outcome_file(run)) as handle:
                handle.write(to_json(content, indent=1).encode())
        return outcome

    def _outcome(self, run: Path, code: int, seconds: float) -> Outcome:
        if code == 0:
            _, _, summary = RunDirectory(run).load()
            return Outcome(run, summary, seconds, None, self._runs_at_once)
        if (reason := _divergence(run)) is not None:
            return Outcome(run, {}, seconds, reason, self._runs_at_once)
        raise UserError(f"{run}: training failed with exit code {code}; {end_of(run.with_suffix('.log'))}")


def digest_of(config: Config) -> str:
    """Return a name for the run of a config, by all that its results depend on.

    Raises:
        UserError: the data set cannot be read.
    """
    plain = config.to_dict()
    del plain["run"]
    for name in _WITHOUT_EFFECT:
        del plain["train"][name]
    schema = DatasetSchema.load(data_set_path(plain["data"].pop("path")))
    content = {split: schema.content_id(split) for split in schema.parts}
    text = json.dumps({"settings": plain, "data": content, "vocabulary": schema.vocabulary_id}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _outcome_file(run: Path) -> Path:
    return run.with_suffix(".json")


def _kept_file(run: Path) -> Path:
    """Return the file that marks a run whose checkpoints stay, whichever sweep trains it."""
    return run.with_suffix(".keep")


def _divergence(run: Path) -> str | None:
    """Return the reason if the last record of a run says that a loss or gradient was not finite."""
    with suppress(OSError, ValueError, KeyError):
        *_, last = RunDirectory(run).metrics.read_text(encoding="utf-8").splitlines()
        record = json.loads(last)
        if record["split"] == "diverged":
            return f"not finite at step {record['batch_of_step']:,}"
    return None
