"""Data whose columns were made differently than the model's are refused by every command that reads both."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.preprocessing import LIKE_REMEDY
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.export.run_evaluate import evaluate_path
from mlet_dist.export.verify.run_verify import verify_export
from mlet_dist.formatting import with_checksum
from mlet_dist.models.spec import ModelSpec
from tests.helpers.mlet_command import error_line, mlet
from tests.helpers.resealed import reseal_json

CONFIG = """
data: {batch_size: 50}
model: {embedding_dim: 4, hidden_dim: 8, bottom_mlp: [8], top_mlp: [8]}
optimizer: {name: adagrad, learning_rate: 0.05}
train: {max_steps: 6}
"""
COLUMNS: dict[str, Any] = {
    "label": {"column": "rating", "positive_from": 4},
    "dense": [{"column": "price", "transform": "standardise", "missing": "mean"}, {"column": "age", "missing": 2}],
    "sparse": [{"column": "user"}, {"column": "item", "encoding": "hash", "num_embeddings": 32}],
}
PRICES = np.random.default_rng(3).gamma(2.0, 9.0, size=400).round(2)


def prepared(base: Path, name: str, *, shift: float = 0.0, **changes: Any) -> Path:
    """Prepare a log of 400 rows, in which ``shift`` is added to the prices, as ``COLUMNS`` with changes describe it."""
    lines = [f"{i * i % 6},{p + shift:.2f},{i % 40 or ''},u{i % 11},i{i * 7 % 13}" for i, p in enumerate(PRICES)]
    (base / f"{name}.csv").write_text("\n".join(["rating,price,age,user,item", *lines]))
    (base / f"{name}.yaml").write_text(json.dumps({"format": "csv"} | COLUMNS | changes))
    prepare(load_table(base / f"{name}.yaml"), [base / f"{name}.csv"], base / name)
    return base / name


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the data set ``own``, a run on it, and its export with a package."""
    path = tmp_path_factory.mktemp("identity")
    (path / "config.yaml").write_text(CONFIG)
    prepared(path, "own")
    mlet("train", path / "config.yaml", f"data.path={path / 'own'}", f"run.dir={path / 'run'}")
    mlet("export", path / "run", "--out", path / "export", "--outputs", "dcp", "package")
    return path


def dense(**changes: Any) -> list[dict[str, Any]]:
    price, age = COLUMNS["dense"]
    return [price | changes, age]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"dense": dense(transform="raw", missing=0)}, "dense column price has transform raw, missing 0 here and tra"),
        ({"shift": 5.0}, "dense column price has mean "),
        (
            {"dense": [COLUMNS["dense"][0], {"column": "age", "missing": 3}]},
            "dense column age has missing 3 here and ",
        ),
        (
            {"label": {"column": "rating", "positive_from": 3}},
            "the label has positive_from 3 here and ",
        ),
    ],
    ids=["transform", "mean of another day", "stand-in of a missing number", "label"],
)
def test_columns_that_were_made_differently_are_refused(
    base: Path, tmp_path: Path, changes: dict[str, Any], found: str
) -> None:
    data = prepared(tmp_path, "other", **changes)
    for refused in (
        lambda: evaluate_path(base / "run", data, "test"),
        lambda: evaluate_path(base / "export", data, "test"),
        lambda: verify_export(base / "export", base / "run", data),
    ):
        with pytest.raises(UserError) as caught:
            refused()
        assert str(caught.value).startswith(f"{data}: {found}")
        assert " in the model's data set; " in str(caught.value)


@pytest.mark.e2e
def test_a_run_does_not_start_from_weights_of_columns_that_were_made_differently(base: Path, tmp_path: Path) -> None:
    data = prepared(tmp_path, "other", shift=5.0)
    start = (f"train.initial_weights={base / 'run'}", f"data.path={data}", f"run.dir={tmp_path / 'warm'}")
    message = error_line("train", base / "config.yaml", *start)
    assert "step-00000006: dense column price has mean " in message
    assert message.endswith(" where the weights were trained; " + LIKE_REMEDY)
    assert not (tmp_path / "warm" / "config.yaml").exists()


@pytest.mark.e2e
def test_the_mean_and_deviation_are_those_of_the_training_split(base: Path) -> None:
    train = PRICES[:320]
    rules = DatasetSchema.load(base / "own").preprocessing.dense["price"]
    assert rules["mean"] == pytest.approx(train.mean(), rel=1e-12)
    assert rules["deviation"] == pytest.approx(train.std(), rel=1e-12)


@pytest.mark.e2e
def test_other_columns_and_orders_of_a_data_set_do_not_matter_where_columns_are_taken_by_name(
    base: Path, tmp_path: Path
) -> None:
    sparse = [*COLUMNS["sparse"][::-1], {"column": "age", "name": "age_id"}]
    data = prepared(tmp_path, "more", dense=COLUMNS["dense"][::-1], sparse=sparse)
    for target in ("run", "export"):
        assert evaluate_path(base / target, data, "test") == evaluate_path(base / target, base / "own", "test")
    assert verify_export(base / "export", base / "run", data)["ok"]


@pytest.mark.e2e
def test_run_checkpoint_export_and_package_tell_how_their_inputs_are_made(base: Path) -> None:
    expected = DatasetSchema.load(base / "own").preprocessing.to_dict()
    assert expected["dense"]["price"].keys() == {"transform", "missing", "mean", "deviation"}
    assert expected["sparse"]["item"] == {"encoding": "hash", "num_embeddings": 32}
    assert json.loads((base / "run" / "model.json").read_text())["preprocessing"] == expected
    (checkpoint,) = (base / "run" / "checkpoints").iterdir()
    about = Manifest.parse((checkpoint / "manifest.json").read_bytes(), "").about
    assert about["spec"]["preprocessing"] == about["identity"]["preprocessing"] == expected
    assert json.loads((base / "export" / "manifest.json").read_text())["model"]["preprocessing"] == expected
    signature = json.loads((base / "export" / "package" / "signature.json").read_text())
    assert (signature["dense"], signature["preprocessing"]) == (["price", "age"], expected)


@pytest.mark.e2e
def test_models_of_a_version_without_it_are_read_with_a_warning(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, export = (Path(shutil.copytree(base / name, tmp_path / name)) for name in ("run", "export"))
    reseal_json(run / "model.json", lambda model: {key: model[key] for key in model if key != "preprocessing"})
    manifest = json.loads((export / "manifest.json").read_text())
    del manifest["model"]["preprocessing"]
    (export / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    assert ModelSpec.load(run / "model.json").preprocessing is None
    for target in (run, export):
        evaluate_path(target, base / "own", "test")
        (warning,) = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
        assert warning.startswith(
            f"mlet: warning: {target}: the model does not record how its dense columns and its label"
        )
    other = prepared(tmp_path, "other", sparse=[COLUMNS["sparse"][0], {"column": "item"}])
    with pytest.raises(UserError, match="feature 'item' has"):
        evaluate_path(run, other, "test")
    found = verify_export(export, run, base / "own")
    assert found["ok"]
