"""The fingerprint of the weights is that of the full tensors, for any number of ranks and any sharding."""

import hashlib
from collections.abc import Callable

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, ShardMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties

from mlet_dist.config.model_section import ModelConfig
from mlet_dist.config.sections import OptimizerConfig
from mlet_dist.config.sharding_section import ShardingConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.models.build import RowsDtype, build_training_model
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training import fingerprint
from mlet_dist.training.fingerprint import weights_sha256
from mlet_dist.training.fused_optimizers import fuse_row_optimizer
from mlet_dist.training.process_group import Worker
from mlet_dist.training.sharding import shard_model
from tests.helpers.ranks import RankPool

pytestmark = pytest.mark.multirank

Ranks = Callable[..., RankPool]
SIZES = {"uneven": 101, "tiny": 5, "two": 2, "one": 1, "larger": 1003}
ROWS_FOR_ALL = {"uneven": 101, "larger": 1003, "twelve": 12}  # as row-wise tables need


def _spec(seed: int = 3, hidden_dim: int | None = 8, sizes: dict[str, int] = SIZES) -> ModelSpec:
    model = ModelConfig(embedding_dim=4, hidden_dim=hidden_dim, bottom_mlp=(6,), top_mlp=(6,))
    return ModelSpec(model, ("I1", "I2"), tuple(SparseFeature(name, n) for name, n in sizes.items()), seed)


def reference(state: dict[str, torch.Tensor], block_bytes: int) -> str:
    """Return what the fingerprint of full tensors must be."""
    found = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        rows = tensor.reshape(len(tensor) if tensor.dim() else 1, torch.Size(tensor.shape[1:]).numel())
        step = max(1, block_bytes // (rows.shape[1] * rows.element_size()))
        for start in range(0, len(rows), step):
            found.update(hashlib.sha256(rows[start : start + step].contiguous().numpy().tobytes()).digest())
    return found.hexdigest()


def _fingerprint(
    spec: ModelSpec, block_bytes: int, sharding: str | None = None, rows_dtype: RowsDtype = "fp32"
) -> tuple[str, int]:
    """Return the fingerprint, and the bytes that this rank sent to other ranks for blocks on borders."""
    model = build_training_model(spec, torch.device("meta"), rows_dtype)
    fuse_row_optimizer(model, OptimizerConfig())
    worker = Worker(
        dist.get_rank(),
        dist.get_world_size(),
        dist.get_world_size() // (2 if sharding == "nodes" else 1),
        torch.device("cpu"),
    )
    config = ShardingConfig()
    if sharding is not None:
        kind = "table_row_wise" if sharding == "nodes" else sharding
        config = ShardingConfig(sharding_types=(kind,), data_parallel_up_to_mb=0 if kind != "data_parallel" else 16)
    sharded = shard_model(model, worker, 8, config)[0]
    return _counted(sharded, block_bytes)


def _counted(model: nn.Module, block_bytes: int) -> tuple[str, int]:
    sent = 0

    def all_to_all(received: torch.Tensor, pieces: torch.Tensor, sizes: list[int], own: list[int]) -> None:
        nonlocal sent
        sent += sum(own) - own[dist.get_rank()]
        original(received, pieces, sizes, own)

    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("point-to-point")

    original = dist.all_to_all_single
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "_BLOCK_BYTES", block_bytes)
        patch.setattr(dist, "all_to_all_single", all_to_all)
        patch.setattr(dist, "send", refused)
        patch.setattr(dist, "recv", refused)
        return weights_sha256(model), sent


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("block_bytes", [1 << 20, 200, 1])
def test_it_does_not_depend_on_the_ranks(ranks: Ranks, world_size: int, block_bytes: int) -> None:
    expected = reference(build_training_model(_spec(), tables_device=torch.device("cpu")).state_dict(), block_bytes)
    found = ranks(world_size).run(_fingerprint, _spec(), block_bytes)
    assert [each for each, _ in found] == [expected] * world_size


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise", "table_row_wise", "nodes", "data_parallel"])
@pytest.mark.parametrize("rows_dtype", ["fp32", "fp16"])
def test_it_does_not_depend_on_the_sharding(ranks: Ranks, sharding: str, rows_dtype: RowsDtype) -> None:
    spec = _spec(sizes=ROWS_FOR_ALL)
    model = build_training_model(spec, tables_device=torch.device("cpu"))
    state = model.state_dict()
    if rows_dtype == "fp16" and sharding != "data_parallel":  # these stay float32
        state = {name: each.half() if ".embedding_bags." in name else each for name, each in state.items()}
    elif rows_dtype == "fp16":
        state = {name: each.half().float() if ".embedding_bags." in name else each for name, each in state.items()}
    pool = ranks(4, 2) if sharding == "nodes" else ranks(4)
    found = pool.run(_fingerprint, spec, 200, sharding, rows_dtype)
    assert [each for each, _ in found] == [reference(state, 200)] * 4
    # A rank sends at most one block on each border of its rows.
    assert max(sent for _, sent in found) <= 2 * len(SIZES) * 200
    assert (sharding in ("table_wise", "data_parallel")) <= (max(sent for _, sent in found) == 0)


def test_another_seed_or_shape_has_another_fingerprint(ranks: Ranks) -> None:
    prints = {ranks(2).run(_fingerprint, spec, 1 << 20)[0] for spec in (_spec(), _spec(seed=4), _spec(hidden_dim=12))}
    assert len(prints) == 3


class _Given(nn.Module):
    def __init__(self, state: dict[str, torch.Tensor | ShardedTensor]) -> None:
        super().__init__()
        self._state = state

    def state_dict(self, *args: object, **kwargs: object) -> dict[str, torch.Tensor | ShardedTensor]:  # type: ignore[override]
        return self._state


def full(rows: int, columns: int) -> torch.Tensor:
    return torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns) * 7


def _cut(rows: int, columns: int, by_row: list[int], by_column: list[int], block_bytes: int) -> str:
    """Return the fingerprint of a tensor cut at these rows and columns, whose parts are dealt to the ranks."""
    whole, rank, world = full(rows, columns), dist.get_rank(), dist.get_world_size()
    places = [
        ([top, left], [bottom - top, right - left])
        for top, bottom in zip([0, *by_row], [*by_row, rows], strict=True)
        for left, right in zip([0, *by_column], [*by_column, columns], strict=True)
    ]
    metadata = [
        ShardMetadata(offsets, sizes, placement=f"rank:{(number + 1) % world}/cpu")
        for number, (offsets, sizes) in enumerate(places)
    ]
    local = [
        Shard(
            whole[offsets[0] : offsets[0] + sizes[0], offsets[1] : offsets[1] + sizes[1]].contiguous(),
            metadata[number],
        )
        for number, (offsets, sizes) in enumerate(places)
        if (number + 1) % world == rank
    ]
    of_all = ShardedTensorMetadata(metadata, whole.size(), TensorProperties(dtype=whole.dtype))
    sharded = ShardedTensor._init_from_local_shards_and_global_metadata(local, of_all)
    return _counted(_Given({"w": sharded, "scalar": torch.tensor(3.5), "none": torch.empty(0, 4)}), block_bytes)[0]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("by_row", "by_column"),
    [([], []), ([50], []), ([1, 2, 3, 99], []), ([], [1, 3]), ([], [4]), ([10, 64], [2]), ([0, 100], [])],
)
@pytest.mark.parametrize("block_bytes", [100, 1 << 20])
def test_parts_may_be_cut_anywhere(
    ranks: Ranks, world_size: int, by_row: list[int], by_column: list[int], block_bytes: int
) -> None:
    expected = reference({"w": full(100, 5), "scalar": torch.tensor(3.5), "none": torch.empty(0, 4)}, block_bytes)
    assert ranks(world_size).run(_cut, 100, 5, by_row, by_column, block_bytes) == [expected] * world_size
