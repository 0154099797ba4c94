"""The fingerprint of the weights, and checkpoints, across numbers of ranks."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from mlet_dist.checkpoint.load import MODEL_KEY, OPTIMIZER_KEY, latest_checkpoint, load_model
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.checkpoint.writer import write_checkpoint
from mlet_dist.config.sections import ModelConfig, OptimizerConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.models.dlrm import RowsDtype, build_dlrm
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer, optimizer_state
from mlet_dist.training.process_group import Worker
from mlet_dist.training.sharding import shard_model
from mlet_dist.training.snapshot import weights_sha256
from tests.helpers.ranks import RankFailed, RankPool

pytestmark = pytest.mark.multirank

Ranks = Callable[[int], RankPool]
SIZES = {"uneven": 101, "tiny": 5, "two": 2}


def _spec(seed: int = 3, hidden_dim: int | None = 8, sizes: dict[str, int] = SIZES) -> ModelSpec:
    model = ModelConfig(embedding_dim=4, hidden_dim=hidden_dim, bottom_mlp=(6,), top_mlp=(6,))
    return ModelSpec(model, ("I1", "I2"), tuple(SparseFeature(name, n) for name, n in sizes.items()), seed)


def _worker() -> Worker:
    return Worker(dist.get_rank(), dist.get_world_size(), dist.get_world_size(), torch.device("cpu"))


def _fingerprint(spec: ModelSpec, block_bytes: int) -> str:
    import mlet_dist.training.snapshot

    mlet_dist.training.snapshot._BLOCK_BYTES = block_bytes
    model = build_dlrm(spec, tables_device=torch.device("meta"))
    fuse_row_optimizer(model, OptimizerConfig())
    return weights_sha256(shard_model(model, _worker(), 8)[0], torch.device("cpu"))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("block_bytes", [64 << 20, 200])
def test_the_fingerprint_does_not_depend_on_the_ranks(ranks: Ranks, world_size: int, block_bytes: int) -> None:
    expected = hashlib.sha256()
    state = build_dlrm(_spec(), tables_device=torch.device("cpu")).state_dict()
    for name in sorted(state):
        expected.update(f"{name} {state[name].dtype} {tuple(state[name].shape)}\n".encode())
        expected.update(state[name].numpy().tobytes())
    first, *others = ranks(world_size).run(_fingerprint, _spec(), block_bytes)
    assert first == expected.hexdigest()
    assert others == [""] * (world_size - 1)


def test_another_seed_or_shape_has_another_fingerprint(ranks: Ranks) -> None:
    prints = {ranks(2).run(_fingerprint, spec, 1 << 20)[0] for spec in (_spec(), _spec(seed=4), _spec(hidden_dim=12))}
    assert len(prints) == 3


def _save(directory: Path, rows_dtype: RowsDtype = "fp32") -> str:
    model = build_dlrm(_spec(), torch.device("meta"), rows_dtype)
    fuse_row_optimizer(model, OptimizerConfig(name="adagrad"))
    sharded = shard_model(model, _worker(), 8)[0]
    optimizer = build_optimizer(sharded, OptimizerConfig(name="adagrad"))
    state = {MODEL_KEY: sharded.state_dict(), OPTIMIZER_KEY: optimizer_state(optimizer)}
    write_checkpoint(CheckpointStore(directory).checkpoint(7), state, {})
    return weights_sha256(sharded, torch.device("cpu"))


def _load(directory: Path, spec: ModelSpec, rows_dtype: RowsDtype = "fp32") -> str:
    model = build_dlrm(spec, torch.device("meta"), rows_dtype)
    fuse_row_optimizer(model, OptimizerConfig())
    sharded = shard_model(model, _worker(), 8)[0]
    load_model(sharded, latest_checkpoint(CheckpointStore(directory)).location)
    return weights_sha256(sharded, torch.device("cpu"))


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
    model = build_dlrm(_spec(seed=99), torch.device("cpu"))
    load_model(model, latest_checkpoint(CheckpointStore(tmp_path)).location)
    single, loaded = build_dlrm(_spec(), torch.device("cpu")).state_dict(), model.state_dict()
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
    assert latest_checkpoint(CheckpointStore(tmp_path)).name == "step-00000007"
    with pytest.raises(UserError, match="no complete checkpoint"):
        latest_checkpoint(CheckpointStore(cut_short))
