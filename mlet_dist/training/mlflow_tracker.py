"""Reports a run to MLflow; server, experiment and credentials come from MLflow's own environment variables."""

import os
import re
import time
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, ClassVar, TypeVar

from mlet_dist.errors import UserError
from mlet_dist.training.tracked_run import Metrics, Outcome, TrackedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

_T = TypeVar("_T")

_SERVER = "MLFLOW_TRACKING_URI"
_EXPERIMENT = "mlet"
_RUN_ID = "mlet.run_id"  # the tag by which a run is found again
# What its server takes at once, and what it takes as a value.
_METRICS_A_CALL, _SETTINGS_A_CALL, _LONGEST_VALUE = 1000, 100, 5000
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
_DEFAULTS = {
    # A server that does not answer is asked again by the thread, with the next records.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    # stdout has the result of the command alone, and nobody is told of the run but the server.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


class MlflowTracker:
    """A run on an MLflow server, or in a directory or database that ``MLFLOW_TRACKING_URI`` names.

    Settings are its params, and the files of the run its artifacts. MLflow does not change a param: settings with
    which a run is resumed, and which are not those that it began with, are tags ``mlet.resumed.section.key``.
    """

    name: ClassVar[str] = "mlflow"

    def __init__(self) -> None:
        self._client: MlflowClient | None = None
        self._id = ""

    @classmethod
    def check(cls) -> None:
        """Check that the package is installed, and that the environment names a server."""
        if find_spec("mlflow") is None:
            raise UserError("run.trackers names mlflow, which is not installed: pip install mlflow-skinny")
        if not os.environ.get(_SERVER):
            raise UserError(
                f"run.trackers names mlflow, and the environment has no {_SERVER}; set it to the address of the server"
            )

    def begin(self, run: TrackedRun, known: str | None) -> str:
        """Begin or continue the run; it is found by its tag if a job was killed before its id was written."""
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Param, RunTag

        self._client = client = MlflowClient()
        self._id = known or self._found_or_created(client, run)
        client.update_run(self._id, status="RUNNING")
        before = client.get_run(self._id).data.params
        settings = {_key(name): value[:_LONGEST_VALUE] for name, value in run.settings.items()}
        resumed = {f"mlet.resumed.{key}": value for key, value in settings.items() if before.get(key, value) != value}
        tags = {_key(name): value[:_LONGEST_VALUE] for name, value in {**run.tags, **resumed}.items()}
        for some in _cut([RunTag(name, value) for name, value in tags.items()], _SETTINGS_A_CALL):
            client.log_batch(self._id, tags=some)
        params = [Param(key, value) for key, value in settings.items() if key not in before]
        for each in _cut(params, _SETTINGS_A_CALL):
            client.log_batch(self._id, params=each)
        return self._id

    def log(self, records: Sequence[Metrics]) -> None:
        """Record numbers by step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_key(name), value, now, step) for step, values in records for name, value in values.items()]
        for some in _cut(metrics, _METRICS_A_CALL):
            self._open.log_batch(self._id, metrics=some)

    def end(self, run: TrackedRun, outcome: Outcome) -> None:
        """Keep the run's files as artifacts, and set its status."""
        try:
            for file in run.files:
                self._open.log_artifact(self._id, str(file))
        finally:
            self._open.set_terminated(self._id, _STATUS[outcome])

    @property
    def _open(self) -> "MlflowClient":
        assert self._client is not None
        return self._client

    def _found_or_created(self, client: "MlflowClient", run: TrackedRun) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_ID") or self._experiment(client)
        for found in self._begun(client, experiment, run):
            return found
        tags = {name: value for name, value in run.tags.items() if name == _RUN_ID}  # `begin` adds the others
        created: str = client.create_run(experiment, tags=tags, run_name=run.name).info.run_id
        return created

    @staticmethod
    def _begun(client: "MlflowClient", experiment: str, run: TrackedRun) -> Iterator[str]:
        """Yield the id of the run if a job began it before."""
        run_id = run.tags.get(_RUN_ID)
        if run_id is not None:
            for found in client.search_runs([experiment], f"tags.`{_RUN_ID}` = '{run_id}'", max_results=1):
                yield found.info.run_id

    @staticmethod
    def _experiment(client: "MlflowClient") -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or _EXPERIMENT
        found = client.get_experiment_by_name(name)
        experiment: str = client.create_experiment(name) if found is None else found.experiment_id
        return experiment


def _cut(values: list[_T], size: int) -> Iterator[list[_T]]:
    """Yield the values in lists of at most ``size``."""
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _key(name: str) -> str:
    """Return a name with underscores for characters that MLflow does not take."""
    return re.sub(r"[^\w\-./ ]", "_", name, flags=re.ASCII)[:250]
