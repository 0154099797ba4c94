"""Training, exporting and verifying a model whose features share a table, as a user does it."""

import random
from pathlib import Path

import pytest

from tests.helpers.mlet_command import mlet_json
from tests.helpers.tables import PLAIN, prepare_table

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose label depends on whether the item is among those seen before."""
    folder, rng = tmp_path_factory.mktemp("shared"), random.Random(4)
    lines = ["y,item,seen,user"]
    for _ in range(900):
        seen = rng.sample(range(30), rng.randrange(4))
        item = rng.choice(seen) if seen and rng.random() < 0.5 else rng.randrange(30)
        lines.append(
            f"{int(item in seen) ^ (rng.random() < 0.1)},{item},{'|'.join(map(str, seen))},u{rng.randrange(9)}"
        )
    (folder / "a.csv").write_text("\n".join(lines) + "\n")
    sparse = [{"column": "item"}, {"column": "user"}, {"column": "seen", "separator": "|", "table": "item"}]
    prepare_table(folder / "data", PLAIN | {"sparse": sparse}, [folder / "a.csv"])
    return folder / "data"


@pytest.mark.parametrize("exchange", ["after", "reduce_scatter", "unique_rows"])
def test_a_shared_table_is_trained_exported_and_verified(data: Path, tmp_path: Path, exchange: str) -> None:
    (tmp_path / "c.yaml").write_text("model: {embedding_dim: 4, hidden_dim: 8, bottom_mlp: [8], top_mlp: [8]}\n")
    settings = [tmp_path / "c.yaml", f"data.path={data}", "data.batch_size=50", f"sharding.exchange={exchange}"]
    settings += ["train.epochs=2", "optimizer.name=adagrad", "optimizer.learning_rate=0.05"]
    together = mlet_json("train", *settings, f"run.dir={tmp_path / 'two'}", "--nproc", 2)
    if exchange == "unique_rows":
        alone = mlet_json("train", *settings, f"run.dir={tmp_path / 'one'}")
        assert together["test_logloss"] == pytest.approx(alone["test_logloss"], abs=2e-6)
        result = mlet_json("spectrum", tmp_path / "two")
        assert [table["name"] for table in result["tables"]] == ["item", "user"]
        assert result["tables"][0]["rows_seen"] == 30
    outputs = ("--outputs", "dcp", "package") if exchange == "after" else ()
    mlet_json("export", tmp_path / "two", "--out", tmp_path / "export", *outputs)
    evaluated = mlet_json("evaluate", tmp_path / "export", "--data", data)
    assert evaluated["logloss"] == pytest.approx(together["test_logloss"], abs=2e-6)
    assert mlet_json("verify", tmp_path / "export", "--run", tmp_path / "two", "--data", data)["ok"] is True
