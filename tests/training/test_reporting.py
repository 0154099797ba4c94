"""A run records each step once, however often the step is repeated."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlet_dist.training.reporting import Recorder
from mlet_dist.training.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def losses(run: RunDirectory) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [(record["step"], record["loss"]) for record in records]


def points(run: RunDirectory, tag: str) -> list[tuple[int, float]]:
    """What TensorBoard shows."""
    events = EventAccumulator(str(run.tensorboard))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_repeated_steps_are_recorded_once(run: RunDirectory) -> None:
    with Recorder(run, enabled=True) as recorder:
        recorder.record("train", 1, {"loss": 1.5, "host": "a"})
        size = recorder.size
        recorder.record("train", 2, {"loss": 2.5})
        recorder.roll_back(1, size)
        assert losses(run) == [(1, 1.5)]
        recorder.record("train", 2, {"loss": 2.25})
        recorder.record("train", 3, {"loss": 3.5})
    assert losses(run) == points(run, "train/loss") == [(1, 1.5), (2, 2.25), (3, 3.5)]
    with Recorder(run, True, 1, size) as recorder:
        recorder.record("train", 2, {"loss": 2.75, "by_rank": [1.0, 2.0, 3.0]})
    assert losses(run) == points(run, "train/loss") == [(1, 1.5), (2, 2.75)]
    assert json.loads(run.metrics.read_text().splitlines()[-1])["by_rank"] == [1.0, 2.0, 3.0]
    events = EventAccumulator(str(run.tensorboard)).Reload()
    (histogram,) = events.Histograms("train/by_rank")
    assert (histogram.step, histogram.histogram_value.num, histogram.histogram_value.sum) == (2, 3, 6)


def test_a_line_that_was_cut_short_is_dropped(run: RunDirectory) -> None:
    with Recorder(run, enabled=True) as recorder:
        recorder.record("train", 1, {"loss": 1.5})
        recorder.record("train", 2, {"loss": 2.5})
        size = recorder.size
    run.metrics.write_bytes(run.metrics.read_bytes()[:-3])
    with Recorder(run, True, 2, size) as recorder:
        recorder.record("train", 3, {"loss": 3.5})
    assert losses(run) == [(1, 1.5), (3, 3.5)]


def test_other_ranks_write_nothing(run: RunDirectory) -> None:
    with Recorder(run, enabled=False) as recorder:
        recorder.record("train", 1, {"loss": 1.5})
        recorder.roll_back(0, recorder.size)
    assert not list(run.path.iterdir())
