"""Tables of their own sizes, end to end: trained, resumed, exported in every form, verified, evaluated, factorised."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlet_dist.cli.main import main
from mlet_dist.export.collapse.run_collapse import ExportOptions, export_run
from mlet_dist.export.factorize.run_factorize import factorize_tables
from mlet_dist.export.run_evaluate import evaluate_path
from mlet_dist.export.source import Tables
from mlet_dist.export.spectrum.run_spectrum import spectrum_of
from mlet_dist.export.verify.run_verify import verify_export
from mlet_dist.models.spec import ModelSpec
from tests.helpers.mlet_command import ROOT
from tests.helpers.train_in_ranks import Ranks, stopped_after, train_in_ranks

pytestmark = pytest.mark.e2e

# d 4 and k 12 but for these; tables of up to 12 rows, and C12, have a single layer.
SIZES = (
    "model.name=dlrm_dcn",
    "model.cross_layers=1",
    "model.cross_rank=3",
    'model.tables={C3: {embedding_dim: 8, hidden_dim: 24}, "C1[26]": {hidden_dim: null, embedding_dim: 12}}',
    "model.single_layer_up_to=12",
    "optimizer.name=adagrad",
    "train.max_steps=40",
    "train.checkpoint_every=20",
    "train.keep_last=9",
)
STATIC = ("compression.policy=static", "compression.budget=0.8", "compression.shared_rows=false")


@pytest.fixture(scope="module")
def runs(
    ranks: Ranks, small_model: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, tuple[str, ...], dict[str, Any]]]:
    """Runs on two ranks, with and without compression: the directory, the settings and the summary."""
    found = {}
    for name, more in (("plain", ()), ("static", STATIC)):
        settings = (*small_model, *SIZES, *more)
        path = tmp_path_factory.mktemp("sizes") / name
        found[name] = path, settings, train_in_ranks(ranks, 2, *settings, f"run.dir={path}")
    return found


@pytest.mark.parametrize("name", ["plain", "static"])
def test_a_resumed_run_has_the_same_bits(name: str, runs: Any, ranks: Ranks, tmp_path: Path) -> None:
    path, settings, summary = runs[name]
    killed = stopped_after(20, path, tmp_path / "killed")
    again = train_in_ranks(ranks, 2, *settings, f"run.dir={killed}")
    assert (again["first_step"], again["steps"]) == (20, 40)
    assert again["weights_sha256"] == summary["weights_sha256"]
    fewer = train_in_ranks(ranks, 1, *settings, f"run.dir={stopped_after(20, path, tmp_path / 'fewer')}")
    assert fewer["test_auc"] == pytest.approx(summary["test_auc"], abs=1e-4)


def test_tables_have_their_sizes_in_checkpoints_and_reports(runs: Any, small_data: Path, tmp_path: Path) -> None:
    path, _, summary = runs["plain"]
    spec = ModelSpec.load(path / "model.json")
    expected = {table.name: (4, None if table.num_embeddings <= 12 else 12) for table in spec.tables}
    expected |= {"C3": (8, 24), "C12": (12, None), "C16": (12, None)}
    assert {table.name: (table.embedding_dim, table.hidden_dim) for table in spec.tables} == expected
    assert len({k for _, k in expected.values()}) == 3
    trained = served = 0
    with Tables.open(path) as tables:
        for name, table in tables.tables.items():
            assert (table.embedding_dim, table.hidden_dim) == expected[name]
            n, d, k = table.num_embeddings, *expected[name]
            trained += 8 * (n * d if k is None else n * k + k * d)  # with Adagrad's sums
            served += 8 * n * d
    assert (summary["training_bytes_peak"], summary["single_layer_training_bytes"]) == (trained, served)
    found = spectrum_of(path, out=tmp_path / "spectrum")
    assert {each["name"]: each["embedding_dim"] for each in found["tables"]} == {
        name: d for name, (d, _) in expected.items()
    }


@pytest.mark.parametrize(
    ("name", "outputs", "package"),
    [
        ("plain", ("dcp", "safetensors", "int8", "int4"), "dcp"),
        ("static", ("dcp", "dcp-kept", "dcp-mixed", "int8-mixed"), "dcp-mixed"),
    ],
)
def test_exports_of_every_form_are_verified(
    name: str, outputs: tuple[str, ...], package: str, runs: Any, small_data: Path, tmp_path: Path
) -> None:
    path, _, summary = runs[name]
    export_run(path, str(tmp_path / "export"), ExportOptions(outputs=outputs, package=package))
    verified = verify_export(tmp_path / "export", path, small_data)
    failed = {output: each for output, each in verified["outputs"].items() if not each["ok"]}
    assert failed.keys() <= {"int4"}, failed  # whose tolerance on the AUC is for models that have learnt more
    for each in failed.values():
        assert max(table["relative_error"] for table in each["tables"].values()) < 0.15
    assert set(verified["outputs"]) == {*outputs, "package/model.pt", "package/model.pt2"}
    if name == "plain":
        evaluated = evaluate_path(tmp_path / "export", small_data, "test", device="cpu")
        assert evaluated["auc"] == pytest.approx(summary["test_auc"], abs=1e-6)


def test_factors_begin_a_run_of_these_sizes(runs: Any, ranks: Ranks, small_data: Path, tmp_path: Path) -> None:
    """Tables of a single layer in the model take the product of the two layers that factors have."""
    path, settings, summary = runs["plain"]
    export_run(path, str(tmp_path / "export"), ExportOptions(outputs=("dcp",)))
    factorize_tables(tmp_path / "export", 24, tmp_path / "factors")
    with Tables.open(tmp_path / "factors") as factors:
        assert {table.hidden_dim for table in factors.tables.values()} == {24}
    start = (f"train.initial_weights={tmp_path / 'factors'}", "model.hidden_dim=24")
    still = ("optimizer.learning_rate=1e-30", "train.max_steps=1", f"run.dir={tmp_path / 'run'}")
    begun = train_in_ranks(ranks, 2, *settings, *start, *still)
    assert begun["test_auc"] == pytest.approx(summary["test_auc"], abs=1e-6)


@pytest.mark.parametrize("name", ["plain", "static"])
def test_a_plan_has_a_line_for_each_configuration(name: str, runs: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, settings, summary = runs[name]
    command = ["plan", str(ROOT / "configs" / "criteo_kaggle.yaml"), *settings, "--world-size", "2", "--device", "cpu"]
    assert main([*command, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    single = ["single layer d = 4 to 12, TorchRec's exchange", "single layer d = 4 to 12, auto"]
    wide = "single layer d = 24, TorchRec's exchange"
    names = [*single, wide, "MLET k = 12 to 24, after the exchange", "MLET k = 12 to 24, auto"]
    more = ["compressed to 80% of the single layer's bytes"] if name == "static" else []
    assert [each["name"] for each in plan["configurations"]] == [*names, *more]
    if name == "static":
        report = plan["compression"]
        assert report["single_layer_training_bytes"] == summary["single_layer_training_bytes"]
        assert report["training_bytes"] == summary["training_bytes_peak"]
