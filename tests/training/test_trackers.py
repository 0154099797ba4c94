"""Trackers get what metrics.jsonl holds, once, in one run, also after a kill; and one that fails stops nothing."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from mlet_dist.config.config_file import load_config
from mlet_dist.errors import Interrupted, UserError
from mlet_dist.training import trackers as threads
from mlet_dist.training.reporting import Recorder
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.tracked_run import Metrics, Outcome, TrackedRun, without_credentials
from mlet_dist.training.trackers import Trackers, check_trackers
from tests.helpers.forked_command import MLET, ForkedCommand
from tests.helpers.mlet_command import ROOT, error_line, mlet

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
needs_server = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mlflow", "flask", "sqlalchemy", "alembic")),
    reason="an MLflow server is not installed: pip install mlflow",
)


class Notes:
    """A tracker that notes what it is told, and fails as often as it is asked to."""

    name: ClassVar[str] = "mlflow"
    failures = 0
    calls: ClassVar[list[Any]] = []

    @classmethod
    def check(cls) -> None:
        pass

    def begin(self, run: TrackedRun, known: str | None) -> str:
        self.calls.append(("begin", known))
        return known or "7"

    def log(self, records: Sequence[Metrics]) -> None:
        if Notes.failures:
            Notes.failures -= 1
            raise ConnectionError("http://me:pass@tracking refuses, says hunter2hunter2")
        self.calls.extend(records)

    def end(self, run: TrackedRun, outcome: Outcome) -> None:
        self.calls.append((outcome, [file.name for file in run.files]))


@pytest.fixture
def open_recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Recorder]:
    """Open a recorder of one run that reports to ``Notes``."""
    monkeypatch.setitem(threads._TRACKERS, "mlflow", Notes)
    monkeypatch.setattr(threads, "_PAUSE", 0.0)
    monkeypatch.setattr(threads, "_RETRY", 0.01)
    monkeypatch.setattr(Notes, "calls", [])
    monkeypatch.setenv("TRACKING_PASSWORD", "hunter2hunter2")
    config = load_config(CONFIG, ["run.tags.team=ads", f"run.dir={tmp_path}"])

    def opened(step: int = 0, size: int = 0) -> Recorder:
        run = RunDirectory(tmp_path, "aa")
        trackers = Trackers(["tensorboard", "mlflow"], TrackedRun.of(config, run, 2, "cpu"))
        return Recorder(run, True, step, size, tensorboard=False, trackers=trackers)

    return opened


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_resumed_run_goes_on_and_sends_a_repeated_step_once(
    open_recorder: Callable[..., Recorder], tmp_path: Path
) -> None:
    def stopped() -> None:
        with open_recorder() as recorder:
            recorder.record("train", 1, {"loss": 1.5, "host": "a", "auc": float("nan"), "by_rank": [1.0, 2.0]})
            stopped.size = recorder.size  # type: ignore[attr-defined]
            recorder.record("train", 2, {"loss": 2.5})
            raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        stopped()
    assert Notes.calls == [("begin", None), (1, {"train/loss": 1.5}), (2, {"train/loss": 2.5}), ("stopped", [])]
    Notes.calls.clear()
    (tmp_path / "page.html").touch()
    (tmp_path / "plan.json").touch()
    with open_recorder(1, stopped.size) as recorder:  # type: ignore[attr-defined]
        recorder.record("train", 2, {"loss": 2.5})
        recorder.record("valid", 2, {"auc": 0.5})
        recorder.record("train", 3, {"loss": 3.5})
    assert Notes.calls == [
        ("begin", "7"),
        (2, {"valid/auc": 0.5}),
        (3, {"train/loss": 3.5}),
        ("finished", ["plan.json", "page.html"]),
    ]
    assert not (tmp_path / "tensorboard").exists()


def test_steps_after_a_rollback_are_sent_again(open_recorder: Callable[..., Recorder]) -> None:
    with open_recorder() as recorder:
        recorder.record("train", 1, {"loss": 1.5})
        size = recorder.size
        recorder.record("train", 2, {"loss": 2.5})
        wait_for(lambda: len(Notes.calls) == 3)
        recorder.roll_back(1, size)
        recorder.record("rollback", 1, {"batch_of_step": 2})
        recorder.record("train", 2, {"loss": 2.25})
    steps = [(1, {"train/loss": 1.5}), (2, {"train/loss": 2.5}), (1, {"rollback/batch_of_step": 2.0})]
    assert Notes.calls[1:-1] == [*steps, (2, {"train/loss": 2.25})]


def test_a_tracker_that_fails_is_warned_of_once_and_gets_all_records_later(
    open_recorder: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Notes, "failures", 3)
    with open_recorder() as recorder:
        for step in range(1, 6):
            recorder.record("train", step, {"loss": float(step)})
        wait_for(lambda: len(Notes.calls) == 6)
    assert Notes.calls[1:-1] == [(step, {"train/loss": float(step)}) for step in range(1, 6)]
    assert Notes.calls[-1] == ("finished", [])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "mlet: warning: run.trackers: mlflow: ConnectionError: http://***@tracking refuses, says ***; training goes on"
    )


def test_a_tracker_that_hangs_is_left_behind(
    open_recorder: Callable[..., Recorder], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Notes, "log", lambda *_: time.sleep(3600))
    monkeypatch.setitem(threads._LAST_SECONDS, "finished", 0.1)
    with open_recorder() as recorder:
        recorder.record("train", 1, {"loss": 1.5})
    assert "mlflow: has not taken all records within 0 s after the last step" in capsys.readouterr().err


def test_settings_and_tags_are_told_without_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "sesame-sesame")
    overrides = ["data.path=s3://me:pass@host/data", "run.tags.team=ads", "run.tags.try=3", f"run.dir={tmp_path}"]
    overrides.append("sharding.tables.C3.exchange=after")
    run = TrackedRun.of(load_config(CONFIG, overrides), RunDirectory(tmp_path, "aa"), 4, "cpu")
    assert run.settings["data.path"] == "s3://***@host/data"
    assert (run.settings["model.hidden_dim"], run.settings["train.max_steps"]) == ("64", "null")
    assert (run.settings["run.trackers"], run.settings["sharding.tables.C3.exchange"]) == ("[tensorboard]", "after")
    assert (run.tags["team"], run.tags["try"], run.tags["mlet.ranks"], run.tags["mlet.run_id"]) == (
        *("ads", "3", "4", "aa"),
    )
    assert without_credentials("a sesame-sesame") == "a ***"


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_package_is_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    for module in ("mlflow_tracker", "wandb_tracker"):
        monkeypatch.setattr(
            f"mlet_dist.training.{module}.find_spec", lambda wanted: None if wanted == name else find_spec(wanted)
        )
    with pytest.raises(UserError, match=rf"names {name}, which is not installed: pip install {name}(-skinny)?$"):
        check_trackers([name])


def test_settings_that_are_refused(small_model: tuple[str, ...], tmp_path: Path) -> None:
    for override, message in {
        "run.trackers=[mlflow, mlflow]": "run.trackers is [mlflow, mlflow]; name each once",
        "run.trackers=[neptune]": "run.trackers: expected a list, each one of tensorboard, mlflow, wandb, found",
        "run.tags.team=[a]": "run.tags.team is [a]; a tag is a text, a number, true or false",
    }.items():
        with pytest.raises(UserError) as found:
            load_config(CONFIG, [*small_model, f"run.dir={tmp_path}", override])
        assert message in str(found.value)


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow-skinny is not installed")
def test_mlflow_needs_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="and the environment has no MLFLOW_TRACKING_URI; set it"):
        check_trackers(["mlflow"])


@pytest.fixture(scope="module")
def settings(small_model: tuple[str, ...]) -> tuple[str, ...]:
    return (
        *small_model,
        "run.trackers=[mlflow]",
        "run.tags.team=ads",
        "train.log_every=2",
        "train.checkpoint_every=10",
    )


@pytest.mark.e2e
@needs_server
def test_a_killed_run_is_one_run_of_an_mlflow_server(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is killed after it has told the server of some steps; the next one ends the same run."""
    from mlflow import MlflowClient

    run = tmp_path / "run"
    command = [*MLET, "train", CONFIG, *settings, f"run.dir={run}"]
    with mlflow_server(tmp_path) as (address, _):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "clicks")
        client = MlflowClient()
        slow = [*command, "train.max_steps=100000", "train.epochs=2000"]
        with ForkedCommand(slow, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
            wait_for_file(job, run / "trackers" / "mlflow.json", '"train"')
            job.kill()
        known = json.loads((run / "trackers" / "mlflow.json").read_text())["id"]
        last = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))
        steps = last + 30
        mlet(*command[3:], f"train.max_steps={steps}", "train.epochs=2000")
        experiment = client.get_experiment_by_name("clicks")
        assert experiment is not None
        (found,) = client.search_runs([experiment.experiment_id])
        assert (found.info.run_id, found.info.status, found.info.run_name) == (known, "FINISHED", "run")
        assert (found.data.tags["team"], found.data.tags["mlet.ranks"]) == ("ads", "1")
        assert found.data.params["model.embedding_dim"] == "4"
        assert found.data.tags["mlet.resumed.train.max_steps"] == str(steps)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [(line["step"], line["loss"]) for line in lines if line["split"] == "train"]
        history = {(metric.step, metric.value) for metric in client.get_metric_history(known, "train/loss")}
        assert {(step, loss) for step, loss in losses} <= history
        (auc,) = client.get_metric_history(known, "test/auc")
        assert auc.value == lines[-1]["auc"]
        artifacts = {file.path for file in client.list_artifacts(known)}
        assert artifacts == {"config.yaml", "model.json", "plan.json", "summary.json"}


@pytest.mark.e2e
@needs_server
def test_a_server_that_ends_in_the_middle_stops_nothing(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    long = (*settings, "train.max_steps=2000", "train.epochs=40", "train.checkpoint_every=null")
    command = [*MLET, "train", CONFIG, *long, f"run.dir={run}"]
    with mlflow_server(tmp_path) as (address, server):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        with ForkedCommand(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
            wait_for_file(job, run / "trackers" / "mlflow.json", '"train"')
            os.killpg(server.pid, signal.SIGKILL)
            _, errors = job.communicate(timeout=200)
    assert job.returncode == 0, errors
    warnings = [line for line in errors.splitlines() if line.startswith("mlet: warning: run.trackers: mlflow: ")]
    assert len(warnings) == 1
    assert (run / "summary.json").exists()


@pytest.mark.e2e
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_a_run_of_wandb_offline(small_model: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    done = mlet("train", CONFIG, *small_model, f"run.dir={run}", "run.trackers=[wandb]", "--json")
    assert json.loads(done.stdout)["steps"] == 57
    assert "warning: run.trackers" not in done.stderr
    (kept,) = (run / "trackers" / "wandb").glob("offline-run-*/*.wandb")
    content = kept.read_bytes()
    for text in (b"train/loss", b"test/auc", b"model.embedding_dim", b"summary.json"):
        assert text in content
    assert json.loads((run / "trackers" / "wandb.json").read_text())["id"] in kept.name


@pytest.mark.e2e
@pytest.mark.skipif(importlib.util.find_spec("mlflow") is not None, reason="mlflow is installed")
def test_a_run_without_the_package_ends_before_it_begins(small_model: tuple[str, ...], tmp_path: Path) -> None:
    line = error_line("train", CONFIG, *small_model, f"run.dir={tmp_path / 'run'}", "run.trackers=[mlflow]")
    assert line.endswith("which is not installed: pip install mlflow-skinny")
    assert not (tmp_path / "run").exists()


def wait_for_file(job: "subprocess.Popen[str]", path: Path, text: str) -> None:
    deadline = time.monotonic() + 120
    while not (path.exists() and text in path.read_text()):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Run an MLflow server with a database in this folder; yield its address and its process, a session of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", f"{folder}/artifacts"]
    log = folder / "server.log"
    with log.open("wb") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", server
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
