"""Validation while training changes no bit of a run, whatever interrupts it; the best step is kept, and runs stop."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.training.validation_state import VALIDATION
from tests.helpers.forked_command import MLET, ROOT, ForkedCommand
from tests.helpers.train_in_ranks import Ranks, records, stopped_after, train_in_ranks
from tests.training.test_kills import children

pytestmark = pytest.mark.multirank

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
STEPS, EVERY = 150, 15


@pytest.fixture(scope="module")
def settings(small_model: tuple[str, ...]) -> tuple[str, ...]:
    """Return settings of three epochs of 50 batches, in which the model overfits from the second epoch on."""
    return (
        *small_model,
        "data.batch_size=96",
        "train.epochs=3",
        f"train.max_steps={STEPS}",
        "train.log_every=40",
        "optimizer.name=adagrad",
        "optimizer.learning_rate=0.1",
    )


VALIDATED = (
    f"train.validate_every={EVERY}",
    "train.keep_best=logloss",
    "train.patience=2",
    "train.checkpoint_every=25",
    "train.keep_last=1",
)


@pytest.fixture(scope="module")
def stopped(ranks: Ranks, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks that stops early, and keeps all of its checkpoints of 25 steps."""
    run = tmp_path_factory.mktemp("validation") / "stopped"
    train_in_ranks(ranks, 2, *settings, *VALIDATED, "train.keep_every=25", f"run.dir={run}")
    return run


def summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return found


def of_split(run: Path, split: str) -> list[dict[str, Any]]:
    return [record for record in records(run) if record["split"] == split]


def saved(run: Path) -> list[int]:
    return [checkpoint.step for checkpoint in CheckpointStore(run / "checkpoints").checkpoints()]


def test_a_run_stops_early_and_keeps_its_best_checkpoint(stopped: Path) -> None:
    losses = [record["logloss"] for record in of_split(stopped, "valid")]
    best = min(losses)
    assert losses[-2] > best < losses[-1]
    assert losses[-3] == best
    steps = [EVERY * (index + 1) for index in range(len(losses))]
    assert [record["step"] for record in of_split(stopped, "valid")] == steps
    assert [record["worse_in_a_row"] for record in of_split(stopped, "valid")][-3:] == [0, 1, 2]
    found = summary(stopped)
    assert (found["best_step"], found["best_metric"], found["best_value"]) == (steps[-3], "valid logloss", best)
    assert (found["steps"], found["stopped_early"], found["last_is_best"]) == (steps[-1], True, False)
    assert found["steps"] < STEPS
    assert found["best_checkpoint"] == str(stopped / "checkpoints" / f"step-{steps[-3]:08d}")
    assert saved(stopped) == sorted({25, 50, steps[-3], steps[-1]} | {each for each in (75, 100) if each < steps[-1]})
    # The metrics of training are recorded beside those of each validation.
    assert {record["step"] for record in of_split(stopped, "train")} == {*steps, *range(40, steps[-1], 40)}


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (1, ()),
        (2, ()),
        (2, ("train.pipelined=false", "optimizer.name=adam", "optimizer.learning_rate=0.01")),
        (
            2,
            (
                "compression.policy=adaptive",
                "compression.budget=0.6",
                "compression.widths=[12,4]",
                "compression.interval=8",
            ),
        ),
    ],
    ids=["1", "2", "adam in the plain loop", "adaptive"],
)
def test_validation_changes_no_bit_and_measures_what_a_run_of_as_many_steps_ends_with(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path, world_size: int, changes: tuple[str, ...]
) -> None:
    """14 and 28 are in the first epoch; 41 is no multiple of 14."""
    settings = (*settings, *changes)
    often = ("train.validate_every=14", "train.max_steps=41", "train.keep_best=auc")
    found = train_in_ranks(ranks, world_size, *settings, *often, f"run.dir={tmp_path / 'often'}")
    once = train_in_ranks(ranks, world_size, *settings, "train.max_steps=41", f"run.dir={tmp_path / 'once'}")
    assert found["weights_sha256"] == once["weights_sha256"]
    assert (found["valid_auc"], found["test_logloss"]) == (once["valid_auc"], once["test_logloss"])
    validated = of_split(tmp_path / "often", "valid")
    assert [record["step"] for record in validated] == [14, 28, 41]
    short = train_in_ranks(ranks, world_size, *settings, "train.max_steps=14", f"run.dir={tmp_path / 'short'}")
    for record, of_whole_run in ((validated[0], short), (validated[2], once)):
        assert record["auc"] == of_whole_run["valid_auc"]
        assert record["logloss"] == of_whole_run["valid_logloss"]
        assert record["rows"] == of_whole_run["valid_rows"] == 600


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_share_of_the_split_and_epochs(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path, world_size: int
) -> None:
    run = tmp_path / "run"
    part = ("train.validate_every=epoch", "train.validation_share=0.333", "train.keep_best=auc")
    found = train_in_ranks(ranks, world_size, *settings, *part, "train.max_steps=107", f"run.dir={run}")
    measured = of_split(run, "valid_part")
    assert [(record["step"], record["rows"]) for record in measured] == [(50, 200), (100, 200), (107, 200)]
    assert found["best_metric"] == "valid_part auc"
    assert found["best_value"] == max(record["auc"] for record in measured)
    (whole,) = of_split(run, "valid")
    assert (whole["step"], whole["rows"], whole["auc"]) == (107, 600, found["valid_auc"])


def test_a_resumed_run_has_the_same_best_and_last_step(
    ranks: Ranks, settings: tuple[str, ...], stopped: Path, tmp_path: Path
) -> None:
    expected = summary(stopped)
    for step in [step for step in saved(stopped) if step >= expected["best_step"]]:
        run = stopped_after(step, stopped, tmp_path / str(step))
        best = f"step-{expected['best_step']:08d}"
        shutil.copytree(stopped / "checkpoints" / best, run / "checkpoints" / best, dirs_exist_ok=True)
        found = train_in_ranks(ranks, 2, *settings, *VALIDATED, f"run.dir={run}")
        assert found["first_step"] == step
        for name in ("weights_sha256", "steps", "best_step", "best_value", "stopped_early", "valid_auc"):
            assert found[name] == expected[name], name
        assert records(run) == records(stopped)
        assert saved(run) == sorted({expected["best_step"], expected["steps"]})


def test_more_patience_goes_on_and_another_metric_chooses_anew(
    ranks: Ranks, settings: tuple[str, ...], stopped: Path, tmp_path: Path
) -> None:
    last = summary(stopped)["steps"]
    run = stopped_after(last, stopped, tmp_path / "patient")
    arguments = (*settings, *VALIDATED, f"train.max_steps={last + 7}", "train.patience=9")
    found = train_in_ranks(ranks, 2, *arguments, f"run.dir={run}")
    assert (found["first_step"], found["steps"], found["stopped_early"]) == (last, last + 7, False)
    assert found["best_step"] == summary(stopped)["best_step"]
    run = stopped_after(last, stopped, tmp_path / "other")
    found = train_in_ranks(ranks, 2, *arguments, "train.keep_best=auc", f"run.dir={run}")
    assert (found["best_metric"], found["best_step"], found["last_is_best"]) == ("valid auc", last + 7, True)


def test_a_rollback_validates_again_as_if_the_batch_had_never_come(
    ranks: Ranks, data_that_overflows: Path, small_model: tuple[str, ...], tmp_path: Path
) -> None:
    """The eleventh batch overflows; the run returns to step 6, before the validation of step 8."""
    found = {}
    for policy in ("skip", "rollback"):
        arguments = (
            *small_model[1:],
            f"data.path={data_that_overflows}",
            "train.max_steps=16",
            "train.validate_every=8",
        )
        arguments += ("train.checkpoint_every=6", f"train.on_non_finite={policy}", "optimizer.name=adagrad")
        result = train_in_ranks(ranks, 2, *arguments, f"run.dir={tmp_path / policy}")
        found[policy] = result["weights_sha256"], of_split(tmp_path / policy, "valid")
    assert found["rollback"] == found["skip"]
    assert [record["step"] for record in found["skip"][1]] == [8, 16]


@pytest.fixture(scope="module")
def slow(settings: tuple[str, ...]) -> tuple[str, ...]:
    """Return settings of a run whose time goes into its validations, of 75 batches each."""
    every = ("data.eval_batch_size=8", "train.validate_every=10", "train.keep_best=logloss", "train.patience=1")
    saves = ("train.checkpoint_every=7", "train.checkpoint_async=false")
    return (*settings, *every, *saves, "train.max_steps=30", "train.log_every=50")


@pytest.fixture(scope="module")
def whole(ranks: Ranks, slow: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That run, uninterrupted."""
    run = tmp_path_factory.mktemp("slow") / "run"
    train_in_ranks(ranks, 2, *slow, f"run.dir={run}")
    return run


def is_validating(run: Path, step: int) -> bool:
    """Whether the metrics of training have been recorded after a step, and those of its validation have not."""
    lines = (run / "metrics.jsonl").read_text().splitlines() if (run / "metrics.jsonl").exists() else []
    return bool(lines) and json.loads(lines[-1])["split"] == "timing" and json.loads(lines[-1])["step"] == step


@pytest.mark.e2e
@pytest.mark.parametrize(("strike", "code"), [("SIGTERM", 75), ("rank", 1), ("job", -9)])
def test_a_run_that_is_stopped_or_killed_in_a_validation_ends_as_if_it_had_not_been(
    ranks: Ranks, slow: tuple[str, ...], whole: Path, tmp_path: Path, strike: str, code: int
) -> None:
    for attempt in range(5):
        run = tmp_path / f"run {attempt}"
        command = [*MLET, "train", CONFIG, *slow, f"run.dir={run}", "--nproc", 2]
        with ForkedCommand(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as job:
            while not is_validating(run, 20) and job.poll() is None:
                time.sleep(0.002)
            if strike == "rank":
                os.kill(children(job.pid)[1], signal.SIGKILL)
            elif strike == "SIGTERM":
                job.terminate()
            else:
                job.kill()
            errors = job.communicate(timeout=120)[1]
        if len(of_split(run, "valid")) == 1:  # else the validation was faster
            break
    assert job.returncode == code, errors
    assert len(of_split(run, "valid")) == 1
    if strike == "SIGTERM":
        manifest = CheckpointStore(run / "checkpoints").checkpoint(20).manifest()
        assert manifest.about[VALIDATION]["step"] == 10
        assert f"SIGTERM: saved {run / 'checkpoints' / 'step-00000020'}; run the same command again" in errors
    found = train_in_ranks(ranks, 2, *slow, f"run.dir={run}")
    assert found["first_step"] == (20 if strike == "SIGTERM" else 14)
    for name in ("weights_sha256", "steps", "best_step", "best_value", "stopped_early"):
        assert found[name] == summary(whole)[name], name
    assert records(run) == records(whole)
