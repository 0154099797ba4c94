"""Tests of data that is split already, and of data sets without valid or test."""

from pathlib import Path
from typing import Any

import pytest

from mlet_dist.data.prepare.split_files import assign_files
from mlet_dist.data.prepare.splits import SplitRule
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from tests.helpers.tables import PLAIN, prepare_table, values_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a directory with train.csv, valid.csv and test.csv, whose values begin with the name of their file."""
    for name, rows in (("train", 40), ("valid", 20), ("test", 10)):
        text = "y,x\n" + "".join(f"{i % 2},{name}{i % 3}\n" for i in range(rows))
        (tmp_path / f"{name}.csv").write_text(text)
    return tmp_path


def by_file(files: dict[str, Any]) -> dict[str, Any]:
    return PLAIN | {"split": {"by": "file", "files": files}}


def test_files_of_each_split_by_name(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = [folder / f"{name}.csv" for name in ("test", "train", "valid")]
    schema = prepare_table(folder / "out", by_file({"valid": "valid.csv", "test": ["test.csv"]}), raw)
    assert schema.rows == {"train": 40, "valid": 20, "test": 10}
    assert set(values_of(folder / "out", split="train")) == {"train0", "train1", "train2"}
    assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("split")] == [
        f"split  train  40 of 70 rows: {folder}/train.csv",
        f"split  valid  20 of 70 rows: {folder}/valid.csv",
        f"split  test  10 of 70 rows: {folder}/test.csv",
    ]


@pytest.mark.parametrize("split", ["valid", "test"])
def test_two_splits_of_files(folder: Path, split: str) -> None:
    raw = [folder / f"{name}.csv" for name in ("train", split)]
    schema = prepare_table(folder / "out", by_file({split: f"{split}.csv"}), raw)
    assert list(schema.rows) == ["train", split]
    assert not (folder / "out" / ({"valid", "test"} - {split}).pop()).exists()


def test_lists_of_files(folder: Path) -> None:
    lists = {"test": [folder / "test.csv"], "train": [folder / "tr*.csv"], "valid": [folder / "valid.csv"]}
    assert prepare_table(folder / "out", PLAIN, lists).rows == {"train": 40, "valid": 20, "test": 10}
    assert prepare_table(folder / "two", PLAIN, {k: v for k, v in lists.items() if k != "valid"}).rows == {
        "train": 40,
        "test": 10,
    }
    with pytest.raises(UserError, match="no raw file of the training split was given"):
        prepare_table(folder / "none", PLAIN, {"test": [folder / "test.csv"]})
    with pytest.raises(UserError, match=r"train\.csv: is given twice"):
        prepare_table(folder / "twice", PLAIN, {"train": [folder / "train.csv"], "test": [folder / "*.csv"]})


PATHS = ["d/train/0.csv", "d/train/1.csv", "d/valid/0.csv", "d/t_0.csv", "d/t_1.csv", "s3://b/day=7/0.csv"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"valid": ("valid",)}, {2: "valid"}),
        ({"valid": ("valid/0.csv",), "test": ("t_*",)}, {2: "valid", 3: "test", 4: "test"}),
        ({"valid": ("d/valid/",), "test": ("day=7", "t_0.csv")}, {2: "valid", 5: "test", 3: "test"}),
        ({"test": ("s3://b/day=7/0.csv",)}, {5: "test"}),
        ({"test": ("**/t_?.csv",)}, {3: "test", 4: "test"}),
        ({"test": ("d/t_0.csv",), "train": ("0.csv", "1.csv", "t_1.csv")}, {3: "test"}),
    ],
)
def test_names_and_patterns(files: dict[str, tuple[str, ...]], expected: dict[int, str]) -> None:
    assert assign_files(SplitRule("file", files=files), PATHS) == tuple(
        expected.get(index, "train") for index in range(len(PATHS))
    )


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"valid": ("dev.csv",)}, "split.files.valid names 'dev.csv', but no raw file has this name; give all files"),
        ({"valid": ("t_0.csv",), "test": ("t_*",)}, "d/t_0.csv: split.files gives it to valid and to test"),
        ({"valid": ("d", "s3://b/day=7/0.csv")}, "split.files leaves none of the raw files to train on"),
        ({"train": ("train",), "test": ("t_*",)}, "d/valid/0.csv: split.files gives it to no split"),
    ],
)
def test_wrong_names(files: dict[str, tuple[str, ...]], message: str) -> None:
    with pytest.raises(UserError) as caught:
        assign_files(SplitRule("file", files=files), PATHS)
    assert str(caught.value).startswith(message)


def test_one_file_is_not_enough_to_split_by_file(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"train\.csv: split by file cuts the last file into test and valid, and there is no"
    ):
        prepare_table(folder / "out", PLAIN | {"split": {"by": "file"}}, [folder / "train.csv"])


@pytest.mark.parametrize("names", [("train", "valid", "test"), ("valid", "test"), ("test", "train")])
def test_validation_data_is_not_trained_on(folder: Path, names: tuple[str, ...]) -> None:
    with pytest.raises(
        UserError, match=r"\.csv: is named like \w+ data, and would be trained on: by file, all files but"
    ):
        prepare_table(folder / "out", PLAIN | {"split": {"by": "file"}}, [folder / f"{name}.csv" for name in names])
    assert not (folder / ".out.prepare").exists()


@pytest.mark.parametrize(
    ("paths", "is_refused"),
    [
        (["day_0.csv", "day_1.csv", "day_2.csv"], False),
        (["test_0.csv", "test_1.csv"], False),  # no file is named otherwise
        (["latest.csv", "contest.csv", "x.csv"], False),
        (["train.csv", "test.csv"], False),  # test.csv is the last file, which is cut
        (["a/test_run/0.csv", "b.csv"], False),
        (["train.csv", "dev.csv", "test.csv"], True),
        (["data/validation/0.csv", "data/train/0.csv"], True),
        (["x.test.csv", "x.train.csv"], True),
    ],
)
def test_names_that_suggest_a_split(paths: list[str], is_refused: bool) -> None:
    if is_refused:
        with pytest.raises(UserError, match="would be trained on"):
            assign_files(SplitRule("file"), paths)
    else:
        assert assign_files(SplitRule("file"), paths) == (*("train" for _ in paths[:-1]), None)


def test_names_of_splits_and_another_rule_are_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    prepare_table(folder / "out", PLAIN, [folder / "train.csv", folder / "test.csv"])
    [record] = caplog.records
    assert "the names of these files suggest splits, but all rows are split by rows" in record.getMessage()


def test_where_rows_go_is_printed_for_each_rule(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = [folder / f"{name}.csv" for name in ("train", "valid")]
    for index, (split, expected) in enumerate(
        [
            (
                {"by": "rows", "shares": {"train": 0.8, "test": 0.2}},
                [
                    f"split  train  48 of 60 rows: {raw[0]}, {raw[1]} rows 1-8",
                    f"split  test  12 of 60 rows: {raw[1]} rows 9-20",
                ],
            ),
            (
                {"by": "file", "shares": {"test": 0.75, "valid": 0.25}},
                [
                    f"split  train  40 of 60 rows: {raw[0]}",
                    f"split  valid  5 of 60 rows: {raw[1]} rows 16-20",
                    f"split  test  15 of 60 rows: {raw[1]} rows 1-15",
                ],
            ),
        ]
    ):
        prepare_table(folder / f"out{index}", PLAIN | {"split": split}, raw)
        assert [line for line in capsys.readouterr().err.splitlines() if line.startswith("split")] == expected
    prepare_table(folder / "random", PLAIN | {"split": {"by": "random", "shares": {"train": 0.5, "valid": 0.5}}}, raw)
    rows = DatasetSchema.load(folder / "random").rows
    [first, _] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("split")]
    assert first.startswith(f"split  train  {rows['train']} of 60 rows: {raw[0]} ")
    assert first.endswith(" of 20 rows")


@pytest.mark.parametrize(
    ("split", "rows"),
    [
        ({"by": "rows", "shares": {"train": 0.9, "valid": 0.1}}, {"train": 36, "valid": 4}),
        ({"by": "rows", "shares": {"test": 0.25, "train": 0.75}}, {"train": 30, "test": 10}),
        ({"by": "rows", "shares": {"train": 1}}, {"train": 40}),
        ({"by": "time", "column": "t", "shares": {"train": 0.5, "test": 0.5}}, {"train": 20, "test": 20}),
        ({"by": "time", "column": "t", "starts": {"valid": 30}}, {"train": 30, "valid": 10}),
        ({"by": "random", "shares": {"train": 0.5, "valid": 0.5}}, None),
        ({"by": "file", "shares": {"test": 1}}, {"train": 20, "test": 20}),
    ],
)
def test_two_splits_by_every_rule(tmp_path: Path, split: dict[str, Any], rows: dict[str, int] | None) -> None:
    for part in range(2):
        lines = [f"{i % 2},v{i % 3},{i}\n" for i in range(20 * part, 20 * part + 20)]
        (tmp_path / f"{part}.csv").write_text("y,x,t\n" + "".join(lines))
    schema = prepare_table(tmp_path / "out", PLAIN | {"split": split}, [tmp_path / "0.csv", tmp_path / "1.csv"])
    if rows is None:
        assert set(schema.rows) == {"train", "valid"}
        assert sum(schema.rows.values()) == 40
    else:
        assert schema.rows == rows
    assert DatasetSchema.load(tmp_path / "out") == schema
    assert set(schema.positive_rate) == set(schema.rows)


def test_a_split_that_is_wanted_must_have_rows(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,x\n" + 40 * "1,a\n")
    (tmp_path / "b.csv").write_text("y,x\n")
    with pytest.raises(UserError, match="split test is empty: none of the 40 rows falls into it"):
        prepare_table(tmp_path / "out", by_file({"test": "b.csv"}), [tmp_path / "a.csv", tmp_path / "b.csv"])
