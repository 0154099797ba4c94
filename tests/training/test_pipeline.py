"""TorchRec's pipeline against the plain loop: the same bits, the same records, the same errors."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import distributed as dist
from torch.optim.lr_scheduler import LambdaLR
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.train_pipeline.runtime_forwards import PipelinedForward
from torchrec.optim.keyed import CombinedOptimizer

from mlet_dist.config import Config, load_config
from mlet_dist.data.loader import Batch, DataLoader
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.embeddings.sharding import ShardedMultiLayerEmbeddingBagCollection
from mlet_dist.models.dlrm import build_dlrm
from mlet_dist.models.spec import ModelSpec
from mlet_dist.progress import Progress
from mlet_dist.training.distributed import Worker
from mlet_dist.training.evaluation import evaluate, evaluation_loader
from mlet_dist.training.loop import take_all_steps
from mlet_dist.training.metrics import BinaryMetrics
from mlet_dist.training.optimizers import build_optimizer, fuse_row_optimizer, optimizer_state
from mlet_dist.training.pipeline import pipeline_pays, take_steps
from mlet_dist.training.recorder import Recorder
from mlet_dist.training.report import TrainingReport
from mlet_dist.training.run_directory import RunDirectory
from mlet_dist.training.schedule import learning_rate_factor
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.state import Training
from tests.command import ROOT, mlet, mlet_json
from tests.conftest import TrainedRun
from tests.ranks import RankPool, whole

Ranks = Callable[[int], RankPool]
CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
BATCHES_AN_EPOCH, STEPS = 10, 25
SETTINGS = (
    "data.batch_size=480",
    "train.epochs=3",
    f"train.max_steps={STEPS}",
    "train.log_every=4",
    "optimizer.warmup_steps=5",
    "optimizer.decay=linear",
)


class _Watch(Recorder):
    """A recorder that also notes whether the embeddings stand rewritten, in the middle of training."""

    def __init__(self, run: RunDirectory, enabled: bool, embeddings: torch.nn.Module) -> None:
        super().__init__(run, enabled)
        self.rewritten: list[bool] = []
        self._embeddings = embeddings

    def record(self, split: str, step: int, values: dict[str, float]) -> None:
        self.rewritten.append(_is_rewritten(self._embeddings))
        super().record(split, step, values)


def _is_rewritten(embeddings: torch.nn.Module) -> bool:
    return isinstance(embeddings.forward, PipelinedForward)


def _worker() -> Worker:
    return Worker(dist.get_rank(), dist.get_world_size(), dist.get_world_size(), torch.device("cpu"))


def _build(config: Config) -> tuple[DistributedModelParallel, torch.nn.Module, CombinedOptimizer]:
    """The model, the sharded collection within it, and the optimizer, as `mlet train` builds them."""
    spec = ModelSpec.of(config, DatasetSchema.load(Path(config.data.path)))
    model = build_dlrm(spec, torch.device("meta"))
    fuse_row_optimizer(model, config.optimizer)
    local_batch_size = config.data.batch_size // dist.get_world_size()
    sharded, _ = shard_model(model, _worker(), local_batch_size, config.sharding)
    (embeddings,) = (each for each in sharded.modules() if isinstance(each, ShardedMultiLayerEmbeddingBagCollection))
    return sharded, embeddings, build_optimizer(sharded, config.optimizer)


def _loader(config: Config) -> DataLoader:
    worker = _worker()
    return DataLoader(
        Path(config.data.path),
        "train",
        batch_size=config.data.batch_size,
        rank=worker.rank,
        world_size=worker.world_size,
        dense_features=None,
        sparse_features=None,
        drop_last=True,
    )


def _run(config: Config, directory: Path, pipelined: bool) -> dict[str, Any]:
    """What the trainer's loop leaves: weights, optimizer states, records and what an evaluation then finds."""
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, pipelined=pipelined))
    run, worker = RunDirectory(directory / f"pipelined {pipelined}"), _worker()
    run.path.mkdir(exist_ok=True)
    model, embeddings, optimizer = _build(config)
    with _Watch(run, worker.is_first, embeddings) as recorder:
        metrics = BinaryMetrics(worker.device, 1 << 16)
        training = Training(model, optimizer, metrics, steps=STEPS, batches_per_epoch=BATCHES_AN_EPOCH)
        schedule = LambdaLR(optimizer, learning_rate_factor(config.optimizer, STEPS))
        with Progress("train", STEPS, "steps", disable=True) as progress:
            report = TrainingReport(config, STEPS, progress, recorder, first_step=0)
            after_step = [lambda _: schedule.step(), report]
            take_all_steps(training, _loader(config), worker.device, after_step, pipelined=pipelined)
    records = [json.loads(line) for line in run.metrics.read_text().splitlines()] if worker.is_first else []
    assert all(record.pop("samples_per_s") > 0 for record in records)
    assert recorder.rewritten == [pipelined] * 7
    assert not _is_rewritten(embeddings)
    spec = ModelSpec.of(config, DatasetSchema.load(Path(config.data.path)))
    found = evaluate(model, evaluation_loader(Path(config.data.path), "valid", spec, 250, worker), worker, "valid")
    states = {name: {key: whole(each) for key, each in of.items()} for name, of in optimizer_state(optimizer).items()}
    weights = {name: whole(tensor) for name, tensor in model.state_dict().items()}
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
        (4, "rowwise_adagrad", "unique_rows"),
    ],
)
def test_both_loops_train_the_same_bits_over_epochs(
    ranks: Ranks, small_model: tuple[str, ...], tmp_path: Path, world_size: int, optimizer: str, exchange: str
) -> None:
    overrides = (*small_model, *SETTINGS, f"optimizer.name={optimizer}", f"sharding.exchange={exchange}")
    config = load_config(CONFIG, [*overrides, f"run.dir={tmp_path}", "optimizer.learning_rate=0.05"])
    plain, pipelined = ranks(world_size).run(_run_both, config, tmp_path)[0]
    assert [record["step"] for record in plain["records"]] == [4, 8, 12, 16, 20, 24, 25]
    assert len({record["learning_rate"] for record in plain["records"]}) == 7
    assert pipelined["records"] == plain["records"]
    assert pipelined["evaluation"] == plain["evaluation"]
    assert len([name for name in plain["weights"] if "embedding_bag_collection" in name]) == 26 + 26
    for name, tensor in plain["weights"].items():
        assert torch.equal(pipelined["weights"][name], tensor), name
    assert pipelined["states"].keys() == plain["states"].keys()
    assert bool(plain["states"]) == (optimizer != "sgd")
    for name, states in plain["states"].items():
        for key, tensor in states.items():
            assert torch.equal(pipelined["states"][name][key], tensor), (name, key)


def _meet_a_bad_batch(config: Config, bad_step: int, pipelined: bool) -> tuple[int, str]:
    """Steps taken before the error, and what it said."""

    def batches() -> Iterator[Batch]:
        for index, batch in enumerate(_loader(config)):
            if index == bad_step and dist.get_rank() == 1:
                batch.sparse.values()[0] = 10**6
            yield batch

    model, _, optimizer = _build(config)
    taken = 0
    try:
        for _ in take_steps(model, optimizer, batches(), torch.device("cpu"), pipelined=pipelined):
            taken += 1
    except ValueError as error:
        dist.barrier()  # nobody hangs, and the group can be used
        return taken, str(error)
    raise AssertionError(f"{taken} steps and no error")


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
def test_only_a_single_rank_on_a_cpu_has_nothing_to_do_ahead(device: str, world_size: int, expected: bool) -> None:
    assert pipeline_pays(Worker(0, world_size, world_size, torch.device(device))) is expected


@pytest.mark.e2e
def test_the_command_trains_the_same_run_in_the_plain_loop(trained: TrainedRun, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = mlet_json("train", CONFIG, *trained.overrides, f"run.dir={run}", "train.pipelined=false", "--nproc", 2)
    assert result["weights_sha256"] == trained.result["weights_sha256"]
    records = [
        [json.loads(line) | {"samples_per_s": None} for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (run, trained.path)
    ]
    assert records[0] == records[1]


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
    pq.write_table(table.set_column(index, "C9", [ids]).cast(table.schema), part)
    overrides = [each for each in trained.overrides if not each.startswith("data.path")]
    run = ("train.pipelined=true", f"data.path={data}", f"run.dir={tmp_path / 'run'}")
    done = mlet("train", CONFIG, *overrides, *run, "--nproc", 2, expect=2)
    (error,) = (line for line in done.stderr.splitlines() if line.startswith("mlet: error: "))
    assert part.name in error
    assert "C9" in error
    assert {line.split()[0] for line in done.stderr.splitlines()} <= {"plan", "train", "mlet:"}
