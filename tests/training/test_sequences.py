"""A network that attends over a history, docs/din_network.py, through the commands, as a user runs it."""

import random
from pathlib import Path

import pytest

from mlet_dist.models.spec import ModelSpec
from tests.helpers.mlet_command import error_line, mlet, mlet_json
from tests.helpers.tables import PLAIN, prepare_table
from tests.helpers.train_in_ranks import Ranks, stopped_after, train_in_ranks

pytestmark = pytest.mark.e2e

DIN = (
    "model.builder=docs.din_network:build",
    "model.sequences=[seen]",
    "model.arguments={candidate: item, history: seen, max_length: 6, hidden: 16}",
)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A config, with data whose label depends on whether the item is among those seen before."""
    folder, rng = tmp_path_factory.mktemp("sequences"), random.Random(4)
    lines = ["y,item,seen,user,few"]
    for _ in range(1500):
        seen = [rng.randrange(30) for _ in range(rng.randrange(7))]
        item = rng.choice(seen) if seen and rng.random() < 0.5 else rng.randrange(30)
        label = int(item in seen) ^ (rng.random() < 0.05)
        lines.append(f"{label},{item},{'|'.join(map(str, seen))},u{rng.randrange(9)},{rng.randrange(2)}")
    (folder / "a.csv").write_text("\n".join(lines) + "\n")
    sparse = [{"column": name} for name in ("item", "user", "few")]
    sparse.append({"column": "seen", "separator": "|", "table": "item"})
    prepare_table(folder / "data", PLAIN | {"sparse": sparse}, [folder / "a.csv"])
    (folder / "c.yaml").write_text("model: {embedding_dim: 8, hidden_dim: 16, bottom_mlp: [8], top_mlp: [8]}\n")
    return (
        folder / "c.yaml",
        f"data.path={folder / 'data'}",
        "data.batch_size=60",
        "optimizer.name=adagrad",
        "optimizer.learning_rate=0.1",
    )


def _data(settings: tuple[object, ...]) -> Path:
    return Path(str(settings[1]).partition("=")[2])


def test_from_the_plan_to_serving(settings: tuple[object, ...], tmp_path: Path) -> None:
    data, run, export = _data(settings), tmp_path / "two", tmp_path / "export"
    training = (*settings, *DIN, "train.epochs=15")
    plan = mlet_json("plan", *training, f"run.dir={run}", "--world-size", 2, "--device", "cpu")
    assert plan["predicted_step_ms"]["compute"] > 0
    assert not any("linear layers" in line for line in plan["summary"])  # the network was measured
    trained = mlet_json("train", *training, f"run.dir={run}", "--nproc", 2)
    assert trained["test_auc"] > 0.85
    spec = ModelSpec.load(run / "model.json")
    assert (spec.tables_prefix, spec.sequences_prefix) == ("bags.", "sequences.")
    assert [table.name for table in spec.tables if table.sequence] == ["item"]
    mlet("export", run, "--out", export, "--outputs", "dcp", "safetensors")
    evaluated = mlet_json("evaluate", export, "--data", data, "--nproc", 2)
    assert evaluated["auc"] == pytest.approx(trained["test_auc"], abs=1e-6)
    assert mlet_json("verify", export, "--run", run, "--data", data)["ok"] is True
    assert [table["name"] for table in mlet_json("spectrum", run)["tables"]] == ["item", "user", "few"]
    mlet("predict", run, "--data", data, "--out", tmp_path / "scores.parquet")
    warm = mlet_json(
        *("train", *settings, *DIN, f"run.dir={tmp_path / 'warm'}", "train.max_steps=1"),
        f"train.initial_weights={run}",
        "optimizer.learning_rate=1e-9",
    )
    assert warm["test_auc"] == pytest.approx(trained["test_auc"], abs=1e-3)
    refused = error_line("export", run, "--out", tmp_path / "refused", "--outputs", "int8")
    assert "model.sequences names features whose vectors are not pooled" in refused
    assert "int8 is asked for" in refused


def test_the_number_of_ranks_changes_nothing_but_rounding(
    ranks: Ranks, settings: tuple[object, ...], tmp_path: Path
) -> None:
    sizes = ("model.embedding_dim=8", "model.hidden_dim=16", "train.max_steps=30", "train.epochs=3")
    overrides = (*map(str, settings[1:]), *DIN, *sizes, "optimizer.learning_rate=0.02")
    found = [train_in_ranks(ranks, size, *overrides, f"run.dir={tmp_path / str(size)}") for size in (1, 2, 3)]
    for each in found:
        assert each["test_logloss"] == pytest.approx(found[0]["test_logloss"], abs=1e-6)


@pytest.mark.parametrize("optimizer", ["adagrad", "adam"])
def test_a_resumed_run_is_bitwise_identical(
    ranks: Ranks, settings: tuple[object, ...], tmp_path: Path, optimizer: str
) -> None:
    sizes = ("model.embedding_dim=8", "model.hidden_dim=16", "train.max_steps=12", "train.checkpoint_every=4")
    overrides = (*map(str, settings[1:]), *DIN, *sizes, f"optimizer.name={optimizer}", "train.keep_last=9")
    whole = train_in_ranks(ranks, 3, *overrides, f"run.dir={tmp_path / 'whole'}")
    run = stopped_after(8, tmp_path / "whole", tmp_path / "run")
    found = train_in_ranks(ranks, 3, *overrides, f"run.dir={run}", "train.pipelined=false")
    assert found["first_step"] == 8
    assert found["weights_sha256"] == whole["weights_sha256"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ("model.builder=null", "model.arguments={}"),
            "model.sequences is [seen]; dlrm pools all vectors: set model.bu",
        ),
        (("model.sequences=[sen]",), "model.sequences: the model has no feature 'sen'; it has item, user, few, seen"),
        (
            ("compression.policy=static",),
            "compression.policy is static, but tables of model.sequences cannot be compre",
        ),
        (("sharding.tables={item: {exchange: after}}",), "table 'item' is not pooled, and its rows only exchange"),
    ],
)
def test_what_sequences_cannot_have_is_one_line(
    settings: tuple[object, ...], changed: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    line = error_line("train", *settings, *DIN, *changed, f"run.dir={tmp_path / 'run'}")
    assert message in line
