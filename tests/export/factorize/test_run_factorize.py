"""`mlet factorize`: existing tables are factored exactly, trained further and exported."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.config.config_file import load_config
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.export.collapse.run_collapse import export_run
from mlet_dist.export.factorize.run_factorize import factorize_tables
from mlet_dist.export.row_blocks import read_blocks
from mlet_dist.export.source import ModelSource, Tables
from mlet_dist.export.verify.run_verify import verify_export
from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from mlet_dist.training.resume import check_same_run, identity_of
from mlet_dist.training.warm_start import find_initial_weights
from tests.conftest import TrainedRun
from tests.helpers.mlet_command import ROOT, error_line, mlet, mlet_json
from tests.helpers.train_in_ranks import Ranks, stopped_after, train_in_ranks


@pytest.fixture(scope="module")
def factors(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Factors of the export of ``trained`` with k = 16, made by the command; all tables have d = 4."""
    out = tmp_path_factory.mktemp("factors") / "factors"
    result = mlet_json("factorize", exported, "--hidden-dim", 16, "--out", out)
    assert result["out"] == str(out)
    assert (result["tables"], result["dense"], result["hidden_dim"]) == (26, 8, 16)
    assert result["relative_error"] < 1e-7
    return out


def _by_torch(checkpoint: Path, scratch: Path) -> dict[str, torch.Tensor]:
    """Load a full checkpoint by PyTorch's own conversion, which shares no code with mlet_dist."""
    dcp_to_torch_save(checkpoint, scratch)
    state: dict[str, torch.Tensor] = torch.load(scratch, weights_only=False)
    return state


def test_the_product_equals_the_export_and_dense_layers_are_bitwise_identical(
    exported: Path, factors: Path, tmp_path: Path
) -> None:
    served = _by_torch(exported / "model", tmp_path / "export.pt")
    made = _by_torch(factors / "step-00000000", tmp_path / "factors.pt")
    tables = 0
    for name, tensor in served.items():
        if not name.startswith(TABLES_PREFIX):
            assert torch.equal(made.pop(f"model.{name}"), tensor)
            continue
        rows = made.pop(f"model.{name}").double()
        projection = made.pop(f"model.{TABLES_PREFIX}projections.{name.split('.')[-2]}.weight").double()
        expected = tensor.double()
        assert float((rows @ projection - expected).norm() / expected.norm()) < 1e-7
        singular = torch.linalg.svdvals(expected)
        balanced = (rows.T @ rows)[:4, :4]
        torch.testing.assert_close(balanced, (projection @ projection.T)[:4, :4], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(balanced, singular.diag(), rtol=1e-6, atol=1e-6 * float(singular[0]))
        tables += 1
    assert tables == 26
    assert not made


def _assert_same_model(
    after: dict[str, torch.Tensor], before: dict[str, torch.Tensor], factors: Path, scratch: Path
) -> None:
    """Assert that dense layers are bitwise equal, and tables up to the rounding of factors and of their product."""
    made = _by_torch(factors / "step-00000000", scratch)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if not name.startswith(TABLES_PREFIX):
            assert torch.equal(after[name], tensor)
            continue
        rows = made[f"model.{name}"].double()
        projection = made[f"model.{TABLES_PREFIX}projections.{name.split('.')[-2]}.weight"].double()
        assert not bool(rows[:, 4:].any())  # so 4 terms of a product are rounded; the others are 0
        rounding = 4 * 2**-24 * (rows.abs() @ projection.abs())
        assert bool(((after[name].double() - rows @ projection).abs() <= rounding).all())
        assert float((rows @ projection - tensor.double()).norm() / tensor.double().norm()) < 1e-7


def test_factors_with_their_model_are_exported_to_the_same_tables(
    exported: Path, factors: Path, tmp_path: Path
) -> None:
    export_run(factors, tmp_path / "again")
    before = _by_torch(exported / "model", tmp_path / "before.pt")
    after = _by_torch(tmp_path / "again" / "model", tmp_path / "after.pt")
    _assert_same_model(after, before, factors, tmp_path / "factors.pt")
    with pytest.raises(UserError, match="is an export already; name the run that it was made from"):
        ModelSource.open(exported)


def _overrides(trained: TrainedRun, run: Path, *more: str) -> tuple[str, ...]:
    return (*trained.overrides, "model.hidden_dim=16", f"run.dir={run}", *more)


@pytest.mark.multirank
def test_training_starts_from_the_tables_and_its_result_is_exported(
    ranks: Ranks, trained: TrainedRun, exported: Path, factors: Path, tmp_path: Path
) -> None:
    # A step with a learning rate near zero keeps the initial weights.
    still = _overrides(trained, tmp_path / "still", f"train.initial_weights={factors}")
    train_in_ranks(ranks, 2, *still, "train.max_steps=1", "optimizer.learning_rate=1e-30")
    export_run(tmp_path / "still", tmp_path / "again")
    before = _by_torch(exported / "model", tmp_path / "export.pt")
    after = _by_torch(tmp_path / "again" / "model", tmp_path / "again.pt")
    _assert_same_model(after, before, factors, tmp_path / "factors.pt")

    epoch = _overrides(trained, tmp_path / "run", f"train.initial_weights={factors}", "train.max_steps=null")
    result = train_in_ranks(ranks, 2, *epoch)
    assert result["steps"] == 75
    export_run(tmp_path / "run", tmp_path / "export")
    moved = _by_torch(tmp_path / "export" / "model", tmp_path / "moved.pt")
    assert all(not torch.equal(moved[name], before[name]) for name in moved)
    found = verify_export(tmp_path / "export", tmp_path / "run", trained.data, "train")
    assert found["ok"]
    assert found["logloss_run"] < verify_export(exported, trained.path, trained.data, "train")["logloss_run"]


@pytest.mark.multirank
def test_a_killed_run_resumes_without_its_initial_weights(
    ranks: Ranks, trained: TrainedRun, factors: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(factors, tmp_path / "factors")
    more = (f"train.initial_weights={own}", "train.checkpoint_every=20", "train.keep_last=9", "train.max_steps=40")
    uninterrupted = train_in_ranks(ranks, 2, *_overrides(trained, tmp_path / "run", *more))
    killed = stopped_after(20, tmp_path / "run", tmp_path / "killed")
    shutil.rmtree(own)
    again = train_in_ranks(ranks, 2, *_overrides(trained, killed, *more))
    assert again["first_step"] == 20
    assert again["weights_sha256"] == uninterrupted["weights_sha256"]
    # A run with other initial weights is a different run, but a run may start from its checkpoints or their weights.
    identities = []
    for path in (own, "null"):
        config = load_config(tmp_path / "run" / "config.yaml", [f"train.initial_weights={path}"])
        identities.append(identity_of(config, ModelSpec.load(tmp_path / "run" / "model.json"), "the same"))
    with pytest.raises(UserError, match=r"train\.initial_weights was .*, is null"):
        check_same_run(*identities, "step-1", "begin anew")
    for index, setting in enumerate(("train.resume", "train.initial_weights")):
        begun = tmp_path / f"begun-{index}"
        overrides = _overrides(trained, begun, "train.max_steps=41", f"{setting}={tmp_path / 'run'}")
        result = train_in_ranks(ranks, 2, *overrides)
        assert result["first_step"] == (40 if index == 0 else 0)


def _refusals(overrides: list[tuple[str, ...]]) -> list[str]:
    found = []
    for each in overrides:
        config = load_config(ROOT / "configs" / "criteo_kaggle.yaml", each)
        try:
            find_initial_weights(config, ModelSpec.of(config, DatasetSchema.load(Path(config.data.path))))
            found.append("")
        except UserError as error:
            found.append(str(error))
    return found


@pytest.mark.multirank
def test_initial_weights_that_do_not_fit_the_model_are_rejected_by_name(
    ranks: Ranks, trained: TrainedRun, exported: Path, factors: Path, tmp_path: Path
) -> None:
    # Make factors of tables alone without one table, factors with a flipped bit, and factors of another vocabulary.
    state = _by_torch(exported / "model", tmp_path / "export.pt")
    tables = {name.split(".")[-2]: tensor for name, tensor in state.items() if name.startswith(TABLES_PREFIX)}
    del tables["C7"]
    torch.save(tables, tmp_path / "tables.pt")
    factorize_tables(tmp_path / "tables.pt", 16, tmp_path / "missing")
    damaged = shutil.copytree(factors, tmp_path / "damaged") / "step-00000000"
    content = bytearray((damaged / "table-3.distcp").read_bytes())
    content[-400] ^= 1
    (damaged / "table-3.distcp").write_bytes(content)
    strange = shutil.copytree(factors, tmp_path / "strange") / "step-00000000"
    old = Manifest.parse((strange / "manifest.json").read_bytes(), "")
    old.about["spec"]["preprocessing"]["sparse"]["C5"]["vocabulary"] = "another"
    (strange / "manifest.json").write_bytes(Manifest(old.step, old.files, old.about).render())

    name, there = rf"{factors}/step-00000000: '{TABLES_PREFIX}", "in the checkpoint"
    cases = [
        (rf"{name}embedding_bags\.C1\.weight' is \(\d+, 16\) {there} and \(\d+, 12\)", factors, "model.hidden_dim=12"),
        (rf"{name}projections\.C1\.weight' is \(16, 4\) {there} and \(16, 8\)", factors, "model.embedding_dim=8"),
        ("table 'C1' has two layers there and one in the model", factors, "model.hidden_dim=null"),
        (rf"over_arch\..* is \(\d+, \d+\) {there} and", factors, "model.top_mlp=[24]"),
        (r"holds no tensor '.*embedding_bags\.C7\.weight', which the model has", tmp_path / "missing", ""),
        (
            "train.initial_weights .*gone: does not exist; it must be a checkpoint, .*; `mlet factorize` makes",
            tmp_path / "gone",
            "",
        ),
        (r"table-3\.distcp is damaged", tmp_path / "damaged", ""),
        ("the ids of sparse feature C5 belong to another vocabulary in .* than where", tmp_path / "strange", ""),
        (
            r"data\.dense_features was \[\"I1\", \"I2\".*, is \[\"I2\", \"I1\"\]; set data\.dense_features=\[I1,I2,",
            factors,
            "data.dense_features=[I2,I1]",
        ),
    ]
    overrides = [
        _overrides(trained, tmp_path / "run", f"train.initial_weights={path}", *filter(None, [setting]))
        for _, path, setting in cases
    ]
    for found in ranks(2).run(_refusals, overrides):
        for message, (expected, _, _) in zip(found, cases, strict=True):
            assert re.search(expected, message), message


@pytest.mark.e2e
def test_a_rejected_run_is_not_started(trained: TrainedRun, factors: Path, tmp_path: Path) -> None:
    overrides = _overrides(trained, tmp_path / "run", f"train.initial_weights={factors}", "model.hidden_dim=12")
    done = mlet("train", ROOT / "configs" / "criteo_kaggle.yaml", *overrides, expect=2)
    assert f"mlet: error: {factors}/step-00000000: '{TABLES_PREFIX}embedding_bags.C1.weight' is" in done.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.multirank
def test_tables_alone_are_trained_with_new_dense_layers(
    ranks: Ranks, trained: TrainedRun, exported: Path, tmp_path: Path
) -> None:
    factorize_tables(exported, 16, tmp_path / "factors", tables_only=True)
    still = ("train.max_steps=1", "optimizer.learning_rate=1e-30", "model.top_mlp=[24]")
    overrides = _overrides(trained, tmp_path / "run", f"train.initial_weights={tmp_path / 'factors'}", *still)
    train_in_ranks(ranks, 2, *overrides)
    with Tables.open(tmp_path / "run") as run, Tables.open(tmp_path / "factors") as source:
        assert len(source.tables) == 26
        for name, table in source.tables.items():
            rows = run.tables[name].read_stored(0, table.num_embeddings)
            expected = table.read_stored(0, table.num_embeddings)
            torch.testing.assert_close(rows, expected, rtol=0, atol=2e-30)  # Adagrad's step is the learning rate
    with pytest.raises(UserError, match=r"holds only tables and no dense layers; train a model from them"):
        ModelSource.open(tmp_path / "factors")


def test_runs_exports_and_factors_are_read_as_the_same_tables(
    trained: TrainedRun, exported: Path, factors: Path
) -> None:
    with ModelSource.open(trained.path) as run, Tables.open(exported) as plain, ModelSource.open(factors) as made:
        assert plain.spec is not None
        assert (plain.spec.model.hidden_dim, made.spec.model.hidden_dim) == (None, 16)
        assert plain.config == run.config
        assert sorted(plain.dense) == sorted(run.dense) == sorted(made.dense)
        for name in plain.dense:
            assert torch.equal(plain.load_dense(name), run.load_dense(name))
        products = []
        for source in (run, plain, made):
            table = source.tables["C3"]
            values = torch.cat([block for _, block in read_blocks(table)])
            products.append(values if table.projection is None else values @ table.projection.double())
        torch.testing.assert_close(products[1], products[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(products[2], products[1], rtol=1e-6, atol=1e-7)


def test_a_path_without_tables_is_named(factors: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone: no such directory; expected the output of `mlet train`"):
        Tables.open(tmp_path / "gone")
    with pytest.raises(UserError, match="neither a run, an export nor factors"):
        Tables.open(tmp_path)
    with pytest.raises(UserError, match="step-00000000: is a checkpoint, but not of a run; name the directory that it"):
        Tables.open(factors / "step-00000000")
    copy = shutil.copytree(factors, tmp_path / "copy")
    (copy / "step-00000000" / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match=r"step-00000000: manifest\.json is damaged"):
        Tables.open(copy)


def test_factors_are_exact_for_small_blocks(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlet_dist.export.row_blocks.BLOCK_BYTES", 5 * 8 * 4)  # five rows
    result = factorize_tables(exported, 4, tmp_path / "factors")
    assert result["relative_error"] < 1e-7
    with Tables.open(exported) as plain, Tables.open(tmp_path / "factors") as made:
        for name, table in made.tables.items():
            rows = table.read_stored(0, table.num_embeddings).double()
            expected = plain.tables[name].read_stored(0, table.num_embeddings).double()
            assert table.projection is not None
            assert float((rows @ table.projection.double() - expected).norm() / expected.norm()) < 1e-7
        files = json.loads((tmp_path / "factors" / "step-00000000" / "manifest.json").read_bytes())["content"]["files"]
        assert len(files) == 28  # one per table, the dense layers, .metadata


def _with_value(values: torch.Tensor, row: int, value: float) -> torch.Tensor:
    values = values.clone()
    values[row, 1] = value
    return values


@pytest.mark.e2e
def test_tables_that_cannot_be_factored_are_reported_in_one_line_and_leave_no_files(tmp_path: Path) -> None:
    good = torch.randn(1000, 12)
    torch.save({"good": good, "bad": _with_value(good, 777, float("nan"))}, tmp_path / "nan.pt")
    line = error_line("factorize", tmp_path / "nan.pt", "--hidden-dim", 11, "--out", tmp_path / "out")
    assert line == (
        "mlet: error: --hidden-dim 11 is below the 12 columns of table 'good'; exact factors take 12 or more"
    )
    with pytest.raises(UserError, match=r"nan\.pt: table 'bad': row 777 holds a value that is not finite"):
        factorize_tables(tmp_path / "nan.pt", 12, tmp_path / "out")
    torch.save({"huge": good.double() * 1e90}, tmp_path / "huge.pt")
    with pytest.raises(
        UserError, match=r"huge\.pt: table 'huge': the product of its float32 factors has a relative error of"
    ):
        factorize_tables(tmp_path / "huge.pt", 12, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["huge.pt", "nan.pt"]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    torch.save({"good": good}, tmp_path / "good.pt")
    with pytest.raises(UserError, match="exists and is not empty"):
        factorize_tables(tmp_path / "good.pt", 12, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
