"""Every network through the commands: trained on two ranks, exported, verified, and served without mlet_dist."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlet_dist.models.spec import TABLES_PREFIX, ModelSpec
from tests.helpers.mlet_command import ROOT, error_line, mlet, mlet_json

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
NETWORKS = {
    "dlrm_dcn": ("model.name=dlrm_dcn", "model.cross_layers=2", "model.cross_rank=3"),
    "deepfm": ("model.name=deepfm", "model.fm_dim=6"),
    "two_tower": (
        "model.name=two_tower",
        "model.query_features=[C1, C3]",
        "model.top_mlp=[16, 8]",
        "model.tables.C3.embedding_dim=8",
    ),
    "own": ("model.builder=docs.own_network:build", "model.arguments.hidden=16", "model.tables.C1?.embedding_dim=8"),
}


@pytest.mark.parametrize("network", NETWORKS)
def test_from_training_to_serving(network: str, small_model: tuple[str, ...], small_data: Path, tmp_path: Path) -> None:
    run, export = tmp_path / "run", tmp_path / "export"
    adagrad = ("optimizer.name=adagrad", "optimizer.learning_rate=0.05", "train.max_steps=40")
    settings = (*small_model, *NETWORKS[network], *adagrad, f"run.dir={run}")
    plan = mlet_json("plan", CONFIG, *settings, "--world-size", 2, "--device", "cpu")
    assert plan["predicted_step_ms"]["compute"] > 0
    trained = mlet_json("train", CONFIG, *settings, "--nproc", 2)
    assert trained["steps"] == 40
    assert trained["test_auc"] > 0.55
    spec = ModelSpec.load(run / "model.json")
    assert spec.tables_prefix == ("tables." if network == "own" else TABLES_PREFIX)
    mlet("export", run, "--out", export, "--outputs", "dcp", "int8", "package", "--package-tables", "dcp")
    verified = mlet_json("verify", export, "--run", run, "--data", small_data)
    assert verified["ok"]
    assert set(verified["outputs"]) == {"dcp", "int8", "package/model.pt", "package/model.pt2"}
    evaluated = mlet_json("evaluate", export, "--data", small_data, "--nproc", 2)
    assert evaluated["auc"] == pytest.approx(trained["test_auc"], abs=1e-6)
    served = serve_without_mlet_dist(network, tmp_path)
    assert served["package"] == pytest.approx(served["expected"], abs=1e-6)
    if network == "own":
        assert served["module"] == pytest.approx(served["expected"], abs=1e-6)


_SERVER = """
import json, sys
sys.modules["mlet_dist"] = None  # importing it raises ModuleNotFoundError
import fbgemm_gpu, torch
from types import SimpleNamespace
from torch.distributed import checkpoint as dcp
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor

request = json.load(open("export/package/example_request.json"))
dense, ids = torch.tensor(request["dense"]), torch.tensor(request["ids"])
lengths = torch.tensor(request["lengths"])
found = {"expected": request["probability"]}
found["package"] = torch.jit.load("export/package/model.pt")(dense, ids, lengths).tolist()
if sys.argv[1] == "own":
    import own_network
    manifest = json.load(open("export/manifest.json"))
    tables = [
        EmbeddingBagConfig(
            name=each["name"], num_embeddings=each["num_embeddings"], embedding_dim=each["embedding_dim"],
            feature_names=[each["name"]],
        )
        for each in manifest["tables"]
    ]
    features = [table.name for table in tables]
    inputs = SimpleNamespace(
        embedding_bag_collection=EmbeddingBagCollection(tables), sparse_features=features,
        dense_features=manifest["model"]["dense"], embedding_dims={each.name: each.embedding_dim for each in tables},
        arguments=manifest["model"]["model"]["arguments"],
    )
    model = own_network.build(inputs)
    state = model.state_dict()
    dcp.load(state, checkpoint_id="export/model")
    bags = KeyedJaggedTensor(features, ids, lengths=lengths.flatten())
    found["module"] = torch.sigmoid(model(dense, bags)).tolist()
print(json.dumps(found))
"""


def serve_without_mlet_dist(network: str, directory: Path) -> dict[str, Any]:
    """Answer the package's example request by the package, and by the user's own module around TorchRec's tables."""
    done = subprocess.run(
        [sys.executable, "-c", _SERVER, network],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT / "docs")},
        capture_output=True,
        text=True,
        timeout=240,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("model.builder=no_such:build",), "model.builder: no_such cannot be imported: ModuleNotFoundError: No module"),
        (("model.builder=docs.own_network:build",), "model.builder: docs.own_network:build failed: KeyError: 'hidden'"),
        (("model.builder=own_network",), "model.builder is own_network; it is written package.module:function"),
        (("model.name=two_tower",), "model.query_features is null; the two_tower model needs the categorical columns"),
        (("model.name=dcn",), "model.name: expected one of dlrm, dlrm_dcn, deepfm, two_tower, found dcn"),
    ],
)
def test_a_wrong_network_is_one_line(
    small_model: tuple[str, ...], settings: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    line = error_line("train", CONFIG, *small_model, *settings, f"run.dir={run}")
    assert message in line
    assert not run.exists()


def test_a_network_that_cannot_be_traced_is_trained_in_the_plain_loop(
    small_model: tuple[str, ...], tmp_path: Path
) -> None:
    settings = (*small_model, "train.max_steps=20", "--nproc", 2, "--json")
    found = {}
    for network in ("choosy", "wide_and_deep"):
        own = (f"model.builder=tests.helpers.own_networks:{network}", f"run.dir={tmp_path / network}")
        found[network] = mlet("train", CONFIG, *own, *settings)
    errors = found["choosy"].stderr
    assert "warning: the network cannot be traced (" in errors
    assert "so that steps follow one another instead of TorchRec's pipeline" in errors
    assert "plan  the network cannot run on meta tensors (" in errors
    assert "the network" not in found["wide_and_deep"].stderr
    assert len({json.loads(each.stdout.splitlines()[-1])["weights_sha256"] for each in found.values()}) == 1
    mlet("export", tmp_path / "choosy", "--out", tmp_path / "out")
    line = error_line("export", tmp_path / "choosy", "--out", tmp_path / "packaged", "--outputs", "package")
    assert "the network cannot be packaged: " in line
    assert line.endswith("can trace it, or leave package out of the outputs")
    assert not (tmp_path / "packaged").exists()
