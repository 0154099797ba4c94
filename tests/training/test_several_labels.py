"""Several labels: prepared with unknown values, summed losses and metrics by label, and every command after that."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn import functional
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.comparison_report import comparison_table
from mlet_dist.data.loading.loader import Batch
from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.models.spec import ModelSpec
from mlet_dist.training.label_metrics import LabelMetrics, undefined_aucs
from mlet_dist.training.step import mean_loss
from tests.helpers.mlet_command import ROOT, error_line, mlet, mlet_json
from tests.helpers.train_in_ranks import Ranks, train_in_ranks
from tests.helpers.two_labels import LABELS, two_labels

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
CPU = torch.device("cpu")
MMOE = ("model.builder=docs.multi_task_network:build", "model.arguments={experts: 3, width: 8}")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return two_labels(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def settings(data: Path) -> tuple[str, ...]:
    return (
        f"data.path={data}",
        "data.batch_size=48",
        "data.eval_batch_size=130",
        "model.embedding_dim=4",
        "model.hidden_dim=8",
        "model.bottom_mlp=[8]",
        "model.top_mlp=[8]",
        "optimizer.name=adagrad",
        "optimizer.learning_rate=0.05",
        "train.epochs=2",
        "train.max_steps=44",
        "train.log_every=10",
        "train.label_weights={conversion: 0.5}",
    )


def test_a_data_set_knows_which_rows_have_a_label(data: Path, tmp_path: Path) -> None:
    schema = DatasetSchema.load(data)
    assert schema.labels == ("click", "conversion")
    assert json.loads((data / "schema.json").read_text())["label"] == ["click", "conversion"]
    for split, counts in schema.label_counts.items():
        rows = [pq.read_table(data / part.path) for part in schema.parts[split]]
        click, conversion = (
            np.concatenate([table[name].to_numpy(zero_copy_only=False) for table in rows]) for name in schema.labels
        )
        assert counts["click"] == (click.sum(), len(click))
        assert np.array_equal(np.isnan(conversion.astype(float)), click == 0)
        assert counts["conversion"] == (np.nansum(conversion.astype(float)), click.sum())
    check(data)
    (tmp_path / "raw").mkdir()
    described = two_labels(tmp_path / "raw", label={"column": "click"})
    assert json.loads((described / "schema.json").read_text())["label"] == "label"
    assert "label_counts" not in (described / "schema.json").read_text()
    assert '"name": null' not in (described / "manifest.json").read_text()


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (LABELS[:1], "label is 'a list of 1'; it must be a section, or a list of two labels or more"),
        ([LABELS[0], LABELS[0]], r"label is \['click', 'click'\]; it must be labels of different names"),
        ([LABELS[0], {"column": "conv", "name": "my conv"}], "my conv'; it must be a name of letters, digits and _"),
        ({"column": "click", "missing": "unknown"}, "label.missing is not a valid key here .*it goes with a list"),
        ([LABELS[0], {"column": "conv", "name": "a"}], r"two features are named 'a' \(click, a and sample_weight are"),
        (
            [LABELS[0], {"column": "conv"}],
            "lines are malformed, e.g. line 2: conv is '' instead of 0 or 1; set `missing: unknown`",
        ),
    ],
)
def test_labels_that_are_refused(label: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        two_labels(tmp_path, rows=40, label=label)


def _loss_of_ranks(
    labels: torch.Tensor, logits: torch.Tensor, weights: torch.Tensor | None, factors: list[float], complete: int
) -> tuple[float, torch.Tensor]:
    """Return the loss and the gradient of this rank's share of a global batch, which may be incomplete."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    slots = complete // world_size
    own = slice(rank * slots, (rank + 1) * slots)
    rows = len(labels[own])
    found = torch.zeros(slots, labels.shape[1])
    found[:rows] = logits[own]
    found.requires_grad_()
    padded = torch.zeros(slots, labels.shape[1])
    padded[:rows] = labels[own]
    of_rows = None if weights is None else functional.pad(weights[own], (0, slots - rows))
    none = KeyedJaggedTensor.from_lengths_sync([], torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    batch = Batch(torch.zeros(slots, 0), none, padded, rows, len(labels), of_rows)
    loss = mean_loss(found, batch, complete, factors)
    loss.backward()
    assert found.grad is not None
    return loss.item(), found.grad[:rows]


@pytest.mark.multirank
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("rows", "known"), [(12, 0.4), (7, 0.4), (12, 0.0)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_loss_is_that_of_the_labels_that_rows_have(
    ranks: Ranks, world_size: int, rows: int, known: float, weighted: bool
) -> None:
    random = torch.Generator().manual_seed(rows)
    labels = (torch.rand(rows, 2, generator=random) < 0.5).float()
    labels[torch.rand(rows, generator=random) >= known, 1] = math.nan
    logits = torch.randn(rows, 2, generator=random)
    weights = torch.randint(0, 3, (rows,), generator=random).float() if weighted else None
    factors, complete = [1.0, 0.25], 12
    dense = logits.double().requires_grad_()
    of_rows = torch.ones(rows, dtype=torch.float64) if weights is None else weights.double()
    expected = torch.zeros((), dtype=torch.float64)
    for index, factor in enumerate(factors):
        has = ~labels[:, index].isnan()
        losses = functional.binary_cross_entropy_with_logits(
            dense[has, index], labels[has, index].double(), reduction="none"
        )
        total = of_rows[has].sum()
        if total > 0:
            expected = expected + factor * (losses * of_rows[has]).sum() / total * (rows / complete)
    expected.backward()
    assert dense.grad is not None
    found = ranks(world_size).run(_loss_of_ranks, labels, logits, weights, factors, complete)
    assert sum(loss for loss, _ in found) / world_size == pytest.approx(expected.item(), rel=1e-6)
    gradients = torch.cat([gradient for _, gradient in found]).double() / world_size
    assert torch.allclose(gradients, dense.grad, rtol=1e-5, atol=1e-8)


def _metrics_of_ranks(logits: torch.Tensor, labels: torch.Tensor) -> tuple[dict[str, float], dict[str, float]]:
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    metrics = LabelMetrics(("click", "conversion"), CPU)
    for start in range(rank, len(labels), world_size):
        metrics.update(logits[start : start + 1], labels[start : start + 1])
    restored = LabelMetrics(("click", "conversion"), CPU)
    restored.load_state_dict(metrics.state_dict())
    return metrics.compute(), restored.compute()


@pytest.mark.multirank
@pytest.mark.parametrize("world_size", [1, 3])
def test_metrics_are_those_of_the_rows_that_have_the_label(ranks: Ranks, world_size: int) -> None:
    random = torch.Generator().manual_seed(3)
    labels = (torch.rand(50, 2, generator=random) < 0.4).float()
    labels[labels[:, 0] == 0, 1] = math.nan
    logits = torch.randn(50, 2, generator=random)
    for found, restored in ranks(world_size).run(_metrics_of_ranks, logits, labels):
        assert found == restored
        assert found["rows"] == 50
        for index, name in enumerate(("click", "conversion")):
            has = ~labels[:, index].isnan()
            wide, ones = logits[has, index].double(), labels[has, index].double()
            logloss = functional.binary_cross_entropy_with_logits(wide, ones).item()
            pairs = wide[ones == 1][:, None] - wide[ones == 0]
            rate = ones.mean().item()
            entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
            assert found[f"{name}_logloss"] == pytest.approx(logloss, rel=1e-12)
            assert found[f"{name}_normalized_entropy"] == pytest.approx(logloss / entropy, rel=1e-12)
            assert found[f"{name}_auc"] == pytest.approx((pairs > 0).double().mean().item(), abs=1e-3)
            assert (found[f"{name}_rows"], found[f"{name}_positive_rate"]) == (has.sum(), rate)


def test_a_label_whose_rows_have_no_weight_is_named() -> None:
    metrics = LabelMetrics(("click", "conversion"), CPU, weighted=True)
    labels = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    metrics.update(torch.zeros(2, 2), labels, torch.tensor([1.0, 0.0]))
    (first, second) = undefined_aucs(metrics.compute(), ("click", "conversion"), "logs: test")
    assert first == "logs: test: all rows whose sample_weight is above 0 have label click 0, so its AUC is undefined"
    assert second.endswith("label conversion 1, so its AUC is undefined")


@pytest.fixture(scope="module")
def trained(ranks: Ranks, settings: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run = tmp_path_factory.mktemp("trained") / "run"
    validation = ("train.validate_every=11", "train.keep_best=conversion_logloss", "train.checkpoint_every=20")
    return train_in_ranks(ranks, 2, *settings, *MMOE, *validation, "train.keep_last=9", f"run.dir={run}")


@pytest.mark.multirank
def test_a_run_measures_each_label(trained: dict[str, Any], data: Path) -> None:
    run = Path(trained["run"])
    assert trained["best_metric"] == "valid conversion_logloss"
    assert trained["test_click_auc"] > 0.6
    assert not {"test_auc", "test_logloss"} & set(trained)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train = [each for each in records if each["split"] == "train"]
    for each in train:
        assert each["loss"] == pytest.approx(each["click_loss"] + 0.5 * each["conversion_loss"])
    test = next(each for each in records if each["split"] == "test")
    counts = DatasetSchema.load(data).label_counts["test"]
    assert (test["click_rows"], test["conversion_rows"]) == (counts["click"][1], counts["conversion"][1])
    assert ModelSpec.load(run / "model.json").labels == ("click", "conversion")


@pytest.mark.multirank
def test_a_resumed_run_has_the_same_bits(
    ranks: Ranks, trained: dict[str, Any], settings: tuple[str, ...], tmp_path: Path
) -> None:
    start = Path(trained["run"]) / "checkpoints" / "step-00000020"
    validation = ("train.validate_every=11", "train.keep_best=conversion_logloss")
    again = train_in_ranks(
        ranks, 2, *settings, *MMOE, *validation, f"run.dir={tmp_path / 'run'}", f"train.resume={start}"
    )
    assert again["first_step"] == 20
    assert again["weights_sha256"] == trained["weights_sha256"]
    names = [name for name in trained if name.startswith(("test_", "valid_"))]
    assert [again[name] for name in names] == [trained[name] for name in names]
    three = train_in_ranks(ranks, 3, *settings, *MMOE, f"run.dir={tmp_path / 'three'}")
    assert three["test_conversion_logloss"] == pytest.approx(trained["test_conversion_logloss"], abs=1e-4)


@pytest.mark.multirank
@pytest.mark.parametrize("network", ["dlrm", "dlrm_dcn", "deepfm"])
def test_networks_of_torchrec_predict_every_label(
    ranks: Ranks, settings: tuple[str, ...], network: str, tmp_path: Path
) -> None:
    own = (f"model.name={network}", "model.cross_rank=4", "train.max_steps=20", f"run.dir={tmp_path / 'run'}")
    found = train_in_ranks(ranks, 2, *settings, *own)
    assert 0.5 < found["test_click_logloss"] < 0.75
    assert 0.5 < found["test_conversion_logloss"] < 0.75


@pytest.mark.e2e
def test_from_training_to_serving(trained: dict[str, Any], data: Path, tmp_path: Path) -> None:
    run, export = Path(trained["run"]), tmp_path / "export"
    mlet("export", run, "--out", export, "--outputs", "dcp", "int8", "package", "--package-tables", "dcp")
    verified = mlet_json("verify", export, "--run", run, "--data", data)
    assert verified["ok"]
    assert verified["conversion_auc_run"] == pytest.approx(trained["test_conversion_auc"], abs=1e-4)
    assert set(verified["outputs"]) == {"dcp", "int8", "package/model.pt", "package/model.pt2"}
    assert "package/model.pt2 (conversion)" in mlet("verify", export, "--run", run, "--data", data).stdout
    answer = json.loads((export / "package" / "example_request.json").read_text())["probability"]
    assert np.array(answer).shape == (4, 2)
    assert json.loads((export / "package" / "signature.json").read_text())["labels"] == ["click", "conversion"]
    evaluated = mlet_json("evaluate", export, "--data", data, "--nproc", 2)
    for name in ("click_auc", "conversion_logloss"):
        assert evaluated[name] == pytest.approx(trained[f"test_{name}"], abs=1e-6)
    out = tmp_path / "scores.parquet"
    mlet("predict", run, "--data", data, "--out", out, "--nproc", 2)
    scores = pq.read_table(out)
    names = ["label", "logit", "probability"]
    assert scores.column_names == ["row", *(f"{label}_{name}" for label in ("click", "conversion") for name in names)]
    rows = [pq.read_table(data / part.path) for part in DatasetSchema.load(data).parts["test"]]
    expected = [value for table in rows for value in table["conversion"].to_pylist()]
    assert scores["conversion_label"].to_pylist() == expected
    known = [index for index, value in enumerate(expected) if value is not None]
    probability = scores["conversion_probability"].to_numpy()[known]
    ones = np.array(expected, dtype=float)[known]
    logloss = -(ones * np.log(probability) + (1 - ones) * np.log1p(-probability)).mean()
    assert logloss == pytest.approx(trained["test_conversion_logloss"], abs=1e-5)

    # Raw files have the same scores, with a label less as well.
    lines = (data.parent / "raw.csv").read_text().splitlines()
    rows_of_test = lines[1 : 1 + len(expected)]  # the shares of the splits are written in the order of their names
    found = {}
    for name, columns in (("whole", slice(None)), ("without conv", [0, 2, 3, 4, 5])):
        raw = tmp_path / f"{name}.csv"
        kept = [np.array(line.split(","))[columns] for line in [lines[0], *rows_of_test]]
        raw.write_text("".join(",".join(fields) + "\n" for fields in kept))
        done = mlet("predict", run, "--data", raw, "--out", tmp_path / f"{name}.parquet")
        found[name] = pq.read_table(tmp_path / f"{name}.parquet")
        assert ("has no column 'conv'; the scores have none of the labels" in done.stderr) == (name != "whole")
    assert found["whole"].column_names == scores.column_names
    assert found["whole"]["conversion_label"].to_pylist() == expected
    assert found["without conv"].column_names == [each for each in scores.column_names if not each.endswith("_label")]
    for each in found.values():
        np.testing.assert_allclose(
            each["conversion_logit"].to_numpy(), scores["conversion_logit"].to_numpy(), atol=1e-5
        )


@pytest.mark.e2e
def test_what_does_not_fit_is_one_line(
    trained: dict[str, Any], settings: tuple[str, ...], small_data: Path, tmp_path: Path
) -> None:
    def refused(*overrides: str) -> str:
        return error_line("train", CONFIG, *settings, *overrides, f"run.dir={tmp_path / 'run'}")

    two_tower = ("model.name=two_tower", "model.query_features=[a]", "model.bottom_mlp=[512, 256, 128]")
    assert "model.name two_tower predicts one label, and the data set has click, conversion; use" in refused(*two_tower)
    own = ("model.builder=docs.own_network:build", "model.arguments.hidden=8")
    line = refused(*own)
    assert "the module returned (64,) of torch.float32; it must return logits (64, 2)" in line
    assert line.endswith("for 64 rows and 2 labels")
    assert "has no label 'conversions' (did you mean 'conversion'?)" in refused("train.label_weights.conversions=1")
    line = error_line("evaluate", trained["run"], "--data", small_data)
    assert line.endswith(
        "has one label, and the model predicts the labels click, conversion; prepare the data set with the labels of "
        "the model"
    )


def test_a_comparison_has_columns_of_each_label() -> None:
    arm = {"trained_table_bytes": 8, "served_bytes": {"dcp": 4}, "max_abs_logit_diff": 0.0}
    arm |= {"test_click_auc": 0.75, "test_click_logloss": 0.5, "test_buy_auc": None, "test_buy_logloss": 0.25}
    difference = {"arm": "mlet", "of": "single", "label": "buy"}
    difference |= {name: {"value": 0.0, "low": 0.0, "high": 0.0} for name in ("auc", "logloss")}
    table = comparison_table({"split": "test", "arms": {"single": arm, "mlet": arm}, "differences": [difference]})
    header, _, single, *_ = table.splitlines()
    assert "- MLET against single layer, buy: LogLoss" in table
    assert "| test click AUC | test click LogLoss | test buy AUC | test buy LogLoss |" in header
    assert [cell.strip() for cell in single.split("|")][4:8] == ["0.7500", "0.5000", "undefined", "0.2500"]
