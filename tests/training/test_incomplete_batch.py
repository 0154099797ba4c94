"""All rows of an epoch weigh the same, those of an incomplete batch too, whatever part of them a rank has."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional
from torchrec import KeyedJaggedTensor

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.data.loading.loader import Batch, DataLoader
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.non_finite_guard import Guard
from mlet_dist.training.step import mean_loss, take_steps
from mlet_dist.training.timing import StepTimer
from tests.helpers.data_set_parts import replace_part, write_schema
from tests.helpers.mlet_command import ROOT, mlet_json
from tests.helpers.ranks import RankPool
from tests.helpers.small_run import loader, this_worker, training_of

Ranks = Callable[[int], RankPool]
CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
RATE = 0.5


@pytest.fixture(scope="module")
def lists_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training split of 244 rows, with lists, weights and tables of a few rows."""
    out = tmp_path_factory.mktemp("incomplete") / "data"
    lists = ("--multi-valued", "C3=3", "C9=0.5", "--weighted", "C3")
    mlet_json("synth", "--out", out, "--rows", 306, "--num-embeddings", 60, *lists)
    assert DatasetSchema.load(out).rows["train"] == 244
    return out


@pytest.fixture(scope="module")
def weighted_data(lists_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows with weights: a third of them 0, and all rows of the second batch of 48 on a rank of two."""
    out = Path(shutil.copytree(lists_data, tmp_path_factory.mktemp("weighted") / "data"))
    rng = np.random.default_rng(3)
    for part in sorted(out.glob("*/*.parquet")):
        table = pq.read_table(part)
        weights = rng.exponential(2, table.num_rows) * (rng.random(table.num_rows) > 1 / 3)
        weights[48:72] = 0
        table = table.append_column("sample_weight", pa.array(weights, pa.float32()))
        replace_part(out, str(part.relative_to(out)), table, row_group_size=50)
    write_schema(out, json.loads((out / "schema.json").read_text()) | {"sample_weight": True})
    return out


def config_of(data: Path, batch_size: int, *overrides: str) -> Config:
    small = ("model.bottom_mlp=[8]", "model.top_mlp=[8]", "model.embedding_dim=4", "model.hidden_dim=8")
    fixed = (f"data.path={data}", f"data.batch_size={batch_size}", f"optimizer.learning_rate={RATE}", "run.dir=unused")
    return load_config(CONFIG, [*small, *fixed, *overrides])


def _train(config: Config, pipelined: bool) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Return the rows of this rank's batches, and all weights of an epoch of SGD, gathered on every rank."""
    training, _ = training_of(config, steps=100)
    training.model.train()
    worker = this_worker()
    guard, batches = Guard(training, worker.device, "stop", 0), iter(loader(config))
    with StepTimer(training.model, worker.device, 1) as timer:
        outcomes = list(take_steps(training, batches, worker.device, guard, timer, pipelined=pipelined))
    weights = {}
    for name, tensor in training.model.state_dict().items():
        if hasattr(tensor, "local_shards"):
            full = torch.zeros(tensor.size())
            for shard in tensor.local_shards():
                (row, column), (rows, columns) = shard.metadata.shard_offsets, shard.metadata.shard_sizes
                full[row : row + rows, column : column + columns] = shard.tensor
            torch.distributed.all_reduce(full)
            tensor = full
        weights[name] = tensor.detach().clone()
    return [len(outcome[1]) for outcome in outcomes], weights


def _expected(config: Config) -> dict[str, torch.Tensor]:
    """Train in one process without sharding, by torch alone: SGD on the loss of each batch by its share of rows."""
    spec = ModelSpec.of(config, DatasetSchema.load(Path(config.data.path)))
    model = build_training_model(spec, torch.device("cpu"))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    alone = DataLoader(
        Path(config.data.path),
        "train",
        batch_size=config.data.batch_size,
        rank=0,
        world_size=1,
        dense_features=None,
        sparse_features=None,
    )
    for batch in alone:
        rows = batch.num_rows
        logits = model(batch.dense, batch.sparse).squeeze(-1)[:rows].double()
        optimizer.zero_grad()
        losses = functional.binary_cross_entropy_with_logits(logits, batch.labels[:rows].double(), reduction="none")
        weights = torch.ones(rows) if batch.weights is None else batch.weights[:rows]
        share = rows / min(config.data.batch_size, alone.rows)
        (losses.dot(weights.double()) / weights.double().sum() * share).backward()
        optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.mark.multirank
@pytest.mark.parametrize(
    ("world_size", "batch_size", "exchange", "last"),
    [
        (1, 48, "auto", [4]),
        (2, 72, "after", [28, 0]),
        (2, 240, "unique_rows", [4, 0]),
        (4, 96, "reduce_scatter", [24, 24, 4, 0]),
        (4, 400, "auto", [100, 100, 44, 0]),  # fewer rows than one batch
    ],
)
def test_all_rows_weigh_the_same_on_any_number_of_ranks(
    ranks: Ranks, lists_data: Path, world_size: int, batch_size: int, exchange: str, last: list[int]
) -> None:
    config = config_of(lists_data, batch_size, f"sharding.exchange={exchange}")
    expected = _expected(config)
    for pipelined in (False, True):
        found = ranks(world_size).run(_train, config, pipelined)
        assert [rows[-1] for rows, _ in found] == last
        assert sum(sum(rows) for rows, _ in found) == 244
        for name, weight in found[0][1].items():
            assert torch.allclose(weight.double(), expected[name].double(), rtol=1e-4, atol=2e-6), name


@pytest.mark.multirank
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 48), (2, 48), (4, 96)])
def test_ranks_train_on_the_weighted_mean_loss(
    ranks: Ranks, weighted_data: Path, lists_data: Path, world_size: int, batch_size: int
) -> None:
    config = config_of(weighted_data, batch_size)
    expected, unweighted = _expected(config), _expected(config_of(lists_data, batch_size))
    for pipelined in (False, True):
        found = ranks(world_size).run(_train, config, pipelined)[0][1]
        for name, weight in found.items():
            assert torch.allclose(weight.double(), expected[name].double(), rtol=1e-4, atol=4e-6), name
        name = "over_arch.model.1.weight"
        assert not torch.allclose(found[name].double(), unweighted[name].double(), rtol=1e-3, atol=1e-4)


def _mean_loss(weights: list[float]) -> tuple[float, list[float]]:
    """Return the loss of a row on each rank, and its gradient."""
    logits = torch.tensor([0.5], requires_grad=True)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    none = KeyedJaggedTensor.from_lengths_sync([], torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    batch = Batch(torch.zeros(1, 0), none, torch.ones(1), 1, world_size, torch.tensor([weights[rank]]))
    loss = mean_loss(logits, batch, world_size)
    loss.backward()
    assert logits.grad is not None
    return loss.item(), logits.grad.tolist()


@pytest.mark.multirank
@pytest.mark.parametrize("weight", [0.0, 1e-38, 1e38])
def test_weights_that_add_up_to_the_ends_of_float32(ranks: Ranks, weight: float) -> None:
    """Four times their inverse, or their sum, would be infinite in float32."""
    loss = functional.softplus(torch.tensor(-0.5)).item() if weight else 0.0
    gradient = -torch.sigmoid(torch.tensor(-0.5)).item() if weight else 0.0
    for found, of_logits in ranks(4).run(_mean_loss, [weight] * 4):
        assert found == pytest.approx(loss, rel=1e-5)
        assert of_logits == pytest.approx([gradient], rel=1e-5)
