"""The classes of ids are those of their counts in training, and rows are counted once for each id of a class."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.data.row_counts import count_ids
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.report.arm_details import _class_weights
from mlet_dist.report.frequency import UNKNOWN, class_weights, labels_of, shares_of
from mlet_dist.report.measured_arms import measure
from tests.helpers.mlet_command import mlet
from tests.report.arms_on_disk import MadeUpArms


@pytest.mark.e2e
def test_rows_are_weighted_by_their_ids_of_a_class(tmp_path: Path) -> None:
    raw, data = tmp_path / "raw", tmp_path / "data"
    mlet("synth", "--out", raw, "--rows", "3000", "--num-embeddings", "500", "--format", "tsv")
    (file,) = raw.glob("*.tsv*")
    mlet("prepare", "criteo", file, "--out", data, "--min-count", "3")
    schema = DatasetSchema.load(data)
    found = class_weights(data, schema, "test")
    assert list(found) == ["frequent", "medium", "rare", UNKNOWN]

    # By a dictionary, id by id.
    counts = {table: count_ids(data, schema, table) for table in schema.table_sizes}
    ordered = sorted((int(c) for each in counts.values() for c in each[1:]), reverse=True)
    total, running, limits = sum(ordered), 0, []
    for count in ordered:
        running += count
        if len(limits) < 2 and running >= (0.8, 0.95)[len(limits)] * total:
            limits.append(count)
    expected = {name: np.zeros(schema.rows["test"]) for name in found}
    rows = pq.read_table(data / "test").to_pydict()
    for feature in schema.sparse:
        for row, id_ in enumerate(rows[feature.name]):
            count = counts[feature.table_name][id_]
            name = "frequent" if count >= limits[0] else "medium" if count >= limits[1] else "rare"
            expected[UNKNOWN if id_ == 0 else name][row] += 1
    for name, weights in found.items():
        np.testing.assert_array_equal(weights, expected[name], err_msg=name)
        assert weights.sum() > 0, name
    assert sum(shares_of(found).values()) == pytest.approx(1)


@pytest.mark.e2e
def test_lists_of_ids_and_tables_without_vocabularies(tmp_path: Path) -> None:
    mlet("synth", "--out", tmp_path / "data", "--rows", "600", "--num-embeddings", "50", "--multi-valued", "C3=4")
    schema = DatasetSchema.load(tmp_path / "data")
    found = class_weights(tmp_path / "data", schema, "test")
    lists = pq.read_table(next((tmp_path / "data").glob("test/*.parquet")), columns=["C3"])["C3"].to_pylist()
    np.testing.assert_array_equal(sum(found.values()), [25 + len(each) for each in lists])


@pytest.mark.e2e
def test_rows_of_another_data_set_are_not_taken_for_those_that_were_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    mlet("synth", "--out", data, "--rows", "600", "--num-embeddings", "50")
    schema = DatasetSchema.load(data)
    labels = pq.read_table(data / "test")["label"].to_numpy()
    np.testing.assert_array_equal(labels_of(data, schema, "test"), labels)
    made = MadeUpArms(tmp_path / "scores", rows=len(labels))
    runs = made.arm("single", "single", 0.1, {"dcp": 10})
    config = runs[0].config
    runs = [
        dataclasses.replace(
            run, config=dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(data)))
        )
        for run in runs
    ]
    assert _class_weights(measure(runs), {0: runs[0].scores / "test" / "dcp.parquet"}, "") == {}
    assert f"no metrics of rare and frequent ids: {data} has other rows than were scored" in capsys.readouterr().err
    file = runs[0].scores / "test" / "dcp.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(1, "label", pa.array(labels, pa.float32())), file)
    assert set(_class_weights(measure(runs[:1], "single"), {0: file}, "")) == {
        "frequent", "medium", "rare", UNKNOWN
    }  # fmt: skip
