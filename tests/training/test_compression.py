"""Training with static compression, its checkpoints, exports and metrics, as a user does it."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mlet_dist.config.config_file import Config, load_config
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.export.row_blocks import read_blocks
from mlet_dist.export.source import Tables
from mlet_dist.export.spectrum.run_spectrum import spectrum_of
from mlet_dist.export.spectrum.singular_values import balance
from mlet_dist.export.spectrum.spectrum_page import html_page
from mlet_dist.export.spectrum.spectrum_report import report
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from mlet_dist.training.compressed_tables import shared_row_ranges, with_row_ranges
from tests.helpers.mlet_command import ROOT, error_line, mlet_json
from tests.helpers.rows_by_id import model_by_id
from tests.helpers.tables import PLAIN, prepare_table
from tests.helpers.train_in_ranks import Ranks, stopped_after, train_in_ranks

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"


@pytest.fixture(scope="module")
def settings(small_model: tuple[str, ...]) -> tuple[str, ...]:
    return (*small_model, "compression.policy=static", "compression.budget=0.6", "compression.widths=[12,4]")


@pytest.fixture(scope="module")
def run(settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    path = tmp_path_factory.mktemp("compressed") / "run"
    adagrad = ("optimizer.name=adagrad", "optimizer.learning_rate=0.05", "train.checkpoint_every=20")
    return path, mlet_json("train", CONFIG, *settings, *adagrad, "train.keep_last=9", f"run.dir={path}", "--nproc", 2)


def test_the_bytes_in_training_stay_within_the_budget(run: tuple[Path, dict[str, Any]]) -> None:
    path, result = run
    single = result["single_layer_training_bytes"]
    assert 0.55 * single < result["training_bytes_peak"] <= 0.6 * single
    spec = ModelSpec.load(path / "model.json")
    assert single == sum(table.num_embeddings for table in spec.tables) * 4 * 2 * 4
    kept = {
        name: sum(rows for rows, width, _ in ranges if width) / sum(rows for rows, _, _ in ranges)
        for name, ranges in spec.row_ranges.items()
    }
    assert result["kept_share"] == kept
    assert min(kept.values()) < 1


def test_the_export_has_the_rows_of_the_run_and_shared_ones(
    run: tuple[Path, dict[str, Any]], small_data: Path, tmp_path: Path
) -> None:
    path, result = run
    export = tmp_path / "export"
    mlet_json("export", path, "--out", export, "--outputs", "dcp", "int8", "package")
    assert mlet_json("verify", export, "--run", path, "--data", small_data)["ok"] is True
    evaluated = mlet_json("evaluate", export, "--data", small_data)
    assert evaluated["logloss"] == pytest.approx(result["test_logloss"], abs=2e-6)
    (checkpoint,) = sorted((path / "checkpoints").iterdir())[-1:]
    dcp_to_torch_save(checkpoint, tmp_path / "run.pt")
    dcp_to_torch_save(export / "model", tmp_path / "export.pt")
    trained, served = torch.load(tmp_path / "run.pt")["model"], torch.load(tmp_path / "export.pt")
    trained = model_by_id(trained, ModelSpec.load(path / "model.json"))
    offsets: dict[int, int] = {}
    for name, ranges in ModelSpec.load(path / "model.json").row_ranges.items():
        first, whole = 0, served[f"{TABLES_PREFIX}embedding_bags.{name}.weight"]
        for index, (rows, width, _) in enumerate(ranges):
            expected = torch.zeros(rows, 4, dtype=torch.float64)
            if width:
                pool = trained[f"{TABLES_PREFIX}embedding_bags.rows_{width}x4.weight"]
                expected = pool[(start := offsets.get(width, 0)) : start + rows].double()
                offsets[width] = start + rows
            if width not in (0, 4):
                expected = expected @ trained[f"{TABLES_PREFIX}projections.{name}:{index}.weight"].double()
            if not width:
                assert ranges[index - 1][0] == 1
                expected = whole[first - 1].double().expand(rows, -1)  # the row that they share
            torch.testing.assert_close(whole[first : first + rows].double(), expected, rtol=1e-5, atol=1e-6)
            first += rows


def test_the_spectrum_describes_each_range(run: tuple[Path, dict[str, Any]]) -> None:
    path, _ = run
    result = spectrum_of(path)
    ranges, several = ModelSpec.load(path / "model.json").row_ranges, 0
    with Tables.open(path) as source:
        for found in result["tables"]:
            table, of_table = source.tables[found["name"]], ranges[found["name"]]
            assert [(each["rows"], each["hidden_dim"]) for each in found["row_ranges"]] == [
                each[:2] for each in of_table
            ]
            assert found["hidden_dim"] == max(width for _, width, _ in of_table)
            assert found["gains"] is found["balance"] is None
            assert table.projection is not None
            rows = torch.cat([block for _, block in read_blocks(table)])
            expected = torch.linalg.svdvals(rows @ table.projection.double())
            values = torch.tensor(found["plain"]["singular_values"], dtype=torch.float64)
            torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-7 * float(expected[0]))
            first = column = 0
            for each, (number, width, _) in zip(found["row_ranges"], of_table, strict=True):
                if width == 12:
                    w1, w2 = rows[first : first + number, column : column + 12], table.projection[column : column + 12]
                    assert each["gains"]["mean"] == pytest.approx(float(w2.double().square().sum()) / 4)
                    assert each["balance"] == pytest.approx(balance(w1.T @ w1, w2), rel=1e-9)
                    several += len(of_table) > 1
                else:
                    assert each["gains"] is each["balance"] is None
                first, column = first + number, column + width
    assert several
    shown = {name: "/".join(str(width) for _, width, _ in of_table) for name, of_table in ranges.items()}
    lines = [line.split() for line in report(result).splitlines()]
    assert {cells[0]: cells[2] for cells in lines if cells and cells[0] in shown} == shown
    assert f"k = {shown['C3']}<" in html_page(result)


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adam"])
def test_the_ranks_change_nothing_but_rounding(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path, optimizer: str
) -> None:
    rates = (f"optimizer.name={optimizer}", "optimizer.learning_rate=0.05", "data.batch_size=60")
    sizes = (1, 2, 3) if optimizer == "sgd" else (1, 3)
    found = {size: train_in_ranks(ranks, size, *settings, *rates, f"run.dir={tmp_path / str(size)}") for size in sizes}
    for result in found.values():
        assert result["test_logloss"] == pytest.approx(found[1]["test_logloss"], abs=5e-6)
        assert result["training_bytes_peak"] == found[1]["training_bytes_peak"]


def test_a_resumed_run_is_bitwise_identical_and_other_ranks_continue_it(
    run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path, result = run
    copy = stopped_after(40, path, tmp_path / "copy")
    resumed = mlet_json("train", copy / "config.yaml", f"run.dir={copy}", "--nproc", 2)
    assert resumed["first_step"] == 40
    assert resumed["weights_sha256"] == result["weights_sha256"]
    other = stopped_after(40, path, tmp_path / "other")
    alone = mlet_json("train", other / "config.yaml", f"run.dir={other}")
    assert alone["test_logloss"] == pytest.approx(result["test_logloss"], abs=1e-5)


def test_another_budget_is_another_run(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    copy = stopped_after(40, run[0], tmp_path / "copy")
    message = error_line("train", copy / "config.yaml", f"run.dir={copy}", "compression.budget=0.5")
    assert "compression.budget" in message
    assert "0.6" in message


def test_a_budget_in_bytes_and_limits_of_tables(ranks: Ranks, settings: tuple[str, ...], tmp_path: Path) -> None:
    limits = ("compression.tables.C3.min_width=4", "compression.tables.C4={min_width: 4, max_width: 4}")
    overrides = [*settings, *limits, "compression.budget=24KB", "train.max_steps=3", f"run.dir={tmp_path / 'run'}"]
    found = train_in_ranks(ranks, 2, *overrides)
    single = found["single_layer_training_bytes"]
    assert 23_000 < found["training_bytes_peak"] <= 24_000 < single
    assert found["kept_share"]["C3"] == found["kept_share"]["C4"] == 1
    ranges = ModelSpec.load(tmp_path / "run" / "model.json").row_ranges
    assert [width for _, width, _ in ranges["C4"]] == [4]
    _, (line, _) = with_row_ranges(*_spec_of(overrides))
    assert line == (
        f"compression  {found['training_bytes_peak']:,} bytes in training, {found['training_bytes_peak'] / single:.1%} "
        f"of those of single-layer tables (budget 24,000 bytes, {24_000 / single:.1%})"
    )


def test_a_budget_without_wide_rows_is_said_to_give_a_single_layer(settings: tuple[str, ...]) -> None:
    text = "compression  no row has more than 4 columns: with this budget it is a single-layer model"
    narrow = [*settings, "compression.budget=0.05", "run.dir=x"]
    assert with_row_ranges(*_spec_of(narrow))[1][2:] == [text]
    assert len(with_row_ranges(*_spec_of([*narrow, "model.hidden_dim=null", "compression.widths=null"]))[1]) == 2


def test_a_budget_above_all_rows_is_said_to_compress_nothing(settings: tuple[str, ...]) -> None:
    _, lines = with_row_ranges(*_spec_of([*settings, "compression.budget=4GB", "run.dir=x"]))
    assert lines[-1].startswith("compression  nothing is compressed: with the largest width for all rows, tables take ")
    assert lines[-1].endswith(" bytes, which the budget allows")
    _, lines = with_row_ranges(*_spec_of([*settings, "compression.budget=4000", "run.dir=x"]))
    assert lines[-1].endswith(" bytes, which the budget allows; a budget without a unit is a share")
    _, lines = with_row_ranges(*_spec_of([*settings, "compression.policy=adaptive", "run.dir=x"]))
    rows = sum(table.num_embeddings for table in _spec_of([*settings, "run.dir=x"])[0].tables)
    assert lines[2] == f"compression  {6 * rows:,} bytes of them are slots and utilities of all rows"


def test_an_error_of_the_rank_that_reads_the_counts_is_that_of_every_rank(
    ranks: Ranks, settings: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = [*settings, "compression.budget=1B", f"run.dir={tmp_path / 'run'}"]
    messages = ranks(2).run(_error_of_row_ranges, overrides)
    assert len(set(messages)) == 1
    assert "compression.budget 1B is 1 bytes, in which one row of each table cannot be stored" in messages[0]
    several = ranks(2).run(_row_ranges_read_on_rank_0, [*settings, f"run.dir={tmp_path / 'run'}"])
    assert several[0] == several[1]


def _spec_of(overrides: list[str]) -> tuple[ModelSpec, Config]:
    config = load_config(CONFIG, overrides)
    return ModelSpec.of(config, DatasetSchema.load(Path(config.data.path))), config


def _error_of_row_ranges(overrides: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        shared_row_ranges(*_spec_of(overrides))
    return str(caught.value)


def _row_ranges_read_on_rank_0(overrides: list[str]) -> tuple[ModelSpec, list[str]]:
    spec, config = _spec_of(overrides)
    if dist.get_rank():
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, path="/nowhere"))
    return shared_row_ranges(spec, config)


def test_wrong_settings_are_refused(small_model: tuple[str, ...], tmp_path: Path) -> None:
    start = ("train", CONFIG, *small_model, f"run.dir={tmp_path / 'run'}", "compression.policy=static")
    assert "one row of each table cannot be stored" in error_line(*start, "compression.budget=1e-6")
    assert "must be a multiple of 4" in error_line(*start, "compression.widths=[12,6]")
    for setting in (
        "sharding.exchange=after",
        "sharding.sharding_types=[table_wise]",
        "sharding.tables.C3.exchange=unique_rows",
        "sharding.rows_dtype=fp16",
        "model.hidden_dim=null compression.widths=[12]",
        "compression.widths=[16]",
        "compression.widths=[4,4]",
    ):
        message = error_line(*start, *setting.split())
        assert setting.split()[-1].partition("=")[0].partition(".C3")[0] in message
        assert "does not go with compression.policy static" in message
    assert not (tmp_path / "run").exists()


def test_plan_counts_the_compressed_tables(settings: tuple[str, ...], tmp_path: Path) -> None:
    plan = mlet_json("plan", CONFIG, *settings, f"run.dir={tmp_path}", "--world-size", 4)
    assert [entry["table"] for entry in plan["tables"]] == ["rows_12x4", "rows_4x4"]
    assert {entry["exchange"] for entry in plan["tables"]} == {"unique_rows"}
    *_, compressed = plan["configurations"]
    assert compressed["name"] == "compressed to 60% of the single layer's bytes"
    assert json.dumps(plan)


def test_ranks_without_rows_of_a_width_are_named(settings: tuple[str, ...], tmp_path: Path) -> None:
    message = error_line(
        *("plan", CONFIG, *settings, f"run.dir={tmp_path}", "--device", "cpu", "--world-size", 4096),
        *("--local-world-size", 16, "data.batch_size=4096"),
    )
    assert re.search(r"rows of \d+ columns, which are stored together, leave some of 4,096 ranks without rows", message)


def test_hashed_ids_need_one_width(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,x\n" + "".join(f"{row % 2},{row % 7}\n" for row in range(200)))
    sparse = [{"column": "x", "encoding": "hash", "num_embeddings": 20}]
    prepare_table(tmp_path / "data", PLAIN | {"sparse": sparse}, [tmp_path / "a.csv"])
    overrides = (f"data.path={tmp_path / 'data'}", f"run.dir={tmp_path / 'run'}", "data.batch_size=20")
    compressed = (*overrides, "compression.policy=static", "compression.budget=1")
    message = error_line("train", CONFIG, *compressed)
    assert "the ids of feature 'x' are hashes" in message
    assert "compression.tables.x.min_width" in message
    spec, config = _spec_of([*compressed, "compression.tables={x: {min_width: 16, max_width: 16}}"])
    assert with_row_ranges(spec, config)[0].row_ranges == {"x": ((20, 16, 1.0),)}
