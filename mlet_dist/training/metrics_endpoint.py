"""Serves what a run records to Prometheus, while it trains.

A number ``name`` of the records of a split is the gauge ``mlet_<split>_<name>``. Names that differ by table, such as
``kept_C1``, are one gauge with the label ``table``.
"""

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mlet_dist.errors import UserError

if TYPE_CHECKING:
    from prometheus_client import Gauge

_KEPT = "kept_"


class MetricsEndpoint:
    """An HTTP server for Prometheus, in a thread of rank 0. As a context manager, it closes the port at the end.

    Args:
        port: on all addresses of this host.
        run: the run directory, for the label of ``mlet_run_info``.
        steps: the steps of the whole run.
        first_step: the step that this job starts from.
        restarts: how often the ranks of this job have been restarted.

    Attributes:
        registry: of all metrics.

    Raises:
        UserError: prometheus-client is not installed, or the port cannot be opened.
    """

    def __init__(self, port: int, run: str, steps: int, first_step: int, restarts: int) -> None:
        try:
            from prometheus_client import CollectorRegistry, Gauge, Info, start_http_server
        except ImportError:
            raise UserError(
                f"train.metrics_port is {port}, which needs prometheus-client: pip install prometheus-client"
            ) from None
        self.registry, self._gauge = CollectorRegistry(), Gauge
        self._gauges: dict[str, Gauge] = {}
        Info("mlet_run", "The run that is trained.", registry=self.registry).info({"run": run})
        self._named("mlet_steps", "Steps of the whole run.").set(steps)
        self._named("mlet_step", "Steps taken.").set(first_step)
        self._named("mlet_restarts", "Restarts of the ranks of this job.").set(restarts)
        self._named("mlet_checkpoint_step", "Step of the last complete checkpoint.").set(first_step)
        # A job that has saved nothing yet is as old as its start, so that an alert needs no second rule.
        self._named("mlet_checkpoint_time_seconds", "Unix time of the last complete checkpoint.").set(time.time())
        try:
            self._server, self._thread = start_http_server(port, registry=self.registry)
        except OSError as error:
            raise UserError(
                f"train.metrics_port {port} cannot be opened: {error.strerror or error}; choose another, or null"
            ) from None

    def record(self, split: str, step: int, values: Mapping[str, float | str | Sequence[float]]) -> None:
        """Show the numbers of a record; see ``Recorder.record``."""
        self._gauges["mlet_step"].set(step)
        for name, value in values.items():
            if not isinstance(value, float | int):
                continue
            if name.startswith(_KEPT):
                gauge = self._named(f"mlet_{split}_{_KEPT}share", "Share of a table's rows with columns.", ("table",))
                gauge.labels(name.removeprefix(_KEPT)).set(value)
            else:
                self._named(f"mlet_{split}_{name}", f"{name} of the records of the split {split}.").set(value)

    def saved(self, step: int) -> None:
        """Note that the checkpoint of a step is complete."""
        self._gauges["mlet_checkpoint_step"].set(step)
        self._gauges["mlet_checkpoint_time_seconds"].set(time.time())

    def close(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _named(self, name: str, meaning: str, labels: Sequence[str] = ()) -> "Gauge":
        if name not in self._gauges:
            self._gauges[name] = self._gauge(name, meaning, labels, registry=self.registry)
        return self._gauges[name]
