"""Checkpoints across numbers of ranks."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from mlet_dist.checkpoint.load import MODEL_KEY, OPTIMIZER_KEY, latest_finished, load_model
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.checkpoint.writer import write_checkpoint
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.models.build import RowsDtype, build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.fingerprint import weights_sha256
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer, optimizer_state
from mlet_dist.training.process_group import Worker
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.snapshot import seed_random_state
from tests.helpers.ranks import RankFailed, RankPool

pytestmark = pytest.mark.multirank

Ranks = Callable[[int], RankPool]
SIZES = {"uneven": 101, "tiny": 5, "two": 2}


def _spec(seed: int = 3, sizes: dict[str, int] = SIZES) -> ModelSpec:
    model = ModelConfig(embedding_dim=4, hidden_dim=8, bottom_mlp=(6,), top_mlp=(6,))
    return ModelSpec(model, ("I1", "I2"), tuple(SparseFeature(name, n) for name, n in sizes.items()), seed)


def _worker() -> Worker:
    return Worker(dist.get_rank(), dist.get_world_size(), dist.get_world_size(), torch.device("cpu"))


def _save(directory: Path, rows_dtype: RowsDtype = "fp32") -> str:
    model = build_training_model(_spec(), torch.device("meta"), rows_dtype)
    fuse_row_optimizer(model, OptimizerConfig(name="adagrad"))
    sharded = shard_model(model, _worker(), 8)[0]
    optimizer = build_optimizer(sharded, OptimizerConfig(name="adagrad"))
    state = {MODEL_KEY: sharded.state_dict(), OPTIMIZER_KEY: optimizer_state(optimizer)}
    write_checkpoint(CheckpointStore(directory).checkpoint(7), state, {})
    return weights_sha256(sharded)


def _load(directory: Path, spec: ModelSpec, rows_dtype: RowsDtype = "fp32") -> str:
    model = build_training_model(spec, torch.device("meta"), rows_dtype)
    fuse_row_optimizer(model, OptimizerConfig())
    sharded = shard_model(model, _worker(), 8)[0]
    load_model(sharded, latest_finished(CheckpointStore(directory))[0].location)
    return weights_sha256(sharded)


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 3), (4, 1), (1, 4)])
def test_a_checkpoint_loads_on_any_number_of_ranks(ranks: Ranks, tmp_path: Path, saved_on: int, loaded_on: int) -> None:
    saved = ranks(saved_on).run(_save, tmp_path)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]
    assert ranks(loaded_on).run(_load, tmp_path, _spec(seed=99))[0] == saved


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 1), (4, 2), (1, 4)])
def test_a_checkpoint_of_half_rows_loads_on_any_number_of_ranks(
    ranks: Ranks, tmp_path: Path, saved_on: int, loaded_on: int
) -> None:
    saved = ranks(saved_on).run(_save, tmp_path, "fp16")[0]
    ranks(loaded_on).run(_load, tmp_path, _spec(seed=99), "fp16")
    assert ranks(saved_on).run(_load, tmp_path, _spec(seed=99), "fp16")[0] == saved
    # Into float32, as `mlet verify` and `mlet evaluate` do: the rounded initial values.
    model = build_training_model(_spec(seed=99), torch.device("cpu"))
    load_model(model, latest_finished(CheckpointStore(tmp_path))[0].location)
    single, loaded = build_training_model(_spec(), torch.device("cpu")).state_dict(), model.state_dict()
    for name, tensor in loaded.items():
        expected = single[name].half().float() if ".embedding_bags." in name else single[name]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, expected), name


def test_a_checkpoint_of_another_shape_names_the_tensor(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(_save, tmp_path)
    with pytest.raises(
        RankFailed, match=r"UserError.*\.uneven\.weight' is \(101, 8\) in the checkpoint and \(102, 8\)"
    ):
        ranks(2).run(_load, tmp_path, _spec(sizes=SIZES | {"uneven": 102}))
    renamed = {"uneven": 101, "tiny": 5, "other": 2}
    with pytest.raises(RankFailed, match=r"UserError.*holds no tensor .*embedding_bags\.other\.weight"):
        ranks(2).run(_load, tmp_path, _spec(sizes=renamed))


def test_an_incomplete_checkpoint_is_ignored(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(_save, tmp_path)
    cut_short = tmp_path / "step-00000008"
    cut_short.mkdir()
    for name in (".incomplete", ".metadata", "__0_0.distcp"):
        (cut_short / name).touch()
    assert latest_finished(CheckpointStore(tmp_path))[0].name == "step-00000007"
    with pytest.raises(UserError, match="no complete checkpoint"):
        latest_finished(CheckpointStore(cut_short))


def _draws(seed: int) -> list[float]:
    seed_random_state(seed)
    return torch.rand(4).tolist()


def test_every_rank_and_seed_draws_other_random_numbers(ranks: Ranks) -> None:
    found = [*ranks(2).run(_draws, 0), *ranks(2).run(_draws, 1)]
    assert len({tuple(each) for each in found}) == 4
    assert ranks(2).run(_draws, 1) == found[2:]
