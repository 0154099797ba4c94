"""What a run records can be read by Prometheus while it trains, and its port is closed when it ends."""

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from mlet_dist.errors import UserError
from mlet_dist.training.metrics_endpoint import MetricsEndpoint
from mlet_dist.training.reporting import Recorder
from mlet_dist.training.run_directory import RunDirectory
from tests.helpers.forked_command import MLET, ForkedCommand
from tests.helpers.mlet_command import ROOT


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        number: int = free.getsockname()[1]
    return number


def _metrics(port: int) -> dict[tuple[str, str], float]:
    """Return what the endpoint shows, by name and the value of the only label, as Prometheus would read it."""
    with urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, "".join(sample.labels.values())): sample.value for sample in samples}


def test_records_are_shown_as_they_come(port: int, tmp_path: Path) -> None:
    endpoint, started = MetricsEndpoint(port, "runs/a", steps=100, first_step=20, restarts=2), time.time()
    with Recorder(RunDirectory(tmp_path), True, endpoint=endpoint) as recorder:
        found = _metrics(port)
        assert found["mlet_run_info", "runs/a"] == 1
        assert (found["mlet_step", ""], found["mlet_steps", ""], found["mlet_restarts", ""]) == (20, 100, 2)
        assert found["mlet_checkpoint_step", ""] == 20
        assert abs(found["mlet_checkpoint_time_seconds", ""] - started) < 60
        recorder.record("train", 30, {"loss": 0.5, "auc": float("nan")})
        recorder.record("timing", 30, {"step_ms": 7, "slowest_host": "a", "rank_samples_per_s": [1.0, 2.0]})
        recorder.record("compression", 30, {"moves": 4, "kept_C1": 0.25, "kept_a.b": 0.5})
        recorder.record("train", 40, {"loss": 0.25, "auc": 0.75})
        recorder.saved(35)
        found = _metrics(port)
        assert (found["mlet_step", ""], found["mlet_checkpoint_step", ""]) == (40, 35)
        assert (found["mlet_train_loss", ""], found["mlet_train_auc", ""]) == (0.25, 0.75)
        assert found["mlet_timing_step_ms", ""] == 7
        assert found["mlet_compression_kept_share", "C1"] == 0.25
        assert found["mlet_compression_kept_share", "a.b"] == 0.5
        assert not [name for name, _ in found if "host" in name or "rank_" in name]
    with socket.socket() as closed:
        assert closed.connect_ex(("localhost", port)) != 0


def test_a_port_that_is_taken_is_named(port: int) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", port))
        taken.listen()
        with pytest.raises(UserError, match=f"train.metrics_port {port} cannot be opened: Address already in use"):
            MetricsEndpoint(port, "runs/a", 1, 0, 0)


def test_without_the_library_its_name_is_in_the_error(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UserError, match=r"which needs prometheus-client: pip install prometheus-client$"):
        MetricsEndpoint(port, "runs/a", 1, 0, 0)


@pytest.mark.e2e
def test_a_run_shows_its_steps_and_checkpoints(port: int, small_model: tuple[str, ...], tmp_path: Path) -> None:
    settings = (*small_model, "train.max_steps=1000000", "train.epochs=20000", "train.checkpoint_every=20")
    command = [*MLET, "train", ROOT / "configs" / "criteo_kaggle.yaml", *settings, f"run.dir={tmp_path / 'run'}"]
    command += [f"train.metrics_port={port}", "--nproc", 2]
    with ForkedCommand(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        try:
            found: dict[tuple[str, str], float] = {}
            deadline = time.monotonic() + 120
            while found.get(("mlet_checkpoint_step", ""), 0) < 20 and time.monotonic() < deadline:
                assert run.poll() is None, run.communicate()
                time.sleep(0.2)
                try:
                    found = _metrics(port)
                except OSError:
                    continue
            assert found["mlet_checkpoint_step", ""] >= 20
            assert found["mlet_step", ""] >= 20
            run.send_signal(signal.SIGTERM)
            run.communicate(timeout=60)
        finally:
            run.kill()
    assert run.returncode == 75
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["split"] == "train"]
    assert found["mlet_train_loss", ""] in losses
