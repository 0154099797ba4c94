"""An export carries what raw rows need, and raw files get the scores of the same rows that were prepared."""

import gzip
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import distributed as dist

from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.export.raw_data import prepared_rows
from mlet_dist.training.process_group import Worker
from tests.helpers.mlet_command import ROOT, error_line, mlet, mlet_json
from tests.helpers.ranks import RankPool
from tests.helpers.raw_logs import COLUMNS, make_raw_lines, raw_bytes

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def criteo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with raw rows of two days, the data set and a run of the first, and its export with a package."""
    path = tmp_path_factory.mktemp("criteo")
    (path / "day1").write_bytes(raw_bytes(make_raw_lines(900, seed=1)))
    (path / "day2").write_bytes(raw_bytes(make_raw_lines(300, seed=2, distinct=60)))
    mlet("prepare", "criteo", path / "day1", "--out", path / "data")
    mlet("prepare", "criteo", "--test", path / "day2", "--like", path / "data", "--out", path / "like")
    sizes = ("model.embedding_dim=4", "model.hidden_dim=8", "model.bottom_mlp=[8]", "model.top_mlp=[8]")
    settings = (*sizes, f"data.path={path / 'data'}", "data.batch_size=64", f"run.dir={path / 'run'}")
    mlet("train", ROOT / "configs" / "criteo_kaggle_adagrad.yaml", *settings)
    done = mlet(
        "export", path / "run", "--out", path / "export", "--outputs", "dcp", "package", "--package-tables", "dcp"
    )
    assert "warning" not in done.stderr
    mlet("predict", path / "run", "--data", path / "like", "--out", path / "scores.parquet")
    return path


def scores(path: Path, target: Path, raw: Path, *options: object) -> pa.Table:
    out = path / "raw.parquet"
    out.unlink(missing_ok=True)
    result = mlet_json("predict", target, "--data", raw, "--out", out, *options)
    assert (result["rows"], "split" in result) == (pq.read_metadata(out).num_rows, False)
    return pq.read_table(out)


def test_raw_files_get_the_scores_of_the_rows_that_were_prepared(criteo: Path, tmp_path: Path) -> None:
    expected = pq.read_table(criteo / "scores.parquet")
    with gzip.open(tmp_path / "packed", "wb") as file:
        file.write((criteo / "day2").read_bytes())
    assert scores(tmp_path, criteo / "run", tmp_path / "packed").equals(expected)
    of_export = scores(tmp_path, criteo / "export", criteo / "day2")
    prepared = tmp_path / "prepared.parquet"
    mlet("predict", criteo / "export", "--data", criteo / "like", "--out", prepared)
    assert of_export.equals(pq.read_table(prepared))
    unlabelled = tmp_path / "logs"
    unlabelled.mkdir()
    lines = (criteo / "day2").read_text().splitlines(keepends=True)
    for name, part in (("part-10", lines[130:]), ("part-2", lines[:130])):
        (unlabelled / name).write_text("".join(line.partition("\t")[2] for line in part))
    two_ranks = scores(tmp_path, criteo / "export", unlabelled, "--nproc", 2)
    assert two_ranks.column_names == ["row", "logit", "probability"]
    torch.testing.assert_close(
        *(torch.from_numpy(each["logit"].to_numpy().copy()) for each in (two_ranks, of_export)), rtol=1e-5, atol=1e-6
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "packed", "prepared.parquet", "raw.parquet"]


def _fail_on_rank_0(path: Path, out: Path) -> str:
    """Return the error of this rank: rank 0 fails alone, while rank 1 waits for it as in a collective."""
    rank, received = dist.get_rank(), torch.zeros(1)
    worker = Worker(rank, dist.get_world_size(), dist.get_world_size(), torch.device("cpu"))
    try:
        with prepared_rows(str(path / "day2"), lambda: LikeDataset.open(str(path / "data")), out, worker):
            if rank == 0:
                raise OSError("the disk is full")
            dist.recv(received, src=0)
            raise OSError("rank 0 failed")
    except OSError as error:
        if rank == 0:
            dist.send(torch.ones(1), dst=1)
        return str(error)


@pytest.mark.multirank
def test_a_rank_that_fails_does_not_wait_for_the_others(
    criteo: Path, tmp_path: Path, ranks: Callable[[int], RankPool]
) -> None:
    found = ranks(2).run(_fail_on_rank_0, criteo, tmp_path / "scores.parquet")
    assert found == ["the disk is full", "rank 0 failed"]
    assert list(tmp_path.iterdir()) == []


def test_raw_rows_get_the_same_from_the_package(criteo: Path, tmp_path: Path) -> None:
    lines = (criteo / "day2").read_text().splitlines()
    rows = [dict(zip(COLUMNS, line.split("\t"), strict=True)) for line in lines]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    code = (
        "import sys, runpy; sys.modules['mlet_dist'] = sys.modules['torchrec'] = sys.modules['pyarrow'] = None; "
        "sys.argv.pop(0); sys.exit(runpy.run_path(sys.argv[0])['main']())"
    )
    command = [sys.executable, "-c", code, criteo / "export" / "package" / "serve.py"]
    done = subprocess.run([*command, tmp_path / "rows.json"], check=True, capture_output=True, text=True, timeout=120)
    found = torch.tensor(json.loads(done.stdout)["probability"])
    expected = pq.read_table(criteo / "scores.parquet")["probability"].to_numpy().copy()
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=0, atol=1e-6)
    del rows[7]["I3"]
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    done = subprocess.run([*command, tmp_path / "rows.json"], check=False, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.strip() == "row 7 lacks the column 'I3'; a missing value is None"


def test_the_examples_of_the_documentation(criteo: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "raw_values.md").read_text()
    (tmp_path / "exports").mkdir()
    (tmp_path / "exports" / "criteo").symlink_to(criteo / "export")
    python = page.partition("```python\n")[2].partition("```")[0]
    program = tmp_path / "example.py"
    program.write_text(
        python + "found = encoder.encode(rows)\nprint(*found.dense[0], *found.ids)\nprint(probabilities)\n"
    )
    done = subprocess.run(
        [sys.executable, program], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120
    )
    inputs, probabilities = done.stdout.splitlines()
    assert 0 < float(probabilities.partition("[")[2].partition("]")[0]) < 1
    if shutil.which("g++") is None:
        pytest.skip("requires a C++ compiler")
    (tmp_path / "example.cpp").write_text(page.partition("```cpp\n")[2].partition("```")[0])
    subprocess.run(["g++", "-std=c++17", "example.cpp", "-o", "example"], cwd=tmp_path, check=True, timeout=300)
    done = subprocess.run([tmp_path / "example"], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
    assert [float(each) for each in done.stdout.split()] == pytest.approx([float(each) for each in inputs.split()])


def test_verify_finds_a_damaged_vocabulary(criteo: Path, tmp_path: Path) -> None:
    export = shutil.copytree(criteo / "export", tmp_path / "export")
    command = ("verify", export, "--run", criteo / "run", "--data", criteo / "data")
    assert mlet_json(*command)["ok"]
    file = export / "preprocessing" / "C9.vocabulary"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    problem = f"mlet: error: {file.parent}: C9.vocabulary"
    assert error_line(*command).startswith(problem)
    predicting = ("predict", export, "--data", criteo / "day2", "--out", tmp_path / "x.parquet")
    assert error_line(*predicting).startswith(problem)


def test_an_export_without_the_data_set_says_so(criteo: Path, tmp_path: Path) -> None:
    run, data, moved = criteo / "run", criteo / "data", tmp_path / "moved"
    predicting = ("--data", criteo / "day2", "--out", tmp_path / "x.parquet")
    data.rename(moved)
    try:
        done = mlet("export", run, "--out", tmp_path / "without")
        [warning] = [line for line in done.stderr.splitlines() if line.startswith("mlet: warning")]
        assert warning == (
            f"mlet: warning: {run}: the export carries no vocabularies and rules for raw rows: {data}: no such data set"
            "; run `mlet prepare` to make one; name the data set with --preprocessing, or give --preprocessing none"
        )
        assert f"{data}: no such data set" in error_line("predict", run, *predicting)
        done = mlet("export", run, "--out", tmp_path / "with", "--preprocessing", moved)
    finally:
        moved.rename(data)
    assert sorted(path.name for path in (tmp_path / "without").iterdir()) == ["manifest.json", "model"]
    line = error_line("predict", tmp_path / "without", *predicting)
    assert f"{tmp_path / 'without'}: carries no preprocessing, which raw rows need; export again with" in line
    assert "warning" not in done.stderr
    for file in sorted((criteo / "export" / "preprocessing").iterdir()):
        assert (tmp_path / "with" / "preprocessing" / file.name).read_bytes() == file.read_bytes()
    done = mlet("export", run, "--out", tmp_path / "none", "--preprocessing", "none")
    assert "warning" not in done.stderr
    assert not (tmp_path / "none" / "preprocessing").exists()
    mlet("prepare", "criteo", criteo / "day2", "--out", tmp_path / "other")
    line = error_line("export", run, "--out", tmp_path / "x", "--preprocessing", tmp_path / "other")
    assert f"{tmp_path / 'other'}: feature 'C" in line
    assert not (tmp_path / "x").exists()


def test_what_cannot_be_scored_is_one_line(criteo: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "x.parquet")
    raw = criteo / "day2"
    line = error_line("predict", criteo / "run", "--data", raw, "--split", "test", *out)
    assert (
        line == f"mlet: error: {raw}: is no data set, and --split names a split of one; leave out --split for raw files"
    )
    (tmp_path / "cut").write_bytes(raw.read_bytes()[:-40])
    done = mlet("predict", criteo / "run", "--data", tmp_path / "cut", *out, expect=2)
    assert f"{tmp_path / 'cut'}: 1 lines are malformed, so that scores would not be" in done.stderr.splitlines()[-1]
    (tmp_path / "empty").mkdir()
    assert "no schema.json in it" in error_line("predict", criteo / "run", "--data", tmp_path / "empty", *out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut", "empty"]


TABLE = """
format: csv
label: {column: clicked, positive: ["yes"], negative: ["no"]}
sample_weight: importance
dense:
  - {column: price, transform: standardise, missing: mean}
  - {column: age, missing_values: ["-1"]}
sparse:
  - {column: user, min_count: 2}
  - {column: city, encoding: hash, num_embeddings: 50}
  - {column: tags, separator: "|", weight_separator: ":"}
  - {column: seen, separator: "|", table: user, min_count: 2}
"""
TABLE_COLUMNS = ("clicked", "importance", "price", "age", "user", "city", "tags", "seen")


def _table(path: Path, rows: int, without: tuple[str, ...] = ()) -> Path:
    rng = random.Random(rows)
    lines = []
    for row in range(rows):
        values = {
            "clicked": "yes" if rng.random() < 0.4 else "no",
            "importance": str(rng.randrange(1, 4)),
            "price": "" if row % 7 == 0 else str(rng.randrange(1000) / 8),
            "age": str(rng.randrange(-1, 90)),
            "user": f"u{rng.randrange(rows // 3)}",
            "city": rng.choice(["Zürich", "東京", "", " Paris"]),
            "tags": "|".join(f"t{rng.randrange(9)}:{rng.random():.3f}" for _ in range(row % 4)),
            "seen": "|".join(f"u{rng.randrange(rows // 3)}" for _ in range(row % 3)),
        }
        lines.append(",".join(values[name] for name in TABLE_COLUMNS if name not in without))
    names = ",".join(name for name in TABLE_COLUMNS if name not in without)
    path.write_text("\n".join([names, *lines]) + "\n")
    return path


def test_tables_with_labels_and_weights_or_without(tmp_path: Path) -> None:
    """A model of a part of the columns, in another order, of a data set that has grown."""
    (tmp_path / "table.yaml").write_text(TABLE)
    day1, day2 = _table(tmp_path / "day1.csv", 400), _table(tmp_path / "day2.csv", 500)
    mlet("prepare", "table", day1, "--schema", tmp_path / "table.yaml", "--out", tmp_path / "data1")
    grown = ("--like", tmp_path / "data1", "--grow", "--out", tmp_path / "data2")
    mlet("prepare", "table", "--train", day2, *grown)
    sizes = ("model.embedding_dim=4", "model.hidden_dim=8", "model.bottom_mlp=[8]", "model.top_mlp=[8]")
    columns = ("data.dense_features=[age,price]", "data.sparse_features=[seen,tags,user]")
    settings = (
        *sizes,
        *columns,
        f"data.path={tmp_path / 'data2'}",
        "data.batch_size=50",
        f"run.dir={tmp_path / 'run'}",
    )
    mlet("train", ROOT / "configs" / "criteo_kaggle_adagrad.yaml", *settings)
    mlet("export", tmp_path / "run", "--out", tmp_path / "export")
    raw = _table(tmp_path / "day3.csv", 300)
    mlet("prepare", "table", "--test", raw, "--like", tmp_path / "data2", "--out", tmp_path / "data3")
    mlet("predict", tmp_path / "run", "--data", tmp_path / "data3", "--out", tmp_path / "expected.parquet")
    expected = pq.read_table(tmp_path / "expected.parquet")
    assert expected.column_names == ["row", "label", "logit", "probability", "weight"]
    assert len(set(expected["logit"].to_pylist())) > 200
    labelled = scores(tmp_path, tmp_path / "run", raw)
    assert labelled.equals(expected.drop(["weight"]))
    bare = _table(tmp_path / "bare.csv", 300, without=("clicked", "importance", "city"))
    unlabelled = scores(tmp_path, tmp_path / "export", bare)
    assert unlabelled.column_names == ["row", "logit", "probability"]
    assert unlabelled["logit"].equals(expected["logit"])
    rules = json.loads((tmp_path / "export" / "preprocessing" / "preprocessing.json").read_text())
    assert rules["columns"] == ["age", "price", "seen", "tags", "user"]
    assert [each["name"] for each in rules["dense"] + rules["sparse"]] == rules["columns"]
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(raw.read_text().replace("price", "cost", 1))
    command = ("predict", tmp_path / "run", "--data", renamed, "--out", tmp_path / "x.parquet")
    assert error_line(*command).startswith(
        f"mlet: error: {renamed}: line 1: the header has no column 'price'; it has cl"
    )
