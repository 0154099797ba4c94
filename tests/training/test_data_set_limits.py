"""What a run does with a data set of one class, or with values that training never sees, as a user starts it."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from tests.helpers.data_set_parts import write_schema
from tests.helpers.mlet_command import ROOT, mlet

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle_adagrad.yaml"
SMALL = (
    "data.batch_size=64",
    "model.bottom_mlp=[8]",
    "model.top_mlp=[8]",
    "model.embedding_dim=4",
    "model.hidden_dim=8",
)


def prepared(folder: Path, label: Callable[[int], int]) -> Path:
    """Prepare 1,203 rows in the order of time: users come and go, some shops are rare, and prices are numbers."""
    rng = random.Random(5)
    lines = ["t,clicked,price,user,shop"]
    for row in range(1203):
        shop = f"rare{row}" if row % 20 == 0 else f"s{rng.randrange(9)}"
        lines.append(f"{row},{int(label(row))},{rng.random():.4f},u{row // 10},{shop}")
    (folder / "log.csv").write_text("\n".join(lines))
    table = {
        "format": "csv",
        "label": {"column": "clicked"},
        "split": {"by": "time", "column": "t"},
        "dense": [{"column": "price"}],
        "sparse": [{"column": "user"}, {"column": "shop", "min_count": 2}],
    }
    (folder / "table.yaml").write_text(yaml.safe_dump(table))
    mlet("prepare", "table", folder / "log.csv", "--schema", folder / "table.yaml", "--out", folder / "data")
    return folder / "data"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("limits"), lambda row: row % 3 == 0)


@pytest.mark.parametrize(("hidden_dim", "ranks"), [(8, 2), ("null", 1)])
def test_a_row_that_training_never_touches_is_served_as_zeros(
    data: Path, tmp_path: Path, hidden_dim: Any, ranks: int
) -> None:
    overrides = (*SMALL, f"data.path={data}", f"run.dir={tmp_path / 'run'}", f"model.hidden_dim={hidden_dim}")
    done = mlet("train", CONFIG, *overrides, "--nproc", ranks, "--json")
    assert "more than 20% of the ids of test are out of vocabulary (id 0): user 100%" in done.stderr
    assert "no training row has id 0 of user, so its vector is zero" in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["steps"], result["train_rows"]) == (16, 962)
    counts = json.loads((data / "schema.json").read_text())["id_counts"]["test"]
    unknown = sum(each["out_of_vocabulary"] for each in counts.values())
    assert result["test_out_of_vocabulary"] == pytest.approx(unknown / (2 * result["test_rows"]))
    assert result["dense_arch_varies"] is True

    mlet("export", tmp_path / "run", "--out", tmp_path / "export", "--outputs", "dcp", "safetensors")
    tensors = {}
    for file in (tmp_path / "export" / "safetensors").glob("*.safetensors"):
        tensors |= load_file(file)
    (user,) = (tensor for name, tensor in tensors.items() if ".user." in name)
    (shop,) = (tensor for name, tensor in tensors.items() if ".shop." in name)
    assert user[0].eq(0).all()
    assert user[1:].abs().amin(dim=1).gt(0).all()
    assert shop[0].abs().max() > 0  # of values below min_count, which training does see

    done = mlet("evaluate", tmp_path / "export", "--data", data, "--split", "test", "--json")
    assert "out of vocabulary (id 0): user 100%" in done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    shares = {name: each["out_of_vocabulary"] / each["ids"] for name, each in counts.items()}
    assert found["out_of_vocabulary"] == pytest.approx({name: share for name, share in shares.items() if share})


def test_an_undefined_auc_is_null_and_said(tmp_path: Path) -> None:
    data = prepared(tmp_path, lambda row: row % 3 == 0 if row < 1000 else 0)
    overrides = (*SMALL, f"data.path={data}", f"run.dir={tmp_path / 'run'}", "train.log_every=5")
    done = mlet("train", CONFIG, *overrides, "--json")
    assert f"warning: {data}: all 121 rows of test have label 0, so its AUC is undefined" in done.stderr
    for text in (done.stdout.splitlines()[-1], (tmp_path / "run" / "summary.json").read_text()):
        summary = json.loads(text, parse_constant=pytest.fail)  # NaN is no JSON
        assert summary["test_auc"] is None
        assert 0 < summary["valid_auc"] < 1
        assert summary["test_logloss"] > 0
    again = mlet("train", CONFIG, *overrides, "--once")
    assert ["test_auc", "undefined"] in [line.split() for line in again.stdout.splitlines()]
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)

    mlet("export", tmp_path / "run", "--out", tmp_path / "export", "--outputs", "dcp")
    one_class = f"mlet: warning: {data}: all 121 rows of test have label 0"
    verify = ("verify", tmp_path / "export", "--run", tmp_path / "run", "--data", data, "--split", "test")
    done = mlet(*verify)
    assert one_class in done.stderr
    assert "undefined" in done.stdout
    assert "nan" not in done.stdout
    done = mlet("evaluate", tmp_path / "run", "--data", data, "--split", "test", "--json")
    assert one_class in done.stderr
    assert json.loads(done.stdout.splitlines()[-1], parse_constant=pytest.fail)["auc"] is None
    mlet("export", tmp_path / "run", "--out", tmp_path / "small", "--outputs", "int8")
    command = ("verify", tmp_path / "small", "--run", tmp_path / "run", "--data", data, "--split", "test")
    error = mlet(*command, expect=2).stderr.splitlines()[-1]
    assert "all 121 rows of test have label 0" in error
    assert "quantised tables are compared by their AUC" in error


def test_training_rows_of_one_class_are_an_error_for_every_command(data: Path, tmp_path: Path) -> None:
    """A data set that another program wrote, or an earlier version."""
    overrides = (*SMALL, "train.max_steps=2", f"run.dir={tmp_path / 'run'}")
    mlet("train", CONFIG, *overrides, f"data.path={data}")
    other = Path(shutil.copytree(data, tmp_path / "other"))
    schema = json.loads((other / "schema.json").read_text())
    for part in schema["parts"]["train"]:
        part["positives"] = part["rows"]
    write_schema(other, schema)
    message = f"mlet: error: {other}: all 962 rows of train have label 1, so a model can learn nothing from them"
    for command in (
        ("train", CONFIG, *SMALL, f"run.dir={tmp_path / 'new'}", f"data.path={other}"),
        ("evaluate", tmp_path / "run", "--data", other, "--split", "train"),
    ):
        assert message in mlet(*command, expect=2).stderr
    assert not (tmp_path / "new" / "summary.json").exists()
