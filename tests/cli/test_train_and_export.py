"""`mlet train --export`: what is checked before training, and how it is stopped and goes on."""

import json
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import TrainedRun
from tests.helpers.forked_command import MLET, ROOT, ForkedCommand
from tests.helpers.mlet_command import error_line, mlet, mlet_json

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


@pytest.mark.parametrize("ranks", [(), ("--nproc", 2)], ids=["alone", "ranks"])
def test_a_place_that_cannot_be_exported_to_is_noticed_before_training(
    small_model: tuple[str, ...], tmp_path: Path, ranks: tuple[object, ...]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    out.mkdir()
    (out / "holiday.jpg").touch()
    command = ("train", CONFIG, *small_model, f"run.dir={run}", *ranks, "--export")
    assert error_line(*command, out) == (
        f"mlet: error: --export {out}: exists and is not empty; name another directory or remove this one"
    )
    assert "--export s3://bucket/out: must be a local directory" in error_line(*command, "s3://bucket/out")
    assert not run.exists()


@pytest.mark.parametrize("ranks", [(), ("--nproc", 2)], ids=["alone", "ranks"])
@pytest.mark.parametrize(
    ("number", "code", "last"),
    [
        (signal.SIGTERM, 75, "mlet: SIGTERM: the run has finished; run the same command again to complete its export"),
        (signal.SIGINT, 130, "mlet: interrupted; run the same command again to resume from the last checkpoint, or"),
    ],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_while_it_exports(
    small_model: tuple[str, ...], tmp_path: Path, ranks: tuple[object, ...], number: int, code: int, last: str
) -> None:
    """The same command then exports the finished run, and does not train it again."""
    for attempt in range(9):
        run, log = tmp_path / f"run {attempt}", tmp_path / f"log {attempt}"
        settings = (*small_model, "train.max_steps=2", f"run.dir={run}")
        command = [*MLET, "train", CONFIG, *settings, *ranks, "--export", tmp_path / f"out {attempt}", "--json"]
        with log.open("w") as errors, ForkedCommand(command, stdout=subprocess.DEVNULL, stderr=errors) as process:
            while not (tmp_path / f".out {attempt}.partial").exists() and process.poll() is None:
                time.sleep(0.002)
            process.send_signal(number)
            ended_with = process.wait(60)
        if ended_with:  # else the signal came too late
            break
    assert ended_with == code
    lines = log.read_text().splitlines()
    assert lines[-1].startswith(last)
    assert not any("Traceback" in line for line in lines)
    finished = (run / "summary.json").stat().st_mtime_ns
    done = mlet(*command[3:])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["export"]["ok"]
    assert (run / "summary.json").stat().st_mtime_ns == finished
    assert not re.search("^train ", done.stderr, flags=re.MULTILINE)


def test_a_new_run_does_not_remove_the_checkpoints_of_another(trained: TrainedRun, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    settings = (*trained.overrides, f"train.checkpoint_dir={shared}", "train.max_steps=3")
    mlet("train", CONFIG, *settings, f"run.dir={tmp_path / 'one'}")
    kept = {path: path.read_bytes() for path in shared.rglob("*") if path.is_file() and path.name != ".mlet-lock"}
    other = ("train", CONFIG, *settings, "train.seed=7", f"run.dir={tmp_path / 'other'}")
    line = error_line(*other)
    assert "train.seed was 0, is 7; change them back, or choose another train.checkpoint_dir, or, if this is" in line
    line = error_line(*other, "run.overwrite=true")
    assert line == (
        f"mlet: error: {shared}/step-00000003 is a checkpoint of another run than {tmp_path / 'other'}, and a new run "
        "would remove it; choose another train.checkpoint_dir, or remove the checkpoints there"
    )
    assert not (tmp_path / "other").exists()
    assert {path: path.read_bytes() for path in kept} == kept
    own = ("train", CONFIG, *settings, "train.seed=7", "run.overwrite=true", f"run.dir={tmp_path / 'one'}")
    assert mlet_json(*own)["steps"] == 3  # the run of run.dir, and its checkpoints, are replaced
