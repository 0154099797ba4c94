"""A run of two ranks with its data and its checkpoints on an object store, killed, resumed and exported to it."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import TrainedRun
from tests.helpers.forked_command import MLET, ROOT, ForkedCommand
from tests.helpers.mlet_command import error_line, mlet, mlet_json
from tests.helpers.s3_server import S3Bucket

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


def settings_on(s3: S3Bucket, trained: TrainedRun) -> tuple[str, ...]:
    """The settings of ``trained``, with its data copied to the store, and checkpoints there."""
    s3.files.put(str(trained.data), f"{s3.url}/data", recursive=True)
    return (
        *(each for each in trained.overrides if not each.startswith("data.path=")),
        f"data.path={s3.url}/data",
        f"train.checkpoint_dir={s3.url}/checkpoints",
        "train.checkpoint_every=15",
    )


def stored(s3: S3Bucket, url: str) -> dict[str, bytes]:
    root = url.removeprefix("s3://")
    s3.files.invalidate_cache()
    return {path.removeprefix(f"{root}/"): s3.files.cat_file(path) for path in s3.files.find(root)}


def test_a_run_that_is_killed_and_resumed_on_s3(s3: S3Bucket, trained: TrainedRun, tmp_path: Path) -> None:
    """It ends with the metrics of the local run that nothing interrupted, though the store fails now and then."""
    settings, run = settings_on(s3, trained), tmp_path / "run"
    s3.server.set_faults(
        {"kind": "status", "status": 503, "count": 2, "path": "part-"},
        {"kind": "cut", "method": "GET", "count": 2, "path": "part-"},
        {"kind": "status", "status": 500, "count": 2, "path": "/step-", "method": "PUT"},
    )
    command = [*MLET, "train", CONFIG, *settings, f"run.dir={run}", "--nproc", 2]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with ForkedCommand(command, **output, start_new_session=True) as job:
        deadline = time.monotonic() + 150
        while not any(name.endswith("/manifest.json") for name in s3.files.find(f"{s3.url}/checkpoints")):
            assert job.poll() is None, job.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.5)  # each look is a request that the server answers
        os.killpg(job.pid, signal.SIGKILL)
    assert not (run / "summary.json").exists()
    done = mlet("train", CONFIG, *settings, f"run.dir={run}", "--nproc", 2, "--json")
    assert f"resuming from {s3.url}/checkpoints/step-" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["weights_sha256"] == trained.result["weights_sha256"]
    assert result["test_logloss"] == trained.result["test_logloss"]
    assert not list(tmp_path.rglob("step-*"))

    local = mlet_json("export", run, "--out", tmp_path / "export", "--outputs", "dcp", "safetensors", "--nproc", 2)
    remote = mlet_json("export", run, "--out", f"{s3.url}/export", "--outputs", "dcp", "safetensors", "--nproc", 2)
    assert remote | {"out": None} == local | {"out": None}
    found = stored(s3, f"{s3.url}/export")
    expected = {
        str(path.relative_to(tmp_path / "export")): path.read_bytes()
        for path in (tmp_path / "export").rglob("*")
        if path.is_file()
    }
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} <= {"manifest.json"}  # it has a time
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "run"]
    line = error_line("export", run, "--out", f"{s3.url}/export")
    assert line.endswith(f"{s3.url}/export: exists and is not empty; name another directory or remove this one")
    line = error_line("export", run, "--out", f"{s3.url}/export", "--overwrite")
    assert "--overwrite cannot replace an export at a URL; name another directory" in line
    assert stored(s3, f"{s3.url}/export") == found


@pytest.mark.parametrize("place", ["data.path", "train.checkpoint_dir"])
def test_a_store_that_cannot_be_reached(trained: TrainedRun, tmp_path: Path, place: str, s3: S3Bucket) -> None:
    """The command ends with a line that names the URL, on all ranks, and leaves no run that looks finished."""
    settings = settings_on(s3, trained)
    path = "schema.json" if place == "data.path" else "checkpoints"
    s3.server.set_faults({"kind": "status", "status": 500, "path": path})
    command = [*MLET, "train", CONFIG, *settings, f"run.dir={tmp_path / 'run'}", "--nproc", 2]
    with ForkedCommand(command, stderr=subprocess.PIPE) as job:
        errors = job.communicate(timeout=170)[1]
    assert job.returncode != 0
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if "error: " in line]
    assert lines
    assert all(re.search(f"{s3.url}/(data|checkpoints)", line) for line in lines), errors
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize("ranks", [(), ("--nproc", 2)])
def test_a_bucket_that_does_not_exist_is_noticed_before_training(
    ranks: tuple[object, ...], s3: S3Bucket, trained: TrainedRun, tmp_path: Path
) -> None:
    place = f"{s3.url}-other/checkpoints"
    line = error_line(
        "train", CONFIG, *trained.overrides, f"run.dir={tmp_path / 'run'}", f"train.checkpoint_dir={place}", *ranks
    )
    assert f"{place}: cannot be written: The specified bucket does not exist" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("setting", ["train.resume", "train.initial_weights"])
def test_a_bucket_that_does_not_exist_is_named(s3: S3Bucket, trained: TrainedRun, tmp_path: Path, setting: str) -> None:
    settings = (*trained.overrides, f"run.dir={tmp_path / 'run'}", f"{setting}={s3.url}-other/run")
    line = error_line("train", CONFIG, *settings)
    assert line == f"mlet: error: {s3.url}-other/run: cannot be read: The specified bucket does not exist"


def test_a_run_directory_must_be_local(trained: TrainedRun) -> None:
    line = error_line("train", CONFIG, *trained.overrides, "run.dir=s3://bucket/run")
    assert line == (
        "mlet: error: command line: run.dir is the URL s3://bucket/run, but must be a local directory; to keep "
        "checkpoints in a store, set train.checkpoint_dir to a URL"
    )
