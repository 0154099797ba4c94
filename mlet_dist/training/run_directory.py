"""The layout of a run on disk: resolved config, model, metrics, checkpoints, summary; and the lock on it."""

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.config.config_file import load_config, save_config
from mlet_dist.config.sections import Config
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.models.spec import ModelSpec


@contextmanager
def locked(file: Path, name: str) -> Iterator[None]:
    """Hold ``file``, made with its directory if need be, for as long as the block and its process last.

    Args:
        name: what the directory is called in messages.

    Raises:
        UserError: another process holds it, or it cannot be written.
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
            holder = handle.read(500).strip() or "another one"
            raise UserError(f"{name}: another job is training into it ({holder}); choose another") from None
        except OSError as error:
            raise UserError(f"{name} cannot be written: {error.strerror or error}") from None
        yield


_PREFLIGHT = ".mlet-preflight-"  # files by which the nodes of a job find out that they share storage


@dataclass(frozen=True)
class RunDirectory:
    """Paths inside a run.

    ::

        .mlet-run         marks the directory as a run's, and is locked by the job that trains into it
        config.yaml       the resolved config; `mlet train` takes it as it is
        model.json        sizes and inputs of the model
        plan.json         each table's sharding type, kernel and exchange, the reasons, and its rows by rank
        metrics.jsonl     one record a line: training and its timing every few steps, and then one a split
        tensorboard/      the same for TensorBoard
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

    def check_free(self, config: Config) -> None:
        """Raise UserError where training may not begin here, by ``run.overwrite`` and ``train.resume``.

        That is in a finished run, in something that is no run, and, for ``never``, in anything at all.
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
                f"run.dir {self.path} holds a run that did not finish, and train.resume is never; go on with "
                "train.resume=auto, choose another, or replace it with run.overwrite=true"
            )

    @contextmanager
    def hold(self, config: Config) -> Iterator[None]:
        """Keep other jobs out within the block: of the directory, and of ``train.checkpoint_dir`` unless it is a URL.

        Raises:
            UserError: training may not begin here, another job is here, or a directory cannot be written.
        """
        self.check_free(config)
        store = self.checkpoint_store(config)
        with ExitStack() as held:
            held.enter_context(locked(self.marker, f"run.dir {self.path}"))
            if config.train.checkpoint_dir is not None and store.is_local:
                held.enter_context(locked(Path(store.root) / ".mlet-lock", f"train.checkpoint_dir {store}"))
            yield

    def start(self, config: Config, spec: ModelSpec, *, goes_on: bool = False) -> None:
        """Drop what an earlier job left, but its checkpoints and records where the run goes on; write config and model.

        Raises:
            UserError: the directory cannot be written.
        """
        with self._writing():
            for left in (self.summary, self._partial_summary):
                left.unlink(missing_ok=True)
            if not goes_on:
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
        """Write how each table is kept, a line a table."""
        lines = ",\n  ".join(to_json(table) for table in tables)
        text = f'{{"world_size": {world_size}, "tables": [\n  {lines}\n]}}\n'
        self.plan.write_text(text, encoding="utf-8")

    def checkpoint_store(self, config: Config) -> CheckpointStore:
        """Where the run's checkpoints lie."""
        return CheckpointStore(config.train.checkpoint_dir or self.checkpoints)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, whole or not at all."""
        self._partial_summary.write_text(to_json(summary, indent=1) + "\n", encoding="utf-8")
        self._partial_summary.replace(self.summary)

    def load(self) -> tuple[Config, ModelSpec, dict[str, Any]]:
        """Config, model and summary of a finished run.

        Raises:
            UserError: it is no run, or has not finished.
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
