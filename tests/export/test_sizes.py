"""`mlet export --dims`: exports at several sizes of runs that were trained at them, and of runs that were not."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mlet_dist.data.row_counts import count_ids
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.export.collapse.run_collapse import ExportOptions
from mlet_dist.export.collapse.run_sizes import export_sizes
from mlet_dist.export.source import ModelSource
from mlet_dist.export.verify.run_verify import verify_export
from mlet_dist.stored_tables.refitted_source import vectors_of_ids
from tests.helpers.export_units import contents
from tests.helpers.mlet_command import error_line, mlet, mlet_json
from tests.helpers.tampered_export import change_manifest
from tests.helpers.train_in_ranks import Ranks, train_in_ranks

pytestmark = [pytest.mark.e2e, pytest.mark.multirank]

MODEL = ("model.embedding_dim=12", "model.hidden_dim=16", "optimizer.name=adagrad", "optimizer.learning_rate=0.05")
NESTED = "model.nested_dims=[4,8]"


@pytest.fixture(scope="module")
def nested(
    ranks: Ranks, small_model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    run = tmp_path_factory.mktemp("nested") / "run"
    return run, train_in_ranks(ranks, 2, *small_model, *MODEL, NESTED, f"run.dir={run}")


@pytest.fixture(scope="module")
def plain(ranks: Ranks, small_model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("plain") / "run"
    train_in_ranks(ranks, 1, *small_model, *MODEL, "model.hidden_dim=null", f"run.dir={run}")
    return run


def test_each_size_of_a_nested_run_is_the_masked_model(
    nested: tuple[Path, dict[str, Any]], small_data: Path, tmp_path: Path
) -> None:
    run, trained = nested
    outputs = ("dcp", "safetensors", "int8", "int4", "package")
    found = mlet_json("export", run, "--out", tmp_path / "sizes", "--dims", 4, 8, 12, "--outputs", *outputs)
    assert list(found["sizes"]) == ["4", "8", "12"]
    rows = found["sizes"]["12"]["served_bytes"]["dcp"] // 48
    for size, result in found["sizes"].items():
        assert result["out"] == str(tmp_path / "sizes" / f"dim{size}")
        assert result["served_bytes"]["dcp"] == 4 * int(size) * rows
        assert result["served_bytes"]["package"] == (int(size) + 4) * rows
        checked = mlet_json("verify", result["out"], "--run", run, "--data", small_data)
        assert checked["ok"] is True
        assert set(checked["outputs"]) == {
            "dcp",
            "safetensors",
            "int8",
            "int4",
            "package/model.pt",
            "package/model.pt2",
        }
        name = "test_logloss" if size == "12" else f"test_logloss_dim{size}"
        assert checked["logloss_run"] == pytest.approx(trained[name], abs=1e-7)
        assert checked["outputs"]["dcp"]["logloss"] == pytest.approx(trained[name], abs=1e-6)
    assert len({trained[f"test_logloss{each}"] for each in ("", "_dim4", "_dim8")}) == 3
    evaluated = mlet_json("evaluate", tmp_path / "sizes" / "dim4", "--data", small_data)
    assert evaluated["logloss"] == pytest.approx(trained["test_logloss_dim4"], abs=1e-6)
    of_run = mlet_json("evaluate", run, "--data", small_data, "--nproc", 2)
    assert of_run["logloss_dim8"] == pytest.approx(trained["test_logloss_dim8"], abs=1e-6)
    mlet("predict", tmp_path / "sizes" / "dim8", "--data", small_data, "--out", tmp_path / "scores.parquet")


def test_tables_and_layers_of_a_size_are_first_columns(
    nested: tuple[Path, dict[str, Any]], ranks: Ranks, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    run, _ = nested
    mlet("export", run, "--out", tmp_path / "sizes", "--dims", 4, 12, "--outputs", "safetensors", "--gather")

    def state_of(size: int) -> dict[str, torch.Tensor]:
        files = (tmp_path / "sizes" / f"dim{size}" / "safetensors").glob("*.safetensors")
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    whole, narrow = state_of(12), state_of(4)
    assert whole.keys() == narrow.keys()
    for name, tensor in narrow.items():
        if "embedding_bags" in name:
            # The last bit of a product depends on the number of its columns.
            torch.testing.assert_close(tensor, whole[name][:, :4], rtol=1e-6, atol=2e-7)
    manifest = json.loads((tmp_path / "sizes" / "dim4" / "manifest.json").read_text())
    assert manifest["model"]["model"]["embedding_dim"] == 4
    assert manifest["model"]["model"]["nested_dims"] is None
    assert manifest["size"] == {"embedding_dim": 4, "how": "columns", "row_ranges": {}}


def test_ranks_and_repeated_exports_write_the_same_bytes(
    plain: Path, nested: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    for run in (plain, nested[0]):
        mlet("export", run, "--out", tmp_path / "one", "--dims", 4, "--outputs", "dcp", "int8", "--overwrite")
        mlet(
            *("export", run, "--out", tmp_path / "two", "--dims", 4, "--outputs", "dcp", "int8", "--overwrite"),
            *("--nproc", 2),
        )
        assert contents(tmp_path / "one" / "dim4") == contents(tmp_path / "two" / "dim4")


def test_a_run_that_was_not_trained_at_a_size_is_cut_to_its_longest_directions(
    plain: Path, small_data: Path, tmp_path: Path
) -> None:
    outputs = ("dcp", "int8", "safetensors", "package")
    done = mlet("export", plain, "--out", tmp_path / "cut", "--dims", 4, 8, "--outputs", *outputs, "--json")
    assert "was not trained at 4 columns; its tables are cut to the 4 directions in which looked-up" in done.stderr
    found = json.loads(done.stdout)
    for size, result in found["sizes"].items():
        assert set(result["outputs"]) == {"dcp-mixed", "int8-mixed", "safetensors-mixed", "package"}
        assert result["how"] == "truncated"
        checked = mlet_json("verify", result["out"], "--run", plain, "--data", small_data)
        assert checked["ok"] is True
        assert checked["outputs"]["dcp-mixed"]["max_abs_logit_diff"] < 1e-5
        assert result["served_bytes"]["dcp-mixed"] < 4 * 12 * _rows(plain) * (0.55 if size == "4" else 0.85)
        (warning,) = (line for line in done.stderr.splitlines() if f"not trained at {size} columns" in line)
        assert f"changes the LogLoss of valid by {result['valid_change']:+.5f}; train with" in warning
        valid = ("--data", small_data, "--split", "valid")
        cut = mlet_json("verify", result["out"], "--run", plain, *valid)["outputs"]["dcp-mixed"]["logloss"]
        whole = mlet_json("evaluate", plain, *valid)["logloss"]
        assert result["valid_change"] == pytest.approx(cut - whole, abs=2e-6)
    loss = {size: max(each["lost"].values()) for size, each in found["sizes"].items()}
    assert loss["4"] > loss["8"] > 0
    schema = DatasetSchema.load(small_data)
    with ModelSource.open(plain) as source:
        for name, table in source.tables.items():
            counts = torch.from_numpy(count_ids(small_data, schema, name)).double()
            vectors = vectors_of_ids(table, 0, table.num_embeddings) * counts.sqrt()[:, None]
            squares = torch.linalg.svdvals(vectors).square()
            expected = float(squares[4:].sum() / squares.sum())
            assert found["sizes"]["4"]["lost"][name] == pytest.approx(expected, rel=1e-6, abs=1e-12)


def _rows(run: Path) -> int:
    with ModelSource.open(run) as source:
        return sum(table.num_embeddings for table in source.tables.values())


@pytest.mark.parametrize("kind", ["compressed", "builder", "builder and compressed", "dlrm_dcn", "mean"])
def test_sizes_of_other_models(ranks: Ranks, small_model: tuple[str, ...], tmp_path: Path, kind: str) -> None:
    run, changes = tmp_path / "run", list[str]()
    if "compressed" in kind:
        changes += ["compression.policy=static", "compression.budget=0.45"]
    if "builder" in kind:
        changes.append("model.builder=tests.helpers.own_networks:wide_and_deep")
    if kind == "dlrm_dcn":
        changes += ["model.name=dlrm_dcn", "model.cross_rank=4", "model.hidden_dim=null", "model.pooling=mean"]
    trained = train_in_ranks(ranks, 1, *small_model, *MODEL, NESTED, *changes, f"run.dir={run}")
    data = small_model[0].partition("=")[2]
    outputs = ("dcp", "int8", "dcp-kept", "dcp-mixed")
    found = mlet_json("export", run, "--out", tmp_path / "sizes", "--dims", 4, 8, "--outputs", *outputs)
    for size, result in found["sizes"].items():
        assert result["how"] == ("padded" if "builder" in kind else "columns")
        checked = mlet_json("verify", result["out"], "--run", run, "--data", data)
        assert checked["ok"] is True
        assert checked["logloss_run"] == pytest.approx(trained[f"test_logloss_dim{size}"], abs=1e-6)
        assert result["served_bytes"]["dcp-mixed"] <= 4 * (int(size) * _rows(run)) + 26 * 4 * 12 * int(size)


def test_cut_tables_of_a_compressed_run_keep_its_rows(
    ranks: Ranks, small_model: tuple[str, ...], small_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = (*small_model, *MODEL, "compression.policy=static", "compression.budget=0.3")
    train_in_ranks(ranks, 1, *settings, f"run.dir={run}")
    whole = mlet_json("export", run, "--out", tmp_path / "whole", "--outputs", "dcp-mixed")
    found = mlet_json(
        "export", run, "--out", tmp_path / "sizes", "--dims", 8, 12, "--outputs", "dcp-mixed", "int8-kept"
    )
    assert found["sizes"]["12"]["served_bytes"]["dcp-mixed"] == whole["served_bytes"]["dcp-mixed"]
    assert found["sizes"]["8"]["served_bytes"]["dcp-mixed"] < whole["served_bytes"]["dcp-mixed"]
    for size in ("8", "12"):
        out = found["sizes"][size]["out"]
        assert mlet_json("verify", out, "--run", run, "--data", small_data)["ok"] is True


def test_verify_finds_other_values_and_other_sizes(
    nested: tuple[Path, dict[str, Any]], plain: Path, small_data: Path, tmp_path: Path
) -> None:
    run, _ = nested
    for name, of in (("nested", run), ("plain", plain)):
        mlet("export", of, "--out", tmp_path / name, "--dims", 4, "--outputs", "dcp")

    def other_size(manifest: dict[str, Any]) -> None:
        manifest["size"]["embedding_dim"] = 12

    change_manifest(tmp_path / "nested" / "dim4", other_size)
    line = error_line("verify", tmp_path / "nested" / "dim4", "--run", run, "--data", small_data)
    assert line.endswith(f"its size, 12 columns, is none of {run}; name the run that it was exported from")
    mlet("export", run, "--out", tmp_path / "again", "--dims", 4, "--outputs", "dcp")
    with pytest.raises(UserError, match="its size, 4 columns, is none of"):
        verify_export(tmp_path / "again" / "dim4", plain, small_data)
    file = tmp_path / "plain" / "dim4" / "size" / "tables.safetensors"
    content = bytearray(file.read_bytes())
    content[-2] ^= 64
    file.write_bytes(content)
    line = error_line("verify", tmp_path / "plain" / "dim4", "--run", plain, "--data", small_data)
    assert "tables.safetensors" in line


@pytest.mark.parametrize(
    ("dims", "message"),
    [
        ((6,), "--dims 6: fbgemm's kernels take widths that are multiples of 4; use one"),
        ((16,), "--dims 16: the widest table of {run} has 12 columns; use 12 or less"),
        ((4, 8, 4), "--dims 4 8 4 names a size twice; name each once"),
    ],
)
def test_sizes_that_a_run_cannot_have_are_refused(
    plain: Path, dims: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        export_sizes(plain, str(tmp_path / "out"), dims, ExportOptions())
    assert str(caught.value) == message.format(run=plain)
    assert not (tmp_path / "out").exists()


def test_widths_of_a_nested_run_are_named(nested: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    line = error_line("export", nested[0], "--out", tmp_path / "out", "--dims", 4, 20)
    assert line.endswith(
        f"--dims 20: {nested[0]} was trained at 4, 8 and 12 columns (model.nested_dims); use some of these"
    )
    line = error_line("export", nested[0], "--out", tmp_path / "out", "--data", "data")
    assert line.endswith("--data needs --dims or --budget, which read the counts of the data set")


def test_rows_that_move_are_refused_by_name(ranks: Ranks, small_model: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_in_ranks(ranks, 1, *small_model, *MODEL, "compression.policy=adaptive", f"run.dir={run}")
    line = error_line("export", run, "--out", tmp_path / "out", "--dims", 4)
    assert "have widths of their own (compression.policy adaptive); continue the run with" in line
