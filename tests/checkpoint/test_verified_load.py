"""A checkpoint is read once, verified, into any sharding, and rows that will be loaded are not drawn."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from mlet_dist.checkpoint.load import MODEL_KEY, OPTIMIZER_KEY, latest_unverified
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.checkpoint.verified_load import load_verified
from mlet_dist.checkpoint.writer import write_checkpoint
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.embeddings.initializers import RowInitializer
from mlet_dist.errors import UserError
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.fingerprint import weights_sha256
from mlet_dist.training.fused_optimizers import build_optimizer, fuse_row_optimizer, optimizer_state
from mlet_dist.training.process_group import Worker
from mlet_dist.training.sharding import shard_model
from tests.helpers.ranks import RankFailed, RankPool

pytestmark = pytest.mark.multirank

Ranks = Callable[..., RankPool]
SIZES = {"uneven": 1001, "tiny": 5, "other": 640}


def _state(seed: int, drawn: bool = True) -> tuple[Any, dict[str, Any], int]:
    """Return a sharded model, its state, and the rows of tables that were drawn."""
    rows = 0

    def counting(self: RowInitializer, start: int, count: int, dim: int) -> torch.Tensor:
        nonlocal rows
        rows += count if self.name in SIZES or "embedding_bags" in self.name else 0
        return draw(self, start, count, dim)

    draw = RowInitializer._draw
    config = ModelConfig(embedding_dim=4, hidden_dim=8, bottom_mlp=(6,), top_mlp=(6,))
    spec = ModelSpec(config, ("I1",), tuple(SparseFeature(name, n) for name, n in SIZES.items()), seed)
    model = build_training_model(spec, torch.device("meta"))
    settings = OptimizerConfig(name="adagrad")
    fuse_row_optimizer(model, settings)
    if not drawn:
        model.sparse_arch.embedding_bag_collection.leave_rows_undrawn()
    worker = Worker(dist.get_rank(), dist.get_world_size(), dist.get_world_size(), torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RowInitializer, "_draw", counting)
        sharded = shard_model(model, worker, 8)[0]
    optimizer = build_optimizer(sharded, settings)
    state = {MODEL_KEY: sharded.state_dict(), OPTIMIZER_KEY: optimizer_state(optimizer)}
    state["number"] = {"scalar": torch.tensor(float(seed))}
    return sharded, state, rows


def _save(directory: Path) -> tuple[str, int]:
    model, state, drawn = _state(seed=3)
    write_checkpoint(CheckpointStore(directory).checkpoint(7), state, {})
    return weights_sha256(model), drawn


def _load(directory: Path) -> tuple[str, int, int]:
    """Return the fingerprint after loading, the rows that were drawn, and the bytes that were read."""
    read = 0

    class Counting(io.BufferedReader):
        def readinto(self, out: Any) -> int:
            nonlocal read
            count = super().readinto(out)
            read += count
            return count

        def read(self, size: int | None = -1) -> bytes:
            nonlocal read
            found = super().read(size)
            read += len(found)
            return found

    model, state, drawn = _state(seed=99, drawn=False)
    found = latest_unverified(CheckpointStore(directory))
    assert found is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "open", lambda self, name: Counting(io.FileIO(f"{self.path}/{name}")))
        load_verified(state, found.checkpoint, found.manifest)
    assert state["number"]["scalar"] == 3
    model.load_state_dict(state[MODEL_KEY])
    return weights_sha256(model), drawn, read


@pytest.mark.parametrize(("saved_on", "loaded_on"), [(2, 2), (1, 4), (4, 1), (3, 2)])
def test_each_rank_reads_what_it_needs_once_and_draws_nothing(
    ranks: Ranks, tmp_path: Path, saved_on: int, loaded_on: int
) -> None:
    saved = ranks(saved_on).run(_save, tmp_path)
    assert sum(drawn for _, drawn in saved) > 0
    loaded = ranks(loaded_on).run(_load, tmp_path)
    assert {found for found, _, _ in loaded} == {saved[0][0]}
    assert [drawn for _, drawn, _ in loaded] == [0] * loaded_on
    sizes = CheckpointStore(tmp_path).checkpoint(7).sizes()
    # A file is one block here, so a rank reads a file whole, and at most once; it verifies .metadata besides.
    assert all(read <= sum(sizes.values()) for _, _, read in loaded)
    if saved_on == loaded_on:
        assert sum(read for _, _, read in loaded) <= sum(sizes.values()) * 2


def _refusal(directory: Path, rank: int) -> str:
    _, state, _ = _state(seed=99, drawn=False)
    store = CheckpointStore(directory)
    found = latest_unverified(store)
    assert found is not None
    if dist.get_rank() == rank:
        state["more"] = {"unknown": torch.zeros(3)}
    with pytest.raises(UserError) as error:
        load_verified(state, found.checkpoint, found.manifest)
    return str(error.value)


def test_errors_of_one_rank_are_those_of_all(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(_save, tmp_path)
    assert ranks(2).run(_refusal, tmp_path, 1) == [f"{tmp_path}/step-00000007: holds no tensor 'more.unknown'"] * 2
    file = tmp_path / "step-00000007" / "__1_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    (first, second) = ranks(2).run(_refusal, tmp_path, 9)
    assert first == second
    assert "__1_0.distcp is damaged: the block at byte 0 has checksum" in first
    file.write_bytes(content[:-1])
    with pytest.raises(RankFailed, match=r"no checkpoint is complete: .*__1_0\.distcp has .* bytes instead of"):
        ranks(2).run(_load, tmp_path)
