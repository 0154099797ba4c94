"""The run directory: its layout on disk, its files and its lock; imported without torch."""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from mlet_dist.atomic_file import replaced_file, temporary_of
from mlet_dist.checkpoint.manifest import RUN_ID
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.config.config_file import Config, config_text, load_config
from mlet_dist.errors import UserError, print_warning
from mlet_dist.formatting import to_json
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.run_seal import check_one_run, load_sealed_json, run_id_of_yaml, sealed_json, sealed_yaml
from mlet_dist.urls import no_such_directory

_PREFLIGHT = ".mlet-preflight-"  # files with which nodes check that they share storage


@dataclass(frozen=True)
class RunDirectory:
    """The paths inside a run directory.

    config.yaml, model.json, plan.json and summary.json are sealed (``run_seal.py``): they hold the id of the run, which
    its checkpoints hold, too, and a checksum. Readers refuse them when they were changed, or come from another run.

    ::

        .mlet-run         marks a run directory, and is locked by the job that trains into it
        config.yaml       the resolved config, which `mlet train` accepts as it is
        model.json        sizes and inputs of the model
        plan.json         sharding type, kernel, exchange, reasons and rows per rank of each table
        metrics.jsonl     one record a line: training and timing every few steps, then one for each split
        tensorboard/      the same records for TensorBoard
        trackers/         what is known of the run by other trackers: its id, and the last steps that were sent
        checkpoints/      step-00000857/ …, each a torch.distributed.checkpoint; or in `train.checkpoint_dir`
        summary.json      the result, written last: a run without it has not finished

    Attributes:
        path: the directory.
        run_id: the id in what this object writes; None for a run of a version without seals, which stays without.
    """

    path: Path
    run_id: str | None = None

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
    def trackers(self) -> Path:
        return self.path / "trackers"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

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
    def lock(self, config: Config, wait: float = 0.0) -> Iterator[None]:
        """Lock the directory within the block, and ``train.checkpoint_dir`` unless that is a URL.

        Args:
            config: the resolved settings.
            wait: seconds to wait for a process that holds a lock.

        Raises:
            UserError: training into it is not allowed, another job holds it, or a directory cannot be written.
        """
        self.check_available(config)
        store = self.checkpoint_store(config)
        created = not self.path.exists()
        with ExitStack() as stack:
            stack.enter_context(lock_file(self.marker, f"run.dir {self.path}", wait))
            stack.enter_context(self._removed_if_unused(created))
            if config.train.checkpoint_dir is not None and store.is_local:
                stack.enter_context(lock_file(Path(store.root) / ".mlet-lock", f"train.checkpoint_dir {store}", wait))
            if not store.is_local:
                store.check_writable()
            yield

    @contextmanager
    def _removed_if_unused(self, created: bool) -> Iterator[None]:
        """Remove the directory, if it was created, when an error ends the job before it has written anything there."""
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if created and [*self.path.iterdir()] == [self.marker]:
                    self.marker.unlink()
                    self.path.rmdir()
            raise

    def prepare(self, config: Config, spec: ModelSpec, *, resumes: bool = False) -> None:
        """Write config and model, and remove an earlier run's files; a resumed run keeps its checkpoints and records.

        Raises:
            UserError: the directory cannot be written.
        """
        with self._writing():
            self.summary.unlink(missing_ok=True)
            for file in (self.config, self.model, self.plan, self.summary):
                temporary_of(file).unlink(missing_ok=True)
            if not resumes:
                self._empty()
            text = config_text(config)
            self._replace(
                self.config, text if self.run_id is None else sealed_yaml(text, self.config.name, self.run_id)
            )
            self._replace(self.model, to_json(self._sealed(self.model, spec.to_dict()), indent=1) + "\n")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"run.dir {self.path} cannot be written: {error.strerror or error}") from None

    def _empty(self) -> None:
        for left in (self.metrics, self.model, self.plan):
            left.unlink(missing_ok=True)
        for folder in (self.checkpoints, self.tensorboard, self.trackers):
            if folder.exists():
                shutil.rmtree(folder)

    def save_plan(self, tables: list[dict[str, Any]], world_size: int) -> None:
        """Write the plan, one line for each table.

        Raises:
            UserError: the file cannot be written.
        """
        lines = ",\n  ".join(to_json(table) for table in tables)
        sealed = self._sealed(self.plan, {"world_size": world_size, "tables": tables})
        seal = "".join(f', "{key}": {to_json(sealed[key])}' for key in sealed.keys() - {"world_size", "tables"})
        with self._writing():
            self._replace(self.plan, f'{{"world_size": {world_size}, "tables": [\n  {lines}\n]{seal}}}\n')

    def checkpoint_store(self, config: Config) -> CheckpointStore:
        """Return the store of the run's checkpoints."""
        return CheckpointStore(config.train.checkpoint_dir or self.checkpoints)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, which completes the run.

        Raises:
            UserError: the file cannot be written.
        """
        with self._writing():
            self._replace(self.summary, to_json(self._sealed(self.summary, summary), indent=1) + "\n")

    def _sealed(self, file: Path, content: dict[str, Any]) -> dict[str, Any]:
        return content if self.run_id is None else sealed_json(content, file.name, self.run_id)

    def _replace(self, file: Path, text: str) -> None:
        """Write a file atomically."""
        with replaced_file(file) as handle:
            handle.write(text.encode())

    def load(self) -> tuple[Config, ModelSpec, dict[str, Any]]:
        """Return config, model and summary of a finished run.

        Raises:
            UserError: the directory is not a run, or the run has not finished.
        """
        config, spec, summary = self.load_unfinished()
        if summary is None:
            raise UserError(self.never_finished)
        return config, spec, summary

    @property
    def never_finished(self) -> str:
        """The message about a run without a summary."""
        return (
            f"{self.path}: this run never finished: it has no {self.summary.name}; train it to the end first (the same "
            "`mlet train` command resumes it)"
        )

    def load_unfinished(self) -> tuple[Config, ModelSpec, dict[str, Any] | None]:
        """Return config, model and summary of a run; the summary is None if the run has not finished.

        Raises:
            UserError: the directory is not a run, or a file of it is missing, was changed or is another run's.
        """
        if not self.path.is_dir():
            raise UserError(f"{self.path}: {no_such_directory(self.path)}; expected a run made by `mlet train`")
        if not self.config.exists():
            raise UserError(f"{self.path}: not a run of `mlet train`: it has no {self.config.name}")
        summary = load_sealed_json(self.summary)[0] if self.summary.exists() else None
        config = self.load_config()
        return config, ModelSpec.from_dict(load_sealed_json(self.model)[0], str(self.model)), summary

    def load_config(self) -> Config:
        """Return the resolved config that the run wrote.

        Raises:
            UserError: it cannot be read; or a file of the run was changed, truncated or is another run's.
        """
        check_one_run(self.path, self._run_ids())  # first, since a truncated config may lack settings
        return load_config(self.config)

    def _run_ids(self) -> list[tuple[str, str | None]]:
        """Return the name of each sealed file that exists, with the id of the run that wrote it."""
        others = [file for file in (self.model, self.summary, self.plan) if file.exists()]
        return [
            (self.config.name, run_id_of_yaml(self.config)),
            *((file.name, load_sealed_json(file)[1]) for file in others),
        ]

    def check_own(self, checkpoint: object, about: Mapping[str, Any]) -> None:
        """Check that a checkpoint belongs to the run that wrote config.yaml.

        Args:
            checkpoint: its name in messages.
            about: what its manifest holds beside the files.

        Raises:
            UserError: it is another run's.
        """
        ids = [(self.config.name, run_id_of_yaml(self.config)), (str(checkpoint), about.get(RUN_ID))]
        if check_one_run(self.path, ids) is None and os.environ.get("RANK", "0") == "0":
            print_warning(
                f"{self.path}: a version of mlet_dist without seals wrote this run; whether its files were changed "
                "cannot be told"
            )


@contextmanager
def lock_file(file: Path, name: str, wait: float = 0.0) -> Iterator[None]:
    """Lock ``file`` within the block, and create it and its directory if they do not exist.

    The lock ends with the process at the latest.

    Args:
        file: the file to lock; it names the process that holds the lock.
        name: the name of the directory in messages.
        wait: seconds to wait for another process that holds the lock.

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
            _lock(handle, wait)
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


def _lock(handle: TextIO, wait: float) -> None:
    """Lock a file; raise BlockingIOError if another process still holds the lock after so many seconds."""
    deadline = time.monotonic() + wait
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(0.2)
