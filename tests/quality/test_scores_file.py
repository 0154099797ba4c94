"""Files of scores that are not what `mlet predict` writes are named."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.errors import UserError
from mlet_dist.quality.scores_file import read_scores


def written(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def test_weights_are_read_if_there_are_any(tmp_path: Path) -> None:
    rows = {"row": [0, 1], "label": [0.0, 1.0], "logit": [0.25, -0.5], "probability": [0.5, 0.4]}
    plain = read_scores(written(tmp_path / "plain", **rows))
    assert (plain.logits.tolist(), plain.labels.tolist(), plain.weights.tolist()) == ([0.25, -0.5], [0, 1], [1, 1])
    assert read_scores(written(tmp_path / "weighted", **rows, weight=[2.0, 0.0])).weights.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"label": [0.0]}, "has no column 'logit'; expected a file of `mlet predict`"),
        ({"label": [0.0, 2.0], "logit": [1.0, 1.0]}, "row 1: the label is 2.0, and must be 0 or 1"),
        ({"label": [0.0], "logit": [float("inf")]}, "row 0: the logit is inf, and must be finite"),
    ],
)
def test_a_file_of_something_else_is_named(columns: dict[str, list[float]], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_scores(written(tmp_path / "scores", **columns))
    assert str(error.value) == f"{tmp_path / 'scores'}: {message}"


@pytest.mark.parametrize("content", [None, b"PAR1"])
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "scores").write_bytes(content)
    with pytest.raises(UserError, match="scores: cannot be read: "):
        read_scores(tmp_path / "scores")
