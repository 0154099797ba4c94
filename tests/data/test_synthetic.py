"""Tests of mlet_dist.data.synthetic."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import log_loss

from mlet_dist.data import parquet_parts
from mlet_dist.data.prepare.pipeline import prepare_criteo
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.data.synthetic import CRITEO_VALUES, _StreamingQuality, synthesize
from mlet_dist.data.synthetic_model import CHUNK_ROWS
from mlet_dist.errors import UserError


def read(path: Path, split: str) -> pa.Table:
    return pa.concat_tables([pq.read_table(path / part.path) for part in DatasetSchema.load(path).parts[split]])


def read_all(path: Path) -> pa.Table:
    return pa.concat_tables([read(path, split) for split in ("train", "valid", "test")])


def content(path: Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def exact_auc(score: npt.NDArray[np.float64], labels: npt.NDArray[np.int8]) -> float:
    positives, negatives = score[labels == 1][:, None], score[labels == 0]
    return float(((positives > negatives) + (positives == negatives) / 2).mean())


@pytest.mark.parametrize("form", ["parquet", "tsv"])
def test_same_seed_same_bytes(tmp_path: Path, form: str) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        synthesize(tmp_path / name, rows=1000, seed=seed, num_embeddings=100, format=form)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")


def test_raw_logs_carry_no_time(tmp_path: Path) -> None:
    synthesize(tmp_path / "out", rows=10, format="tsv")
    assert (tmp_path / "out/part-00000.tsv.gz").read_bytes()[4:8] == bytes(4)


def test_more_rows_begin_with_the_same_rows(tmp_path: Path) -> None:
    for name, rows in (("few", 1000), ("many", CHUNK_ROWS + 1000)):
        synthesize(tmp_path / name, rows=rows, num_embeddings=100)
    many = read_all(tmp_path / "many")
    assert many.num_rows == CHUNK_ROWS + 1000
    assert many.slice(0, 1000).equals(read_all(tmp_path / "few"))
    assert not many.slice(CHUNK_ROWS, 1000).equals(many.slice(0, 1000))


def test_sizes_follow_criteo(dataset: Path) -> None:
    sizes = DatasetSchema.load(dataset).num_embeddings
    assert max(sizes.values()) == 500
    assert min(sizes.values()) == 4
    assert len(set(sizes.values())) > 15
    order = sorted(sizes, key=lambda name: CRITEO_VALUES[int(name[1:]) - 1])
    assert [sizes[name] for name in order] == sorted(sizes.values())


def test_ids_follow_the_power_law(tmp_path: Path) -> None:
    synthesize(tmp_path / "out", rows=50_000, num_embeddings=1000, alpha=1.2)
    counts = np.bincount(read_all(tmp_path / "out")["C3"].to_numpy(), minlength=1000)
    assert counts.size == 1000
    assert counts[0] == 0
    expected = np.arange(1, 1000) ** -1.2
    expected *= 50_000 / expected.sum()
    deviation = (counts[1:51] - expected[:50]) / np.sqrt(expected[:50])
    assert np.abs(deviation).max() < 5


def test_reported_rates_are_those_of_the_rows(tmp_path: Path) -> None:
    report = synthesize(tmp_path / "out", rows=30_000, num_embeddings=1000)
    table = read_all(tmp_path / "out")
    assert report["rows"] == table.num_rows == 30_000
    assert report["positive_rate"] == pytest.approx(table["label"].to_numpy().mean())
    assert report["positive_rate"] == pytest.approx(0.25, abs=0.02)
    assert 0.78 < report["auc_ceiling"] < 0.86
    assert 0.4 < report["logloss_floor"] < 0.45  # that of the positive rate alone is 0.56
    schema = DatasetSchema.load(tmp_path / "out")
    for split in ("train", "valid", "test"):
        assert schema.positive_rate[split] == pytest.approx(read(tmp_path / "out", split)["label"].to_numpy().mean())


def test_labels_can_be_learnt_from_frequent_ids(tmp_path: Path) -> None:
    """The sum of each id's smoothed log-odds, learnt from train, predicts test; shuffled labels would give 0.5."""
    synthesize(tmp_path / "out", rows=60_000, num_embeddings=1000)
    train, test = read(tmp_path / "out", "train"), read(tmp_path / "out", "test")
    labels = train["label"].to_numpy()
    base = labels.mean()
    score = np.zeros(test.num_rows)
    for name, size in DatasetSchema.load(tmp_path / "out").num_embeddings.items():
        ids = train[name].to_numpy()
        rate = (np.bincount(ids, labels, size) + 20 * base) / (np.bincount(ids, minlength=size) + 20)
        score += np.log(rate / (1 - rate))[test[name].to_numpy()]
    assert exact_auc(score, test["label"].to_numpy()) > 0.68


def test_raw_format_holds_the_same_rows(tmp_path: Path) -> None:
    """Preparing the raw logs gives the labels and dense values of the Parquet form, and ids in one-to-one relation."""
    arguments = {"rows": 5000, "seed": 2, "num_embeddings": 300}
    assert synthesize(tmp_path / "direct", **arguments) == synthesize(tmp_path / "raw", **arguments, format="tsv")
    assert [p.name for p in (tmp_path / "raw").iterdir()] == ["part-00000.tsv.gz"]
    schema = prepare_criteo([tmp_path / "raw/part-00000.tsv.gz"], tmp_path / "prepared")
    assert schema.malformed == 0
    for split in ("train", "valid", "test"):
        direct, prepared = read(tmp_path / "direct", split), read(tmp_path / "prepared", split)
        assert direct.schema.equals(prepared.schema)
        assert direct.select(direct.column_names[:14]).equals(prepared.select(direct.column_names[:14]))
        for name in direct.column_names[14:]:
            pairs = {p for p in zip(direct[name].to_pylist(), prepared[name].to_pylist(), strict=True) if p[1]}
            assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_raw_fields_look_like_criteo(tmp_path: Path) -> None:
    synthesize(tmp_path / "raw", rows=2000, format="tsv")
    with gzip.open(tmp_path / "raw/part-00000.tsv.gz", "rt") as text:
        lines = [line.rstrip("\n").split("\t") for line in text]
    assert {len(line) for line in lines} == {40}
    missing = sum(field == "" for line in lines for field in line[1:14]) / (13 * len(lines))
    assert 0.05 < missing < 0.4
    assert all(len(field) == 8 and int(field, 16) >= 0 for line in lines for field in line[14:])


def test_there_is_no_vocabulary(dataset: Path) -> None:
    assert DatasetSchema.load(dataset).source == "synthetic"
    assert not (dataset / "vocabulary").exists()


def test_vocabulary_id_depends_on_what_fixes_the_meaning_of_ids(tmp_path: Path) -> None:
    def id_of(name: str, **changes: float) -> str:
        arguments = {"rows": 100, "seed": 1, "num_embeddings": 50, "alpha": 1.0} | changes
        synthesize(tmp_path / name, **arguments)
        return DatasetSchema.load(tmp_path / name).vocabulary_id

    same = {id_of("a"), id_of("more rows", rows=200), id_of("whole alpha", alpha=1)}
    assert len(same) == 1
    others = {id_of("seed", seed=2), id_of("alpha", alpha=1.1), id_of("sizes", num_embeddings=51)}
    assert len(same | others) == 4


@pytest.fixture(scope="module")
def with_lists(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Return a data set of more than one chunk, in which C3 is weighted and C20 is not, and its report."""
    path = tmp_path_factory.mktemp("lists") / "data"
    report = synthesize(
        path, rows=CHUNK_ROWS + 5000, num_embeddings=1000, multi_valued={"C3": 4, "C20": 0.5}, weighted=["C3"]
    )
    return path, report


def test_lists_have_the_requested_lengths(with_lists: tuple[Path, dict[str, Any]]) -> None:
    path, report = with_lists
    table = read_all(path)
    schema = DatasetSchema.load(path)
    features = {feature.name: feature for feature in schema.sparse}
    assert [name for name, each in features.items() if each.multi_valued] == ["C3", "C20"]
    assert [name for name, each in features.items() if each.weighted] == ["C3"]
    assert table.num_rows == report["rows"] == CHUNK_ROWS + 5000
    for name, mean in (("C3", 4), ("C20", 0.5)):
        lengths = pc.list_value_length(table[name]).to_numpy()
        assert lengths.min() == 0
        assert lengths.mean() == pytest.approx(mean, rel=0.02)
        assert lengths.var() == pytest.approx(mean, rel=0.05)
        found = pc.list_value_length(read(path, "train")[name]).to_numpy().mean()
        assert features[name].pooling_factor == pytest.approx(found, rel=1e-12)
    ids = pc.list_flatten(table["C20"]).to_numpy()
    assert (ids.min(), ids.max()) == (1, features["C20"].num_embeddings - 1)
    weights = pc.list_flatten(table["C3.weight"]).to_numpy()
    assert weights.dtype == np.float32
    assert weights.mean() == pytest.approx(1, abs=0.01)
    assert pc.list_value_length(table["C3.weight"]).equals(pc.list_value_length(table["C3"]))


def test_labels_depend_on_the_weighted_ids(with_lists: tuple[Path, dict[str, Any]]) -> None:
    """Among the rows that hold a frequent id of C3, the label correlates with the weight of the id."""
    path, report = with_lists
    assert 0.78 < report["auc_ceiling"] < 0.86
    table = read_all(path)
    rows = np.repeat(np.arange(table.num_rows), pc.list_value_length(table["C3"]).to_numpy())
    ids, weights = pc.list_flatten(table["C3"]).to_numpy(), pc.list_flatten(table["C3.weight"]).to_numpy()
    labels = table["label"].to_numpy()
    strongest = 0.0
    for id in range(1, 6):
        chosen = ids == id
        correlation = np.corrcoef(weights[chosen], labels[rows[chosen]])[0, 1]
        strongest = max(strongest, abs(correlation) * np.sqrt(chosen.sum()))
    assert strongest > 5


def test_data_sets_with_lists_are_reproducible(with_lists: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    synthesize(
        tmp_path / "again",
        rows=CHUNK_ROWS + 5000,
        num_embeddings=1000,
        multi_valued={"C3": 4, "C20": 0.5},
        weighted=["C3"],
    )
    assert content(tmp_path / "again") == content(with_lists[0])


def test_streaming_quality_is_the_exact_one() -> None:
    rng = np.random.default_rng(0)
    probability = rng.random(3000)
    probability[:500] = 0.25  # ties
    labels = (rng.random(3000) < probability).astype(np.int8)
    best = _StreamingQuality()
    for part in np.array_split(np.arange(3000), 7):
        best.add(probability[part], labels[part])
    assert best.auc() == pytest.approx(exact_auc(probability, labels), abs=1e-4)
    assert best.logloss() == pytest.approx(log_loss(labels, probability), rel=1e-12)
    assert best.positive_rate() == pytest.approx(labels.mean())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"rows": 9}, "9 rows are too few"),
        ({"seed": -1}, "seed is -1"),
        ({"num_embeddings": 3}, "num_embeddings is 3; it must be at least 4"),
        ({"num_embeddings": 2**31}, "num_embeddings is 2147483648; it must be at least 4 and at most 2147483647"),
        ({"alpha": -0.5}, "alpha is -0.5"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"format": "csv"}, "format is 'csv'; it must be parquet or tsv"),
        ({"multi_valued": {"C27": 2}}, "multi_valued names 'C27'; the features are C1 to C26"),
        ({"multi_valued": {"C2": 0}}, "the mean length of C2 is 0; it must be above 0, at most 100"),
        ({"multi_valued": {"C2": float("nan")}}, "the mean length of C2 is nan"),
        ({"multi_valued": {"C2": 1}, "weighted": ["C3"]}, "weighted names 'C3', which is not multi-valued"),
        ({"multi_valued": {"C2": 1}, "format": "tsv"}, "format is tsv, which holds one id a row"),
    ],
)
def test_bad_argument_leaves_nothing_behind(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        synthesize(tmp_path / "new/out", **({"rows": 100} | change))
    assert list(tmp_path.iterdir()) == []


def test_disk_error_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(parquet_parts, "write_parquet", fail)
    with pytest.raises(UserError, match="out: cannot be written: No space left on device"):
        synthesize(tmp_path / "out", rows=100)
    assert list(tmp_path.iterdir()) == []
