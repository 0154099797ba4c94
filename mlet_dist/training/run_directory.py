"""The run directory: its layout on disk, its lock, and the result of an earlier attempt; imported without torch."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.config.config_file import Config, load_config, save_config
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.models.spec import ModelSpec

_PREFLIGHT = ".mlet-preflight-"  # files with which nodes check that they share storage


@dataclass(frozen=True)
class RunDirectory:
    """The paths inside a run directory.

    ::

        .mlet-run         marks a run directory, and is locked by the job that trains into it
        config.yaml       the resolved config, which `mlet train` accepts as it is
        model.json        sizes and inputs of the model
        plan.json         sharding type, kernel, exchange, reasons and rows per rank of each table
        metrics.jsonl     one record a line: training and timing every few steps, then one for each split
        tensorboard/      the same records for TensorBoard
        checkpoints/      step-00000857/ …, each a torch.distributed.checkpoint; or in `train.checkpoint_dir`
        summary.json      the result, written last: a run without it has not finished
    """

    path: Path

    @property
    def marker(self) -> Path:
        return self.path / ".mlet-run"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def model(self) -> Path:
        return self.path / "model.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def _partial_summary(self) -> Path:
        return self.path / "summary.partial"

    def check_available(self, config: Config) -> None:
        """Raise UserError unless ``run.overwrite`` and ``train.resume`` allow training into this directory.

        A finished run must not be replaced by default, nor files that are not a run's; with ``train.resume: never``
        the directory must be empty.
        """
        overwrite = config.run.overwrite
        try:
            entries = {entry for entry in self.path.iterdir() if not entry.name.startswith(_PREFLIGHT)}
        except FileNotFoundError:
            return
        except NotADirectoryError:
            raise UserError(
                f"run.dir {self.path} is a file or below one; it must be a directory, or not exist"
            ) from None
        except OSError as error:
            raise UserError(f"run.dir {self.path} cannot be read: {error.strerror}") from None
        if self.summary.exists() and not overwrite:
            raise UserError(
                f"run.dir {self.path} holds a finished run; choose another, or replace it with run.overwrite=true"
            )
        if entries and not self.marker.exists():
            raise UserError(f"run.dir {self.path} holds files that are not a run's; choose an empty or new directory")
        if entries - {self.marker} and config.train.resume == "never" and not overwrite:
            raise UserError(
                f"run.dir {self.path} holds a run that did not finish, and train.resume is never; resume it "
                "with train.resume=auto, choose another, or replace it with run.overwrite=true"
            )

    @contextmanager
    def lock(self, config: Config) -> Iterator[None]:
        """Lock the directory within the block, and ``train.checkpoint_dir`` unless that is a URL.

        Raises:
            UserError: training into it is not allowed, another job holds it, or a directory cannot be written.
        """
        self.check_available(config)
        store = self.checkpoint_store(config)
        with ExitStack() as stack:
            stack.enter_context(lock_file(self.marker, f"run.dir {self.path}"))
            if config.train.checkpoint_dir is not None and store.is_local:
                stack.enter_context(lock_file(Path(store.root) / ".mlet-lock", f"train.checkpoint_dir {store}"))
            yield

    def prepare(self, config: Config, spec: ModelSpec, *, resumes: bool = False) -> None:
        """Write config and model, and remove an earlier run's files; a resumed run keeps its checkpoints and records.

        Raises:
            UserError: the directory cannot be written.
        """
        with self._writing():
            for left in (self.summary, self._partial_summary):
                left.unlink(missing_ok=True)
            if not resumes:
                self._empty()
            save_config(config, self.config)
            spec.save(self.model)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run.dir {self.path} cannot be written: {error.strerror or error}") from None

    def _empty(self) -> None:
        for left in (self.metrics, self.model, self.plan):
            left.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.tensorboard):
            if folder.exists():
                shutil.rmtree(folder)

    def save_plan(self, tables: list[dict[str, Any]], world_size: int) -> None:
        """Write the plan, one line for each table."""
        lines = ",\n  ".join(to_json(table) for table in tables)
        text = f'{{"world_size": {world_size}, "tables": [\n  {lines}\n]}}\n'
        self.plan.write_text(text, encoding="utf-8")

    def checkpoint_store(self, config: Config) -> CheckpointStore:
        """Return the store of the run's checkpoints."""
        return CheckpointStore(config.train.checkpoint_dir or self.checkpoints)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary atomically."""
        self._partial_summary.write_text(to_json(summary, indent=1) + "\n", encoding="utf-8")
        self._partial_summary.replace(self.summary)

    def load(self) -> tuple[Config, ModelSpec, dict[str, Any]]:
        """Return config, model and summary of a finished run.

        Raises:
            UserError: the directory is not a run, or the run has not finished.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: no such directory; expected a run made by `mlet train`")
        if not self.config.exists():
            raise UserError(f"{self.path}: not a run of `mlet train`: it has no {self.config.name}")
        if not self.summary.exists():
            raise UserError(
                f"{self.path}: this run never finished: it has no {self.summary.name}; train it to the end first"
            )
        try:
            summary = json.loads(self.summary.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.summary}: cannot be read: {error}") from None
        if not isinstance(summary, dict):
            raise UserError(f"{self.summary}: holds a JSON {type(summary).__name__} instead of an object")
        return load_config(self.config), ModelSpec.load(self.model), summary


def config_of_attempt(config: Config) -> Config:
    """Return the config without ``run.overwrite`` and ``train.resume: never`` if torch elastic restarted this job."""
    if not _is_restart():
        return config
    resume = "auto" if config.train.resume == "never" else config.train.resume
    return replace(config, run=replace(config.run, overwrite=False), train=replace(config.train, resume=resume))


def finished_summary(config: Config, *, by_any: bool = False) -> dict[str, Any] | None:
    """Return the summary of a run that an earlier attempt of this job finished without printing it, or None.

    Args:
        config: the resolved settings; a run with other settings is not considered.
        by_any: whether any earlier job counts as an attempt, and not only those restarted by torch elastic.

    Raises:
        UserError: the summary cannot be read.
    """
    run = RunDirectory(Path(config.run.dir))
    if not (by_any or _is_restart()) or not run.summary.exists():
        return None
    saved, _, summary = run.load()
    return summary if config_of_attempt(saved) == config_of_attempt(config) else None


def _is_restart() -> bool:
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


@contextmanager
def lock_file(file: Path, name: str) -> Iterator[None]:
    """Lock ``file`` within the block, and create it and its directory if they do not exist.

    The lock ends with the process at the latest.

    Args:
        file: the file to lock; it names the process that holds the lock.
        name: the name of the directory in messages.

    Raises:
        UserError: another process holds the lock, or the file cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = file.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{name} cannot be written: {error.strerror or error}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            handle.truncate(0)
            handle.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            handle.flush()
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read(500).strip() or "unknown process"
            raise UserError(f"{name}: another job is training into it ({owner}); choose another") from None
        except OSError as error:
            raise UserError(f"{name} cannot be written: {error.strerror or error}") from None
        yield
