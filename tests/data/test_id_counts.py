from pathlib import Path
from typing import Any

import pytest

from mlet_dist.data.id_counts import (
    IdCounts,
    add_counts,
    counts_from_plain,
    counts_table,
    counts_to_plain,
    of_features,
    out_of_vocabulary_shares,
    out_of_vocabulary_warnings,
    overall_share,
)
from mlet_dist.errors import UserError

COUNTS = {
    "train": {"user": IdCounts(80, 0, 0), "tags": IdCounts(200, 4, 9), "hashed": IdCounts(160, None, 3)},
    "valid": {"user": IdCounts(10, 2, 0), "tags": IdCounts(25, 5, 0), "hashed": IdCounts(20, None, 0)},
    "test": {"user": IdCounts(10, 9, 0), "tags": IdCounts(0, 0, 10), "hashed": IdCounts(20, None, 0)},
}


def test_counts_of_parts_add_up() -> None:
    parts = [{"train": {"user": IdCounts(3, 1, 0), "hashed": IdCounts(3, None, 1)}}, {"test": {"user": IdCounts(7)}}]
    parts.append({"train": {"user": IdCounts(5, 2, 4), "hashed": IdCounts(2, None, 0)}})
    assert add_counts(parts) == {
        "train": {"user": IdCounts(8, 3, 4), "hashed": IdCounts(5, None, 1)},
        "test": {"user": IdCounts(7, 0, 0)},
    }


def test_shares_leave_out_features_that_have_none() -> None:
    assert out_of_vocabulary_shares(COUNTS, "train") == {"tags": 0.02}
    assert out_of_vocabulary_shares(COUNTS, "valid") == {"user": 0.2, "tags": 0.2}
    assert out_of_vocabulary_shares(COUNTS, "test") == {"user": 0.9}
    assert out_of_vocabulary_shares({}, "test") == {}


def test_the_share_of_all_ids_counts_features_with_a_vocabulary() -> None:
    assert overall_share(COUNTS, "valid") == 7 / 35
    assert overall_share(of_features(COUNTS, ["hashed"]), "valid") is None
    assert overall_share(of_features(COUNTS, ["user", "hashed"]), "test") == 0.9
    assert overall_share({}, "valid") is None


def test_a_large_share_is_a_warning_that_says_whether_id_0_is_trained() -> None:
    (line,) = out_of_vocabulary_warnings(Path("d"), COUNTS, ["valid", "test"])  # valid has 20%, and not more
    assert line.startswith("d: more than 20% of the ids of test are out of vocabulary (id 0): user 90%; ")
    assert line.endswith("; no training row has id 0 of user, so its vector is zero")
    trained = COUNTS | {"train": {"user": IdCounts(80, 1, 0)}}
    (line,) = out_of_vocabulary_warnings(Path("d"), trained, ["test"])
    assert "its vector is zero" not in line


def test_a_warning_names_the_largest_shares() -> None:
    many = {"test": {f"C{index}": IdCounts(100, 30 + index, 0) for index in range(1, 8)}}
    (line,) = out_of_vocabulary_warnings(Path("d"), many, ["test"])
    assert "C7 37%, C6 36%, C5 35%, C4 34%, C3 33% and 2 more" in line


def test_the_table_shows_shares_and_empty_lists() -> None:
    assert [line.split() for line in counts_table(COUNTS)[1:]] == [
        ["user", "0.00%", "20.00%", "90.00%", "0", "0", "0"],
        ["tags", "2.00%", "20.00%", "9", "0", "10"],
        ["hashed", "3", "0", "0"],
    ]
    assert "empty lists, train" in counts_table(COUNTS)[0]
    assert "empty" not in counts_table(of_features(COUNTS, ["user"]))[0]
    assert counts_table({}) == []


def test_counts_survive_json() -> None:
    assert counts_from_plain(counts_to_plain(COUNTS), "schema.json") == COUNTS


@pytest.mark.parametrize(
    "plain",
    [
        3,
        {"train": 3},
        {"train": {"user": 3}},
        {"train": {"user": {"ids": -1}}},
        {"train": {"user": {"ids": True}}},
        {"train": {"user": {"ids": 1, "rows": 1}}},
        {"train": {"user": {"ids": "1"}}},
    ],
)
def test_other_content_is_refused(plain: Any) -> None:
    with pytest.raises(UserError, match=r"^schema\.json: id_counts cannot be read: "):
        counts_from_plain(plain, "schema.json")
