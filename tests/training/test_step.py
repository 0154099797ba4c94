"""TorchRec's pipeline and the plain loop: bitwise identical weights, the same records, the same errors."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import distributed as dist
from torchrec.distributed.train_pipeline.runtime_forwards import PipelinedForward

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.data.loading.loader import Batch
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.models.spec import ModelSpec
from mlet_dist.progress import Progress
from mlet_dist.training.evaluation import evaluate, evaluation_loader
from mlet_dist.training.fused_optimizers import optimizer_state
from mlet_dist.training.non_finite_guard import Guard
from mlet_dist.training.process_group import Worker
from mlet_dist.training.reporting import Recorder, TrainingReport
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.schedule import LearningRates
from mlet_dist.training.step import pipeline_is_faster, take_steps
from mlet_dist.training.timing import StepTimer
from mlet_dist.training.trainer import take_all_steps
from tests.conftest import TrainedRun
from tests.helpers.data_set_parts import replace_part
from tests.helpers.mlet_command import ROOT, mlet, mlet_json
from tests.helpers.ranks import RankPool
from tests.helpers.small_run import BATCHES_AN_EPOCH, loader, local, this_worker, training_of
from tests.helpers.small_run import SETTINGS as SMALL

Ranks = Callable[[int], RankPool]
CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
STEPS = 25
SETTINGS = (*SMALL, f"train.max_steps={STEPS}")


class _Watch(Recorder):
    """A recorder that also notes whether the pipeline has rewritten the embeddings during training."""

    def __init__(self, run: RunDirectory, enabled: bool, embeddings: torch.nn.Module) -> None:
        super().__init__(run, enabled)
        self.rewritten: list[bool] = []
        self._embeddings = embeddings

    def record(self, split: str, step: int, values: Mapping[str, float | str]) -> None:
        if split == "train":
            self.rewritten.append(_is_rewritten(self._embeddings))
        super().record(split, step, values)


def _is_rewritten(embeddings: torch.nn.Module) -> bool:
    return isinstance(embeddings.forward, PipelinedForward)


def _run(config: Config, directory: Path, pipelined: bool) -> dict[str, Any]:
    """Return weights, optimizer states and records after the trainer's loop, and the metrics of an evaluation."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, pipelined=pipelined))
    run, worker = RunDirectory(directory / f"pipelined {pipelined}"), this_worker()
    run.path.mkdir(exist_ok=True)
    training, embeddings = training_of(config, STEPS)
    guard, local_batch_size = Guard(training, worker.device, "stop", 0), config.data.batch_size // worker.world_size
    with (
        _Watch(run, worker.is_first, embeddings) as recorder,
        Progress("train", STEPS, "steps", disable=True) as progress,
        StepTimer(training.model, worker.device, local_batch_size) as timer,
    ):
        report = TrainingReport(config, training, progress, recorder, guard, timer)
        rates = LearningRates(config.optimizer, training)
        steps = (training, loader(config), worker.device, guard, timer, [rates, report])
        take_all_steps(*steps, pipelined=pipelined)
    model, optimizer = training.model, training.optimizer
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()] if worker.is_first else []
    timings = [record for record in records if record["split"] == "timing"]
    records = [record for record in records if record["split"] != "timing"]
    assert [record["step"] for record in timings] == [record["step"] for record in records]
    assert all(record.pop("samples_per_s") > 0 for record in records)
    assert recorder.rewritten == [pipelined] * 6 + [False]  # after the last step the model may be evaluated
    assert not _is_rewritten(embeddings)
    spec = ModelSpec.of(config, DatasetSchema.load(Path(config.data.path)))
    found = evaluate(model, evaluation_loader(Path(config.data.path), "valid", spec, 250, worker), worker, "valid")
    states = {name: {key: local(each) for key, each in of.items()} for name, of in optimizer_state(optimizer).items()}
    weights = {name: local(tensor) for name, tensor in model.state_dict().items()}
    return {"weights": weights, "states": states, "records": records, "evaluation": found}


def _run_both(config: Config, directory: Path) -> list[dict[str, Any]]:
    return [_run(config, directory, pipelined) for pipelined in (False, True)]


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("world_size", "optimizer", "exchange"),
    [
        (1, "adagrad", "auto"),
        (2, "sgd", "after"),
        (2, "adagrad", "reduce_scatter"),
        (2, "adam", "unique_rows"),
        (2, "rowwise_adagrad", "unique_rows"),
    ],
)
def test_both_loops_train_bitwise_identical_weights_over_epochs(
    ranks: Ranks, small_model: tuple[str, ...], tmp_path: Path, world_size: int, optimizer: str, exchange: str
) -> None:
    overrides = (*small_model, *SETTINGS, f"optimizer.name={optimizer}", f"sharding.exchange={exchange}")
    config = load_config(CONFIG, [*overrides, f"run.dir={tmp_path}", "optimizer.learning_rate=0.05"])
    every = ranks(world_size).run(_run_both, config, tmp_path)
    plain, pipelined = every[0]
    assert [record["step"] for record in plain["records"]] == [4, 8, 12, 16, 20, 24, 25]
    assert len({record["learning_rate"] for record in plain["records"]}) == 7
    assert pipelined["records"] == plain["records"]
    assert pipelined["evaluation"] == plain["evaluation"]
    assert len([name for name in plain["weights"] if "embedding_bag_collection" in name]) == 26 + 26
    for plain, pipelined in every:
        for name, tensor in plain["weights"].items():
            assert torch.equal(pipelined["weights"][name], tensor), name
        assert pipelined["states"].keys() == plain["states"].keys()
        assert bool(plain["states"]) == (optimizer != "sgd")
        for name, states in plain["states"].items():
            for key, tensor in states.items():
                assert torch.equal(pipelined["states"][name][key], tensor), (name, key)


def _meet_a_bad_batch(config: Config, bad_step: int, pipelined: bool) -> tuple[int, str]:
    """Return the number of steps before the error, and its message."""

    def batches() -> Iterator[Batch]:
        for index, batch in enumerate(loader(config)):
            if index == bad_step and dist.get_rank() == 1:
                batch.sparse.values()[0] = 10**6
            yield batch

    training, _ = training_of(config, STEPS)
    guard, device = Guard(training, torch.device("cpu"), "stop", 0), torch.device("cpu")
    try:
        with StepTimer(training.model, device, 1) as timer:
            for _ in take_steps(training, batches(), device, guard, timer, pipelined=pipelined):
                pass
    except ValueError as error:
        dist.barrier()  # nobody hangs, and the group can be used
        return training.step, str(error)
    raise AssertionError(f"{training.step} steps and no error")


@pytest.mark.multirank
@pytest.mark.parametrize("bad_step", [0, 1, 4, BATCHES_AN_EPOCH - 1])
def test_a_bad_batch_stops_both_loops_before_the_same_step(
    ranks: Ranks, small_model: tuple[str, ...], bad_step: int
) -> None:
    config = load_config(CONFIG, [*small_model, *SETTINGS, "run.dir=unused"])
    for pipelined in (False, True):
        others, own = ranks(2).run(_meet_a_bad_batch, config, bad_step, pipelined)
        assert own[1].startswith("table 'C1': feature 'C1': id 1000000 is outside [0, ")
        assert others[1].startswith("rank 1: table 'C1': feature 'C1': an id is outside [0, ")
        assert own[0] == others[0] == bad_step


@pytest.mark.parametrize(
    ("device", "world_size", "expected"), [("cpu", 1, False), ("cpu", 2, True), ("cuda", 1, True), ("cuda", 8, True)]
)
def test_the_pipeline_is_faster_except_on_a_single_cpu_rank(device: str, world_size: int, expected: bool) -> None:
    assert pipeline_is_faster(Worker(0, world_size, world_size, torch.device(device))) is expected


@pytest.mark.e2e
def test_the_command_trains_the_same_run_in_the_plain_loop(trained: TrainedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = mlet_json("train", CONFIG, *trained.overrides, f"run.dir={run}", "train.pipelined=false", "--nproc", 2)
    assert result["weights_sha256"] == trained.result["weights_sha256"]
    records = [
        [json.loads(line) | {"samples_per_s": None} for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run, trained.path)
    ]
    said = [[record for record in each if record["split"] != "timing"] for each in records]
    assert said[0] == said[1]


@pytest.mark.e2e
def test_an_unreadable_batch_of_one_rank_is_one_line_in_the_pipeline(trained: TrainedRun, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for path in trained.data.rglob("*"):
        if path.is_file():
            target = data / path.relative_to(trained.data)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    part = next((data / "train").iterdir())
    table = pq.read_table(part)
    ids = table.column("C9").to_pylist()
    ids[64 * 10 + 40] = 4321  # in the second half of the eleventh batch
    index = table.schema.get_field_index("C9")
    replace_part(data, f"train/{part.name}", table.set_column(index, "C9", [ids]).cast(table.schema))
    overrides = [each for each in trained.overrides if not each.startswith("data.path")]
    run = ("train.pipelined=true", f"data.path={data}", f"run.dir={tmp_path / 'run'}")
    done = mlet("train", CONFIG, *overrides, *run, "--nproc", 2, expect=2)
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("mlet: error: "))
    assert part.name in error
    assert "C9" in error
    assert {line.split()[0] for line in done.stderr.splitlines()} <= {"plan", "train", "mlet:"}
