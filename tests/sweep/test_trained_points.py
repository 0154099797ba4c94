"""What is found of a run is what it ended with, whenever the sweep that trained it was stopped."""

from pathlib import Path

import pytest

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.errors import Interrupted, UserError
from mlet_dist.formatting import to_json
from mlet_dist.sweep.logged_commands import LoggedCommands
from mlet_dist.sweep.scored_points import OUTPUTS_FILE, ScoredPoints
from mlet_dist.sweep.trained_points import Outcome, TrainedPoints

CONFIG = Path(__file__).parents[2] / "configs" / "criteo_kaggle.yaml"


class StoppedCommands(LoggedCommands):
    """Commands of which each leaves what a run has at its first checkpoint, before the sweep is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.started: list[tuple[str, ...]] = []

    def run(self, *arguments: str, log: Path, ranks: int = 1) -> int:
        self.started.append(arguments)
        (log.with_suffix("") / "checkpoints" / "step-1").mkdir(parents=True)
        raise Interrupted("the sweep was stopped")

    def result(self, *arguments: str, log: Path) -> dict[str, object]:
        self.started.append(arguments)
        raise Interrupted("the sweep was stopped")


@pytest.fixture
def config() -> Config:
    return load_config(CONFIG, ["data.path=d", "run.dir=r"])


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A trial that has ended; its checkpoint is still there."""
    monkeypatch.setattr("mlet_dist.sweep.trained_points.digest_of", lambda config: "abc")
    run = tmp_path / "abc"
    (run / "checkpoints" / "step-9").mkdir(parents=True)
    (run / "summary.json").write_text("{}")
    (tmp_path / "abc.json").write_text(to_json({"summary": {"steps": 9}, "seconds": 1.0, "diverged": None}))
    return run


def test_a_run_that_is_trained_again_is_not_finished_when_that_is_interrupted(
    finished: Path, config: Config, tmp_path: Path
) -> None:
    commands = StoppedCommands()
    points = TrainedPoints(tmp_path, 1, commands)
    points.forget_checkpoints(config)
    assert sorted(path.name for path in finished.iterdir()) == ["summary.json"]
    assert points.train(config).summary == {"steps": 9}
    for attempt in (1, 2):  # a trial has no checkpoint to export, so that the run with the seed is trained again
        with pytest.raises(Interrupted):
            points.train(config, keep=True)
        assert len(commands.started) == attempt
        assert points.find(config) is None
        for path in (finished / "checkpoints").iterdir():
            path.rmdir()
        (finished / "checkpoints").rmdir()


def test_a_run_that_is_to_be_kept_keeps_its_checkpoint(finished: Path, config: Config, tmp_path: Path) -> None:
    commands = StoppedCommands()
    points = TrainedPoints(tmp_path, 1, commands)
    assert points.train(config, keep=True).summary == {"steps": 9}
    points.forget_checkpoints(config)
    assert (finished / "checkpoints" / "step-9").is_dir()
    assert commands.started == []


def test_outputs_that_another_sweep_scored_are_scored_again_beside_new_ones(
    finished: Path, config: Config, tmp_path: Path
) -> None:
    scores = tmp_path / "abc-scores"
    scores.mkdir()
    (scores / OUTPUTS_FILE).write_text(to_json({"dcp": {}, "int8": {}}))
    commands = StoppedCommands()
    points = ScoredPoints(commands, ["test"])
    (tmp_path / "abc-export").mkdir()  # of a sweep that was killed before it removed it
    outcome = Outcome(finished, {}, 1.0)
    assert points.score(outcome, config, ["int8"]).outputs == {"int8": {}}
    assert commands.started == []
    assert not (tmp_path / "abc-export").exists()
    with pytest.raises(Interrupted):
        points.score(outcome, config, ["dcp", "int4"])
    ((*_, flag, first, second, third),) = commands.started
    assert (flag, first, second, third) == ("--outputs", "dcp", "int4", "int8")


def test_storage_without_locks_is_named(tmp_path: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("mlet_dist.sweep.trained_points.digest_of", lambda config: "abc")
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"\.abc\.lock: cannot be locked: Operation not supported; a sweep needs"):
        TrainedPoints(tmp_path, 1, StoppedCommands()).train(config)
