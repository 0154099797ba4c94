import dataclasses
import json
import os
import re
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from mlet_dist.config.config_file import Config
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import DataConfig, RunConfig, TrainConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.run_directory import RunDirectory

SPEC = ModelSpec(ModelConfig(hidden_dim=8), ("I1",), (SparseFeature("C1", 9),), seed=3)
SUMMARY = {"steps": 5, "test_auc": 0.75}


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "runs" / "first")


def start(run: RunDirectory, config: Config, spec: ModelSpec) -> None:
    with run.lock(config):
        run.prepare(config, spec)


def config_of(run: RunDirectory, **changes: Any) -> Config:
    return Config(data=DataConfig(path="logs"), run=RunConfig(dir=str(run.path), **changes), train=TrainConfig(seed=3))


def refusal_of(run: RunDirectory, **changes: Any) -> str:
    """Return the error of starting a run, which must not change anything."""
    before = snapshot(run.path)
    with pytest.raises(UserError) as caught:
        start(run, config_of(run, **changes), SPEC)
    assert snapshot(run.path) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def snapshot(path: Path) -> dict[str, bytes]:
    return {str(each): each.read_bytes() for each in sorted(path.rglob("*")) if each.is_file()}


def leave_an_unfinished_run(run: RunDirectory) -> None:
    start(run, config_of(run), SPEC)
    run.metrics.write_text("{}\n")
    for folder in (run.checkpoints / "step-00000099", run.tensorboard):
        folder.mkdir(parents=True)
        (folder / "old").write_text("old")


def test_a_new_run_holds_its_config_and_model(run: RunDirectory) -> None:
    config = config_of(run)
    start(run, config, SPEC)
    assert {path.name for path in run.path.iterdir()} == {".mlet-run", "config.yaml", "model.json"}
    run.finish(SUMMARY)
    assert run.load() == (config, SPEC, SUMMARY)
    assert {path.name for path in run.path.iterdir()} == {".mlet-run", "config.yaml", "model.json", "summary.json"}


def test_an_empty_directory_is_accepted(run: RunDirectory) -> None:
    run.path.mkdir(parents=True)
    run.check_available(config_of(run))
    start(run, config_of(run), SPEC)
    assert run.config.exists()


def test_a_finished_run_is_replaced_only_when_asked(run: RunDirectory) -> None:
    leave_an_unfinished_run(run)
    run.finish(SUMMARY)
    assert refusal_of(run) == (
        f"run.dir {run.path} holds a finished run; choose another, or replace it with run.overwrite=true"
    )
    changed = dataclasses.replace(config_of(run, overwrite=True), data=DataConfig(path="other"))
    other = dataclasses.replace(SPEC, seed=4)
    start(run, changed, other)
    assert {path.name for path in run.path.iterdir()} == {".mlet-run", "config.yaml", "model.json"}
    run.finish({})
    assert run.load() == (changed, other, {})


def test_an_unfinished_run_is_started_again_from_nothing(run: RunDirectory) -> None:
    leave_an_unfinished_run(run)
    (run.path / ".summary.json.tmp").write_text("{")  # stopped while it was finishing
    start(run, config_of(run), SPEC)
    assert {path.name for path in run.path.iterdir()} == {".mlet-run", "config.yaml", "model.json"}


def test_a_resumed_run_keeps_its_checkpoints_and_records(run: RunDirectory) -> None:
    leave_an_unfinished_run(run)
    (run.path / ".summary.json.tmp").write_text("{")  # stopped while it was finishing
    with run.lock(config_of(run)):
        run.prepare(config_of(run), SPEC, resumes=True)
    assert run.metrics.read_text() == "{}\n"
    assert (run.checkpoints / "step-00000099" / "old").exists()
    assert not (run.path / ".summary.json.tmp").exists()


def test_never_requires_an_empty_directory(run: RunDirectory) -> None:
    never = TrainConfig(seed=3, resume="never")
    with run.lock(dataclasses.replace(config_of(run), train=never)):
        pass  # a job that found a mistake before it began
    start(run, dataclasses.replace(config_of(run), train=never), SPEC)
    with pytest.raises(UserError, match=r"train\.resume is never; resume it with train\.resume=auto"):
        start(run, dataclasses.replace(config_of(run), train=never), SPEC)
    start(run, dataclasses.replace(config_of(run, overwrite=True), train=never), SPEC)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_directory_that_is_not_a_run_is_never_changed(overwrite: bool, run: RunDirectory) -> None:
    run.path.mkdir(parents=True)
    (run.path / "holiday.jpg").write_bytes(b"sea")
    assert refusal_of(run, overwrite=overwrite) == (
        f"run.dir {run.path} holds files that are not a run's; choose an empty or new directory"
    )


def test_a_file_and_a_path_below_a_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    for path in (file, file / "run"):
        assert refusal_of(RunDirectory(path)) == (
            f"run.dir {path} is a file or below one; it must be a directory, or not exist"
        )
    assert file.read_text() == "text"


def test_an_impossible_path_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / ("x" * 300)
    with pytest.raises(UserError) as caught:
        RunDirectory(path).check_available(config_of(RunDirectory(path)))
    assert str(caught.value) == f"run.dir {path} cannot be read: File name too long"


def test_old_checkpoints_that_cannot_be_removed_stop_the_run(run: RunDirectory, tmp_path: Path) -> None:
    leave_an_unfinished_run(run)
    scratch = tmp_path / "scratch"
    run.checkpoints.rename(scratch)
    run.checkpoints.symlink_to(scratch)
    with pytest.raises(UserError, match=r"^run\.dir .*/first cannot be written: .*symbolic link"):
        start(run, config_of(run), SPEC)
    assert (scratch / "step-00000099" / "old").exists()


def load_error_of(run: RunDirectory) -> str:
    with pytest.raises(UserError) as caught:
        run.load()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_loading_an_unfinished_run_reports_the_reason(run: RunDirectory) -> None:
    path = run.path
    assert load_error_of(run) == f"{path}: no such directory; expected a run made by `mlet train`"
    path.mkdir(parents=True)
    assert load_error_of(run) == f"{path}: not a run of `mlet train`: it has no config.yaml"
    start(run, config_of(run), SPEC)
    assert load_error_of(run) == (
        f"{path}: this run never finished: it has no summary.json; train it to the end first (the same `mlet train` "
        "command resumes it)"
    )
    run.finish(SUMMARY)
    run.summary.write_text('{"steps": ')
    assert load_error_of(run).startswith(f"{run.summary}: cannot be read: ")
    run.summary.write_bytes(b"\xff")
    assert load_error_of(run).startswith(f"{run.summary}: cannot be read: ")
    run.summary.write_text("[1]")
    assert load_error_of(run) == f"{run.summary}: holds a JSON list instead of an object"


def test_a_broken_model_or_config_file_is_named(run: RunDirectory) -> None:
    start(run, config_of(run), SPEC)
    run.finish(SUMMARY)
    model, config = run.model.read_text(), run.config.read_text()
    run.model.unlink()
    assert load_error_of(run).startswith(f"{run.model}: cannot be read: ")
    run.model.write_text(json.dumps({"model": {}}))
    assert load_error_of(run).startswith(f"{run.model}: not a model description: ")
    run.model.write_text(model)
    run.config.write_text(config.replace("hidden_dim", "hiden_dim"))
    assert load_error_of(run).startswith(f"{run.config}: model.hiden_dim: unknown key")


def test_a_second_job_is_refused_until_the_first_has_ended(run: RunDirectory) -> None:
    with run.lock(config_of(run)):
        run.metrics.write_text("of the first")
        holder = rf"process {os.getpid()} on {re.escape(socket.gethostname())}"
        with pytest.raises(UserError, match=rf"first: another job is .*\({holder}\)"), run.lock(config_of(run)):
            pass
        assert run.metrics.read_text() == "of the first"
    start(run, config_of(run), SPEC)
    assert not run.metrics.exists()


def test_a_restarted_job_waits_for_the_lock_of_a_process_that_ends(run: RunDirectory) -> None:
    with ExitStack() as first:
        first.enter_context(run.lock(config_of(run)))
        release = threading.Timer(0.5, first.pop_all().close)
        release.start()
        with run.lock(config_of(run), wait=20):
            pass
        release.join()
    with (
        run.lock(config_of(run)),
        pytest.raises(UserError, match="another job is training into it"),
        run.lock(config_of(run), wait=0.3),
    ):
        pass


def test_two_runs_do_not_share_a_directory_of_checkpoints(run: RunDirectory, tmp_path: Path) -> None:
    def config(run: RunDirectory, where: str) -> Config:
        return dataclasses.replace(config_of(run), train=TrainConfig(seed=3, checkpoint_dir=where))

    shared, other = tmp_path / "shared", RunDirectory(tmp_path / "other")
    with run.lock(config(run, f"file://{shared}")):
        with pytest.raises(UserError, match=rf"^train\.checkpoint_dir {shared}: another job "):
            start(other, config(other, str(shared)), SPEC)
        assert not other.config.exists()
        with other.lock(config(other, "memory://elsewhere")):
            pass
    start(other, config(other, str(shared)), SPEC)
    (shared / "file").touch()
    with pytest.raises(UserError, match=rf"^train\.checkpoint_dir {shared}/file cannot be written: "):
        start(other, config(other, str(shared / "file")), SPEC)


def test_a_directory_with_only_a_config_is_not_a_run(run: RunDirectory) -> None:
    run.path.mkdir(parents=True)
    for name in ("config.yaml", "model.json", "notes.txt"):
        (run.path / name).write_text("precious")
    (run.checkpoints / "mine").mkdir(parents=True)
    assert "not a run's" in refusal_of(run, overwrite=True)
    assert (run.checkpoints / "mine").is_dir()
