import math
from pathlib import Path

import pytest

from mlet_dist.data.label_classes import check_classes
from mlet_dist.data.preprocessing import Preprocessing
from mlet_dist.data.schema import SPLITS, DatasetSchema, Part, SparseFeature
from mlet_dist.errors import UserError

DATA = Path("data/clicks")


def schema(**positives: tuple[int, int]) -> DatasetSchema:
    """Return the schema of a data set with (rows, positives) of each split, in two parts."""
    parts: dict[str, tuple[Part, ...]] = {}
    made = Preprocessing({"column": "click"}, {}, {"x": {"encoding": "vocabulary"}})
    for split, (rows, ones) in positives.items():
        first = Part(f"{split}/a", rows // 2, min(ones, rows // 2), 1, "0" * 64, "0" * 64)
        parts[split] = (first, Part(f"{split}/b", rows - first.rows, ones - first.positives, 1, "0" * 64, "0" * 64))
    return DatasetSchema("table", "label", (), (SparseFeature("x", 3),), 0, parts, made)


def test_splits_of_both_classes() -> None:
    found = schema(train=(10, 1), valid=(4, 3), test=(2, 1))
    assert check_classes(DATA, found, SPLITS) == []
    assert found.positives == {"train": 1, "valid": 3, "test": 1}


@pytest.mark.parametrize(("ones", "label"), [(0, 0), (1000, 1)])
def test_a_training_split_of_one_class_is_an_error(ones: int, label: int) -> None:
    with pytest.raises(UserError, match=f"data/clicks: all 1,000 rows of train have label {label}, so a model can"):
        check_classes(DATA, schema(train=(1000, ones), valid=(4, 3), test=(2, 1)), SPLITS)
    assert check_classes(DATA, schema(train=(1000, ones), valid=(4, 3), test=(2, 1)), ["valid", "test"]) == []


def test_other_splits_of_one_class_are_warnings() -> None:
    found = check_classes(DATA, schema(train=(10, 5), valid=(7, 7), test=(3, 0)), SPLITS)
    assert [line.partition(", so")[0] for line in found] == [
        "data/clicks: all 7 rows of valid have label 1",
        "data/clicks: all 3 rows of test have label 0",
    ]
    assert all("its AUC is undefined; look at the label column" in line for line in found)


def test_a_split_without_rows_is_left_to_others() -> None:
    empty = schema(train=(10, 5), valid=(0, 0), test=(3, 1))
    assert check_classes(DATA, empty, SPLITS) == []
    assert math.isnan(empty.positive_rate["valid"])
