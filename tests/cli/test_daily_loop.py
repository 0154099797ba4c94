"""Three days of new rows: each is encoded like the day before, measured with its model, trained on and exported."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from mlet_dist.data.schema import DatasetSchema
from tests.helpers.mlet_command import error_line, mlet, mlet_json

pytestmark = pytest.mark.e2e

CONFIG = """
data: {batch_size: 50}
model: {embedding_dim: 4, hidden_dim: 8, bottom_mlp: [8], top_mlp: [8]}
optimizer: {name: adagrad, learning_rate: 0.05}
"""
DESCRIPTION = """
format: csv
label: {column: click}
dense: [{column: price, transform: standardise}]
sparse: [{column: user, min_count: 2}, {column: item, min_count: 2}]
split: {by: rows, shares: {train: 0.8, test: 0.2}}
"""
METRICS = ("auc", "logloss", "rows", "positive_rate", "out_of_vocabulary")


def write_day(path: Path, day: int) -> Path:
    rng = random.Random(day)
    lines = ["click,price,user,item"]
    for _ in range(400):
        user, item = rng.randrange(30) + 8 * day, rng.randrange(12)
        click = int(rng.random() < 0.1 + 0.8 * (user % 3 == item % 3))
        lines.append(f"{click},{rng.gauss(day, 2):.3f},u{user},i{item}")
    file = path / f"day{day}.csv"
    file.write_text("\n".join(lines))
    return file


def metrics(run: Path, data: Path, split: str = "train") -> dict[str, Any]:
    found = mlet_json("evaluate", run, "--data", data, "--split", split)
    return {key: found[key] for key in METRICS}


def test_three_days(tmp_path: Path) -> None:
    data, runs = ([None, *(tmp_path / f"{name}{day}" for day in (1, 2, 3))] for name in ("data", "run"))
    (tmp_path / "table.yaml").write_text(DESCRIPTION)
    (tmp_path / "config.yaml").write_text(CONFIG)
    days = [write_day(tmp_path, day) for day in (1, 2, 3)]
    mlet("prepare", "table", days[0], "--schema", tmp_path / "table.yaml", "--out", data[1])
    train = ("train", tmp_path / "config.yaml")
    mlet(*train, f"data.path={data[1]}", f"run.dir={runs[1]}")
    for day, setting in ((2, "train.initial_weights"), (3, "train.resume")):
        raw, before, now = days[day - 1], data[day - 1], data[day]
        made = mlet_json("prepare", "table", "--train", raw, "--like", before, "--grow", "--out", now)
        assert made["rows"] == {"train": 400}
        assert made["new_ids"] > 0
        # Unknown ids are taken as those of a data set that has not grown: the same bits.
        mlet("prepare", "table", "--test", raw, "--like", before, "--out", tmp_path / f"alike{day}")
        measured = metrics(runs[day - 1], now)
        assert measured == metrics(runs[day - 1], tmp_path / f"alike{day}", "test")
        assert 0 < measured["out_of_vocabulary"]["user"] < 1
        result = mlet_json(*train, f"data.path={now}", f"run.dir={runs[day]}", f"{setting}={runs[day - 1]}")
        assert (result["first_step"], result["steps"]) == (0, 8)
        # The model that was trained on these rows knows them better, and all of their ids with two rows.
        trained = metrics(runs[day], now)
        assert trained["logloss"] < measured["logloss"]
        assert trained["out_of_vocabulary"].get("user", 0) < measured["out_of_vocabulary"]["user"]
    mlet("export", runs[3], "--out", tmp_path / "export")
    for day in (1, 2, 3):
        split = "test" if day == 1 else "train"
        assert mlet_json("verify", tmp_path / "export", "--run", runs[3], "--data", data[day], "--split", split)["ok"]
    of_export, of_run = (metrics(each, data[1], "test") for each in (tmp_path / "export", runs[3]))
    assert of_export.pop("out_of_vocabulary") == of_run.pop("out_of_vocabulary")
    assert of_export == pytest.approx(of_run, abs=1e-6)
    ids = [DatasetSchema.load(each).vocabulary_id for each in data[1:] if each is not None]
    assert json.loads((tmp_path / "data3" / "schema.json").read_text())["extends"] == ids[:2]
    line = error_line(*train, f"data.path={tmp_path / 'alike2'}", f"run.dir={tmp_path / 'x'}")
    assert "has no train split" in line
