"""`mlet predict`: the scores of every row, in order, from any number of ranks."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed import checkpoint as dcp

from mlet_dist.data.loading.loader import DataLoader
from mlet_dist.models.build import build_serving_model
from mlet_dist.models.spec import ModelSpec
from tests.conftest import TrainedRun
from tests.helpers.mlet_command import error_line, mlet, mlet_json

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def scores(trained: TrainedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scores of the test split by one rank."""
    out = tmp_path_factory.mktemp("scores") / "scores.parquet"
    result = mlet_json("predict", trained.path, "--data", trained.data, "--out", out)
    assert result == {
        "target": str(trained.path),
        "step": trained.result["steps"],
        "split": "test",
        "out": str(out),
        "rows": trained.result["test_rows"],
    }
    return out


def test_scores_are_those_of_the_served_model_in_the_order_of_the_data_set(
    trained: TrainedRun, scores: Path, tmp_path: Path
) -> None:
    export = tmp_path / "export"
    mlet("export", trained.path, "--out", export)
    model = build_serving_model(ModelSpec.load(trained.path / "model.json"))
    state = model.state_dict()
    dcp.load(state, checkpoint_id=export / "model")
    model.load_state_dict(state)
    table = pq.read_table(scores)
    assert table.column_names == ["row", "label", "logit", "probability"]
    assert table["row"].to_pylist() == list(range(trained.result["test_rows"]))
    found = {name: torch.from_numpy(table[name].to_numpy().copy()) for name in table.column_names}
    start = 0
    for batch in DataLoader(
        trained.data, "test", batch_size=100, rank=0, world_size=1, dense_features=None, sparse_features=None
    ):
        rows = slice(start, start + batch.num_rows)
        start += batch.num_rows
        with torch.no_grad():
            expected = model(batch.dense, batch.sparse).reshape(-1)[: batch.num_rows]
        torch.testing.assert_close(found["logit"][rows], expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(found["label"][rows], batch.labels[: batch.num_rows])
    assert start == len(found["row"])
    assert torch.equal(found["probability"], torch.sigmoid(found["logit"]))


def test_metrics_of_the_scores_are_those_of_evaluate(trained: TrainedRun, scores: Path) -> None:
    evaluated = mlet_json("evaluate", trained.path, "--data", trained.data)
    table = pq.read_table(scores)
    logits, labels = (table[name].to_numpy().astype(np.float64) for name in ("logit", "label"))
    losses = np.logaddexp(0, logits) - labels * logits
    assert losses.mean() == pytest.approx(evaluated["logloss"], rel=1e-9)
    positive, negative = logits[labels == 1], logits[labels == 0]
    pairs = positive[:, None] - negative[None, :]
    # Logits within one of BinaryMetrics' 2^20 bins of [-30, 30] tie: each such pair counts half more or less.
    ties = ((pairs != 0) & (np.abs(pairs) < 60 / 2**20)).mean() / 2
    assert ((pairs > 0) + (pairs == 0) / 2).mean() == pytest.approx(evaluated["auc"], abs=ties + 1e-12)


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same_rows(
    trained: TrainedRun, scores: Path, ranks: int, tmp_path: Path
) -> None:
    out = tmp_path / "scores.parquet"
    mlet("predict", trained.path, "--data", trained.data, "--out", out, "--nproc", ranks)
    found, expected = pq.read_table(out), pq.read_table(scores)
    assert found.drop(["logit", "probability"]).equals(expected.drop(["logit", "probability"]))
    for name in ("logit", "probability"):  # matrix products of fewer rows round differently
        np.testing.assert_allclose(found[name].to_numpy(), expected[name].to_numpy(), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_written_is_one_line(trained: TrainedRun, scores: Path, tmp_path: Path) -> None:
    before = scores.read_bytes()
    command = ("predict", trained.path, "--data", trained.data, "--out")
    assert error_line(*command, scores) == f"mlet: error: {scores}: exists; name another file, or remove it"
    assert scores.read_bytes() == before
    nowhere = tmp_path / "nowhere" / "scores.parquet"
    line = error_line(*command, nowhere)
    assert line == f"mlet: error: {nowhere}: {nowhere.parent} is no directory; create it first"
    line = error_line("predict", tmp_path, "--data", trained.data, "--out", tmp_path / "new.parquet")
    assert "expected the directory of a run or an export" in line
    assert not list(tmp_path.iterdir())
