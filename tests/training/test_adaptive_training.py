"""Training with adaptive compression, its checkpoints and exports, as a user does it."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.embeddings.slot_layout import SlotLayout
from mlet_dist.models.build import build_training_model
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from mlet_dist.training.compressed_tables import compression_warnings, with_row_ranges
from tests.helpers.mlet_command import ROOT, error_line, mlet_json
from tests.helpers.train_in_ranks import Ranks, records, stopped_after, tensors, train_in_ranks

pytestmark = pytest.mark.e2e

_MODEL = f"/model/{TABLES_PREFIX}"
_CACHED = "sharding.compute_kernels=[fused,fused_uvm_caching]"
CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


@pytest.fixture(scope="module")
def settings(small_model: tuple[str, ...]) -> tuple[str, ...]:
    return (
        *small_model,
        "compression.policy=adaptive",
        "compression.budget=0.6",
        "compression.widths=[12,4]",
        "compression.interval=9",
        "optimizer.name=adagrad",
        "optimizer.learning_rate=0.05",
        "train.checkpoint_every=20",
        "train.keep_last=9",
    )


@pytest.fixture(scope="module")
def run(settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("adaptive") / "run"
    return path, mlet_json("train", CONFIG, *settings, f"run.dir={path}", "--nproc", 2)


def test_the_bytes_in_training_stay_within_the_budget(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    path, result = run
    single = result["single_layer_training_bytes"]
    assert 0.5 * single < result["training_bytes_peak"] <= 0.6 * single
    config = load_config(path / "config.yaml")
    assert _announced_bytes(config) == result["training_bytes_peak"]
    plan = mlet_json("plan", path / "config.yaml", "--world-size", 2)
    assert plan["compression"]["training_bytes"] == result["training_bytes_peak"]
    found = [record for record in records(path) if record["split"] == "compression"]
    assert found[-1]["moves"] > found[0]["moves"] > 0
    layout = _layout(path)
    slots = tensors(path, 57, tmp_path)[f"{_MODEL}row_slots.slots"].view(-1)[: layout.num_rows]
    for name, of_table in zip(layout.tables, slots.split(list(layout.num_embeddings)), strict=True):
        share = float((of_table >= 0).double().mean())
        assert result["kept_share"][name] == pytest.approx(share) == found[-1][f"kept_{name}"]
    stored = sum(layout.slots(pool) for pool in range(len(layout.pools)))
    assert len(slots[slots >= 0].unique()) == int((slots >= 0).sum()) <= stored


def test_the_export_has_the_rows_of_the_run_and_zeros(
    run: tuple[Path, dict[str, Any]], small_data: Path, tmp_path: Path
) -> None:
    path, result = run
    export = tmp_path / "export"
    made = mlet_json("export", path, "--out", export, "--outputs", "dcp", "int8-kept", "package")
    assert made["served_bytes"]["int8-kept"] < made["served_bytes"]["dcp"] / 2
    assert mlet_json("verify", export, "--run", path, "--data", small_data)["ok"] is True
    evaluated = mlet_json("evaluate", export, "--data", small_data)
    assert mlet_json("factorize", export, "--hidden-dim", 8, "--out", tmp_path / "factors")
    assert mlet_json("spectrum", export)["tables"]
    assert evaluated["logloss"] == pytest.approx(result["test_logloss"], abs=2e-6)
    trained, layout, spec = tensors(path, 57, tmp_path), _layout(path), ModelSpec.load(path / "model.json")
    dcp_to_torch_save(export / "model", tmp_path / "export.pt")
    served = torch.load(tmp_path / "export.pt")
    slots = trained[f"{_MODEL}row_slots.slots"].view(-1)[: layout.num_rows]
    for name, of_table in zip(layout.tables, slots.split(list(layout.num_embeddings)), strict=True):
        expected = torch.zeros(len(of_table), 4, dtype=torch.float64)
        first = 0
        for pool, number in zip(layout.pools, map(layout.slots, range(len(layout.pools))), strict=True):
            own = (of_table >= first) & (of_table < first + number)
            rows = trained[f"{_MODEL}embedding_bags.rows_{pool.width}x4.weight"]
            values = rows[of_table[own].long() - first].double()
            if pool.width != 4 and bool(own.any()):
                of_range = [width for _, width, _ in spec.row_ranges[name]].index(pool.width)
                values = values @ trained[f"{_MODEL}projections.{name}:{of_range}.weight"].double()
            if bool(own.any()):
                expected[own] = values
            first += number
        torch.testing.assert_close(
            served[f"{TABLES_PREFIX}embedding_bags.{name}.weight"].double(), expected, rtol=1e-5, atol=1e-6
        )


def test_a_resumed_run_is_bitwise_identical_and_other_ranks_continue_with_the_same_rows(
    run: tuple[Path, dict[str, Any]], settings: tuple[str, ...], small_data: Path, ranks: Ranks, tmp_path: Path
) -> None:
    path, result = run
    copy = stopped_after(40, path, tmp_path / "copy")
    resumed = mlet_json("train", copy / "config.yaml", f"run.dir={copy}", "--nproc", 2)
    assert resumed["first_step"] == 40
    assert resumed["weights_sha256"] == result["weights_sha256"]
    assert records(copy) == records(path)
    other = stopped_after(40, path, tmp_path / "other")
    continued = train_in_ranks(ranks, 4, *settings, f"run.dir={other}")
    assert continued["first_step"] == 40
    for size in (1, 3):
        found = mlet_json("evaluate", path, "--data", small_data, "--nproc", size)
        assert found["logloss"] == pytest.approx(result["test_logloss"], abs=2e-6)


@pytest.mark.parametrize(
    "parts",
    [
        ("compression.budget=0.9",),
        ("compression.budget=0.9", "compression.nested=false", "compression.chunks=3", "compression.widths=null"),
    ],
    ids=["rows", "chunks"],
)
def test_adam_on_a_cpu_resumes_bitwise_within_the_budget(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path, parts: tuple[str, ...]
) -> None:
    """Its rows have no fused kernel, and their state is an optimizer's that steps after backward."""
    adam = (*settings, *parts, "optimizer.name=adam", "optimizer.learning_rate=0.01")
    path = tmp_path / "run"
    result = train_in_ranks(ranks, 2, *adam, f"run.dir={path}")
    single = result["single_layer_training_bytes"]
    assert 0.8 * single < result["training_bytes_peak"] <= 0.9 * single
    assert _announced_bytes(load_config(path / "config.yaml")) == result["training_bytes_peak"]
    assert {width for of in ModelSpec.load(path / "model.json").row_ranges.values() for _, width, _ in of} >= {12, 4}
    assert [record for record in records(path) if record["split"] == "compression"][-1]["moves"] > 500
    resumed = train_in_ranks(ranks, 2, *adam, f"run.dir={stopped_after(40, path, tmp_path / 'same')}")
    assert resumed["first_step"] == 40
    assert resumed["weights_sha256"] == result["weights_sha256"]
    for size in (1, 4) if len(parts) == 1 else (1,):
        other = train_in_ranks(ranks, size, *adam, f"run.dir={stopped_after(40, path, tmp_path / str(size))}")
        assert other["first_step"] == 40
        assert other["training_bytes_peak"] == result["training_bytes_peak"]
        assert other["test_logloss"] == pytest.approx(result["test_logloss"], abs=2e-6)


def test_rows_never_get_more_columns_than_their_table_may_have(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    limits = ("compression.tables.C3.max_width=4", "compression.tables.C4.max_width=12", "compression.budget=0.9")
    train_in_ranks(ranks, 2, *settings, *limits, f"run.dir={path}")
    assert [record for record in records(path) if record["split"] == "compression"][-1]["moves"] > 500
    layout = _layout(path)
    slots = tensors(path, 57, tmp_path)[f"{_MODEL}row_slots.slots"].view(-1)[: layout.num_rows]
    rows = dict(zip(layout.tables, slots.split(list(layout.num_embeddings)), strict=True))
    assert [pool.width for pool in layout.pools] == [12, 4]
    narrow = layout.first_codes()[1]
    assert len(rows["C3"]) > 100
    assert int(((rows["C3"] >= 0) & (rows["C3"] < narrow)).sum()) == 0 < int((rows["C3"] >= narrow).sum())
    assert sum(int(((of_table >= 0) & (of_table < narrow)).sum()) for of_table in rows.values()) == layout.slots(0)


def test_settings_that_do_not_go_with_it_are_refused(settings: tuple[str, ...], tmp_path: Path) -> None:
    start = ("train", CONFIG, *settings, f"run.dir={tmp_path / 'run'}")
    for setting in (
        "compression.tables.C3.min_width=4",
        "sharding.compute_kernels=[fused,fused_uvm_caching]",
    ):
        message = error_line(*start, setting)
        assert "does not go with compression.policy adaptive" in message
        assert setting.partition("=")[0] in message


def _announced_bytes(config: Config) -> int:
    _, (line, *_) = with_row_ranges(ModelSpec.of(config, DatasetSchema.load(Path(config.data.path))), config)
    return int(line.removeprefix("compression  ").partition(" bytes in training")[0].replace(",", ""))


def _layout(run: Path) -> SlotLayout:
    meta = torch.device("meta")
    collection = build_training_model(ModelSpec.load(run / "model.json"), meta, dense_device=meta).sparse_arch
    return SlotLayout.of(collection.embedding_bag_collection.embedding_bag_configs())


def test_a_run_too_short_for_a_pass_is_warned_of(settings: tuple[str, ...], tmp_path: Path) -> None:
    spec = ModelSpec.of(*_config_and_schema(settings, tmp_path))
    assert compression_warnings(spec, 9) == []
    moving = dataclasses.replace(spec, adaptive={"warmup": 9})
    assert compression_warnings(moving, 10) == []
    (warning,) = compression_warnings(moving, 9)
    assert "the run has 9 steps" in warning


def _config_and_schema(settings: tuple[str, ...], tmp_path: Path) -> tuple[Config, DatasetSchema]:
    config = load_config(CONFIG, [*settings, f"run.dir={tmp_path}"])
    return config, DatasetSchema.load(Path(config.data.path))
