"""Commands on one checkpoint of a run, finished or not: that of a step, the best, or one named by its directory."""

import re
import shutil
from pathlib import Path

import pytest

from mlet_dist.cli.main import parse
from mlet_dist.data.location import data_set_path
from mlet_dist.errors import UserError
from mlet_dist.export.collapse.run_collapse import ExportOptions, export_run
from mlet_dist.export.run_evaluate import evaluate_path
from mlet_dist.export.source import Tables
from mlet_dist.export.spectrum.run_spectrum import spectrum_of
from mlet_dist.export.verify.run_verify import verify_export
from mlet_dist.training.run_checkpoints import CheckpointChoice, find_checkpoint
from mlet_dist.training.run_directory import RunDirectory
from tests.helpers.export_units import contents
from tests.helpers.train_in_ranks import Ranks, train_in_ranks

pytestmark = pytest.mark.multirank

BEST = CheckpointChoice(best=True)


@pytest.fixture(scope="module")
def settings(small_model: tuple[str, ...]) -> tuple[str, ...]:
    """Return settings with which the model overfits from the second of three epochs of 50 batches on."""
    rates = ("optimizer.name=adagrad", "optimizer.learning_rate=0.1")
    return (*small_model, *rates, "data.batch_size=96", "train.epochs=3", "train.checkpoint_every=15")


@pytest.fixture(scope="module")
def finished(ranks: Ranks, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 75 steps whose best checkpoint is an earlier one."""
    run = tmp_path_factory.mktemp("finished") / "run"
    best = ("train.validate_every=15", "train.keep_best=logloss", "train.keep_every=15", "train.max_steps=75")
    found = train_in_ranks(ranks, 1, *settings, *best, f"run.dir={run}")
    assert not found["last_is_best"]
    return run


@pytest.fixture(scope="module")
def unfinished(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is left of it when it is stopped before its end."""
    run = tmp_path_factory.mktemp("unfinished") / "run"
    run.mkdir()
    for name in ("config.yaml", "model.json"):
        shutil.copy(finished / name, run)
    shutil.copytree(finished / "checkpoints", run / "checkpoints")
    return run


@pytest.fixture(scope="module")
def short(ranks: Ranks, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of 30 steps that ends with the weights that the others have then."""
    run = tmp_path_factory.mktemp("short") / "run"
    train_in_ranks(ranks, 1, *settings, "train.max_steps=30", f"run.dir={run}")
    return run


def test_a_step_is_exported_verified_and_measured_as_the_run_that_ends_there(
    unfinished: Path, short: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, step = data_set_path(str(small_data)), CheckpointChoice(30)
    export_run(short, tmp_path / "short")
    export_run(unfinished, tmp_path / "step", ExportOptions(choice=step))
    named = unfinished / "checkpoints" / "step-00000030"
    export_run(named, tmp_path / "named")
    expected = contents(tmp_path / "short" / "model")
    assert contents(tmp_path / "step" / "model") == expected
    assert contents(tmp_path / "named" / "model") == expected
    capsys.readouterr()
    for run in (unfinished, named):  # the export names the checkpoint that it is compared with
        assert verify_export(tmp_path / "step", run, data)["ok"]
    assert "warning" not in capsys.readouterr().err
    assert not verify_export(tmp_path / "step", unfinished, data, choice=CheckpointChoice(75))["ok"]
    assert "was made from another checkpoint than step-00000075" in capsys.readouterr().err
    _, _, summary = RunDirectory(short).load()
    for found in (evaluate_path(unfinished, data, "test", 250, choice=step), evaluate_path(named, data, "test", 250)):
        assert (found["step"], found["auc"], found["logloss"]) == (30, summary["test_auc"], summary["test_logloss"])
    expected_spectrum = spectrum_of(short)["tables"]
    assert spectrum_of(unfinished, choice=step)["tables"] == spectrum_of(named)["tables"] == expected_spectrum


def test_the_best_is_found_in_the_summary_or_the_latest_checkpoint(
    finished: Path, unfinished: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, summary = RunDirectory(finished).load()
    for run in (finished, unfinished):
        found = evaluate_path(run, data_set_path(str(small_data)), "valid", 250, choice=BEST)
        assert (found["step"], found["logloss"]) == (summary["best_step"], summary["best_value"])
    assert find_checkpoint(finished).checkpoint.step == 75
    capsys.readouterr()
    export_run(finished, tmp_path / "last")
    best = f"step {summary['best_step']} was better than the last step, 75, with a valid logloss of "
    assert best in capsys.readouterr().err
    export_run(finished, tmp_path / "best", ExportOptions(choice=BEST))
    assert "was better" not in capsys.readouterr().err


@pytest.mark.parametrize("step", [CheckpointChoice(33), CheckpointChoice(0)])
def test_a_step_without_a_checkpoint_shows_those_that_there_are(unfinished: Path, step: CheckpointChoice) -> None:
    message = f"{unfinished}: there is no checkpoint of step {step.step}; it has those of steps 15, 30, 45, 60, 75"
    with pytest.raises(UserError, match=re.escape(message)):
        find_checkpoint(unfinished, step)


def test_a_run_that_has_not_finished_needs_a_choice(unfinished: Path) -> None:
    with pytest.raises(UserError, match=r"never finished.*, or name one of its checkpoints by --step: 15, 30, 45"):
        find_checkpoint(unfinished)


def test_best_needs_a_run_that_kept_one(short: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--best: this run has kept no best .* name another by --step: 15, 30"):
        find_checkpoint(short, BEST)
    gone = shutil.copytree(finished, tmp_path / "gone")
    _, _, summary = RunDirectory(finished).load()
    shutil.rmtree(gone / "checkpoints" / f"step-{summary['best_step']:08d}")
    with pytest.raises(UserError, match=f"no checkpoint of step {summary['best_step']}, which was the best; it has"):
        find_checkpoint(gone, BEST)


def test_what_is_no_run_has_no_checkpoints_to_choose_from(
    unfinished: Path, exported: Path, small_data: Path, tmp_path: Path
) -> None:
    data = data_set_path(str(small_data))
    with pytest.raises(UserError, match="is an export; --best chooses a checkpoint of a run"):
        evaluate_path(exported, data, "test", choice=BEST)
    with pytest.raises(UserError, match="is an export; --step chooses a checkpoint of a run"):
        Tables.open(exported, CheckpointChoice(3))
    with pytest.raises(UserError, match="is one checkpoint, and --step and --best choose one of a run"):
        find_checkpoint(unfinished / "checkpoints" / "step-00000030", BEST)
    damaged = shutil.copytree(unfinished / "checkpoints" / "step-00000030", tmp_path / "step-00000030")
    (damaged / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"the checkpoint is damaged: .*__0_0\.distcp is missing"):
        find_checkpoint(damaged)


def test_a_damaged_checkpoint_that_is_chosen_is_not_replaced_by_another(unfinished: Path, tmp_path: Path) -> None:
    run = shutil.copytree(unfinished, tmp_path / "run")
    (run / "checkpoints" / "step-00000045" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-00000045: __0_0\.distcp has 0 bytes instead of"):
        find_checkpoint(run, CheckpointChoice(45))


@pytest.mark.parametrize(
    "command", [["export", "r", "--out", "e"], ["evaluate", "r", "--data", "d"], ["spectrum", "r"]]
)
def test_the_command_line_takes_one_choice(command: list[str]) -> None:
    assert (parse(command).step, parse(command).best) == (None, False)
    assert parse([*command, "--step", "0"]).step == 0
    assert parse([*command, "--best"]).best
    with pytest.raises(UserError, match="not allowed with argument --step"):
        parse([*command, "--step", "5", "--best"])
    with pytest.raises(UserError, match=r"--step: (expected one argument|'-3' is not)"):
        parse([*command, "--step", "-3"])
