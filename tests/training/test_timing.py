"""Timing of the parts of a step: the slower of two ranks is named, in both loops, with the slow part."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torchrec.models.dlrm import OverArch

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.data.loading.loader import Batch
from mlet_dist.training.non_finite_guard import Guard
from mlet_dist.training.step import take_steps
from mlet_dist.training.timing import StepTimer, Stopwatch
from tests.conftest import TrainedRun
from tests.helpers.mlet_command import ROOT
from tests.helpers.ranks import RankPool
from tests.helpers.small_run import SETTINGS, loader, training_of

Ranks = Callable[[int], RankPool]
CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
DEVICE = torch.device("cpu")
STEPS = 6
# Far above what a step of this model takes on a busy machine: the tests compare no times but this one with the rest.
SLEEP = 0.2
PARTS = ("data_wait_ms", "forward_ms", "exchange_ms", "backward_ms", "checkpoint_ms", "other_ms")


def _run(config: Config, pipelined: bool, slow: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A report, and the summary, of a run in which the second rank sleeps at each step in ``slow``."""
    training, embeddings = training_of(config, STEPS)
    sleeps = dist.get_rank() == 1

    def batches() -> Iterator[Batch]:
        for batch in islice(loader(config), STEPS):
            if sleeps and slow == "data":
                time.sleep(SLEEP)
            yield batch

    def sleep(*_: Any) -> None:
        if sleeps:
            time.sleep(SLEEP)

    if slow == "dense":
        (over_arch,) = (each for each in training.model.modules() if isinstance(each, OverArch))
        over_arch.register_forward_hook(sleep)
    if slow == "lookup":
        embeddings._lookups[0].register_forward_hook(sleep)
    if slow == "ids":
        send_ids = embeddings.input_dist
        embeddings.input_dist = lambda *batch: (sleep(), send_ids(*batch))[1]
    training.model.train()
    guard = Guard(training, DEVICE, "stop", 0)
    with StepTimer(training.model, DEVICE, local_batch_size=10) as timer:
        for _ in take_steps(training, batches(), DEVICE, guard, timer, pipelined=pipelined):
            if slow == "checkpoint":
                timer.add_checkpoint_seconds(SLEEP)
            if slow == "caller":
                sleep()
            if training.step == STEPS // 2:
                timer.report()
        return timer.report(), timer.summary()


def _run_each(config: Config, cases: list[tuple[bool, str]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return [_run(config, *case) for case in cases]


@pytest.mark.multirank
def test_the_rank_that_sleeps_is_named_with_what_it_sleeps_in(ranks: Ranks, small_model: tuple[str, ...]) -> None:
    config = load_config(CONFIG, [*small_model, *SETTINGS, "run.dir=unused"])
    cases = [(pipelined, slow) for pipelined in (False, True) for slow in ("data", "dense", "lookup")]
    first, second = ranks(2).run(_run_each, config, cases)
    assert first == second  # every rank knows all
    for (pipelined, slow), (report, summary) in zip(cases, first, strict=True):
        for found in (report, summary):
            assert found["slowest_rank"] == 1, (pipelined, slow)
            assert found["slowest_host"] == socket.gethostname()
            assert found["rank_samples_per_s_min"] <= found["rank_samples_per_s_median"]
            assert found["peak_memory_bytes"] > 50e6
            assert sum(found[part] for part in PARTS) == pytest.approx(found["step_ms"])
            assert all(found[part] >= 0 for part in PARTS)
        # In the pipeline the batches of the reported steps were fetched in those before.
        part = "data_wait_ms" if slow == "data" else "forward_ms"
        for found in (summary,) if pipelined and slow == "data" else (summary, report):
            assert found["rank_samples_per_s_min"] < 10 / SLEEP < found["rank_samples_per_s_max"]
            assert found["step_ms"] >= 1e3 * SLEEP
            assert found[part] >= 1e3 * SLEEP / 2  # the mean of both ranks
            assert found["rank_samples_per_s"][1] == found["rank_samples_per_s_min"]
            assert max(found["rank_peak_memory_bytes"]) == found["peak_memory_bytes"]
            assert sum(found["rank_data_wait_ms"]) / 2 == pytest.approx(found["data_wait_ms"])
        assert summary["rank_hosts"] == [socket.gethostname()] * 2


@pytest.mark.multirank
def test_waiting_for_a_slow_rank_counts_as_exchange_on_the_other(ranks: Ranks, small_model: tuple[str, ...]) -> None:
    config = load_config(CONFIG, [*small_model, *SETTINGS, "run.dir=unused"])
    cases = [(False, "lookup"), (False, "checkpoint"), (True, "ids"), (True, "caller")]
    ((lookup, _), (checkpoint, _), (_, ids), (caller, _)), _ = ranks(2).run(_run_each, config, cases)
    assert lookup["exchange_ms"] >= 1e3 * SLEEP / 2 * 0.9
    assert checkpoint["checkpoint_ms"] == pytest.approx(1e3 * SLEEP)
    assert ids["exchange_ms"] >= 1e3 * SLEEP / 2  # sent ahead, outside forward
    assert caller["other_ms"] >= 1e3 * SLEEP / 2


def test_a_stopwatch_adds_up_intervals_and_resets() -> None:
    watch = Stopwatch(DEVICE)
    watch.add("a", 1.0, 1.5)
    watch.add("a", 3.0, 3.25)
    watch.add_seconds("b", 2.0)
    assert watch.take() == {"a": 0.75, "b": 2.0}
    assert watch.take() == {}


@pytest.mark.e2e
def test_a_run_records_the_times_of_its_parts(trained: TrainedRun) -> None:
    records = [json.loads(line) for line in (trained.path / "metrics.jsonl").read_text().splitlines()]
    timings = [record for record in records if record["split"] == "timing"]
    assert [record["step"] for record in timings] == [20, 40, 57]
    for found in (*timings, trained.result["timing"]):
        assert all(found[part] > 0 for part in (*PARTS[:4], "other_ms"))
        assert sum(found[part] for part in PARTS) == pytest.approx(found["step_ms"])
        assert found["slowest_host"] == socket.gethostname()
        assert [len(found[f"rank_{each}"]) for each in ("samples_per_s", "peak_memory_bytes")] == [2, 2]
    assert (trained.result["skipped_batches"], trained.result["rollbacks"]) == (0, 0)
