import dataclasses
from typing import Any, get_args

import pytest
import torch

from mlet_dist.config.config_file import Config
from mlet_dist.config.model_section import ModelConfig, ModelName
from mlet_dist.config.sections import DataConfig, OptimizerConfig, RunConfig
from mlet_dist.data.schema import SparseFeature
from mlet_dist.errors import UserError
from mlet_dist.models.build import build_training_model
from mlet_dist.models.dense_memory import check_dense_memory, dense_parameters
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec

MODEL = ModelConfig(embedding_dim=4, hidden_dim=12, bottom_mlp=(8, 5), top_mlp=(7,))
FEATURES = tuple(SparseFeature(name, 10) for name in ("C1", "C2", "C3"))
CONFIG = Config(DataConfig("d", batch_size=4), RunConfig("r"), model=MODEL, optimizer=OptimizerConfig("adam"))


def spec_of(model: ModelConfig) -> ModelSpec:
    return ModelSpec(model, ("I1", "I2"), FEATURES, seed=0)


@pytest.mark.parametrize("hidden_dim", [12, None])
@pytest.mark.parametrize("bottom_mlp", [(), (8, 5)])
@pytest.mark.parametrize("name", get_args(ModelName))
def test_the_weights_are_those_of_the_model(
    name: ModelName, hidden_dim: int | None, bottom_mlp: tuple[int, ...]
) -> None:
    network = ModelConfig(name, cross_layers=2, cross_rank=3, fm_dim=5, query_features=("C2",))
    model = dataclasses.replace(network, embedding_dim=4, hidden_dim=hidden_dim, bottom_mlp=bottom_mlp, top_mlp=(7, 6))
    spec = spec_of(model)
    meta = torch.device("meta")
    state = build_training_model(spec, meta, dense_device=meta).state_dict()
    assert all(each.is_meta for each in state.values())
    rows = f"{TABLES_PREFIX}embedding_bags."
    expected = sum(value.numel() for name, value in state.items() if not name.startswith(rows))
    assert sum(dense_parameters(spec).values()) == expected


@pytest.mark.parametrize("name", ["dlrm_dcn", "two_tower"])
def test_tables_of_their_own_sizes_are_counted(name: ModelName) -> None:
    model = ModelConfig(name, embedding_dim=4, hidden_dim=12, cross_rank=3, query_features=("C2",), top_mlp=(7, 6))
    own = {"C1": (8, 20), "C2": (12, None)}
    settings = {
        table: dataclasses.replace(model.of_all_tables, embedding_dim=d, hidden_dim=k) for table, (d, k) in own.items()
    }
    spec = dataclasses.replace(spec_of(model), table_settings=settings)
    meta = torch.device("meta")
    state = build_training_model(spec, meta, dense_device=meta).state_dict()
    expected = sum(value.numel() for key, value in state.items() if f"{TABLES_PREFIX}embedding_bags." not in key)
    assert sum(dense_parameters(spec).values()) == expected


def test_layers_beyond_the_memory_name_the_setting_and_both_sizes() -> None:
    huge = spec_of(dataclasses.replace(MODEL, top_mlp=(10**9,)))
    weights = sum(dense_parameters(huge).values())
    with pytest.raises(UserError) as caught:
        check_dense_memory(CONFIG, huge, ranks=2, world_size=2, available=3 * 10**9, on_cuda=True)
    assert str(caught.value).startswith(
        f"model.top_mlp: the dense layers and W2 need at least {2 * 4 * weights / 1e9:,.2f} GB of memory for 2 ranks, "
        "most of it for model.top_mlp, and 3.00 GB are available here; use smaller layers"
    )


@pytest.mark.parametrize(
    ("network", "outputs"),
    [
        ({}, 8 + 5 + 7),
        ({"name": "two_tower", "query_features": ("C2",)}, 2 * 7),
        ({"builder": "own:build"}, 0),
    ],
)
def test_weights_gradients_states_and_activations_are_counted_on_a_cpu(network: dict[str, Any], outputs: int) -> None:
    spec = spec_of(dataclasses.replace(MODEL, **network))
    needed = 4 * 4 * sum(dense_parameters(spec).values()) + 2 * 4 * outputs * 4
    check_dense_memory(CONFIG, spec, ranks=1, world_size=1, available=needed, on_cuda=False)
    with pytest.raises(UserError, match="available here"):
        check_dense_memory(CONFIG, spec, ranks=1, world_size=1, available=needed - 1, on_cuda=False)


def test_a_batch_beyond_the_memory_is_named() -> None:
    wide = dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, batch_size=1 << 30))
    with pytest.raises(UserError, match=r"^data\.batch_size: "):
        check_dense_memory(wide, spec_of(MODEL), ranks=1, world_size=1, available=1 << 30, on_cuda=False)
