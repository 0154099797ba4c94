"""Ids that a model does not know are read as those of a data set whose vocabularies have not grown."""

from pathlib import Path

import pytest
import torch

from mlet_dist.data.loading.loader import Batch, DataLoader
from mlet_dist.data.loading.order import Shuffle
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.schema import DatasetSchema

DESCRIPTION = """
format: csv
label: {column: click}
sparse:
  - {column: user}
  - {column: tags, separator: "|", weight_separator: ":"}
  - {column: item}
  - {column: words, separator: "|"}
split: {by: rows, shares: {train: 0.9, test: 0.1}}
"""


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with ``first``, and the rows of another day like it (``alike``) and grown from it."""
    path = tmp_path_factory.mktemp("days")
    (path / "table.yaml").write_text(DESCRIPTION)
    for day in (1, 2):
        lines = ["click,user,tags,item,words"]
        for i in range(200):
            tags = "|".join(f"t{(i * j) % 7 * day}:{j}" for j in range(1, i % 4))
            words = "|".join(f"w{i * j % 11 * day}" for j in range(i % 3))
            lines.append(f"{i % 2},u{i % 13 * day},{tags},i{i % 5},{words}")
        (path / f"day{day}.csv").write_text("\n".join(lines))
    prepare(load_table(path / "table.yaml"), [path / "day1.csv"], path / "first")
    for name, grows in (("alike", False), ("grown", True)):
        like = LikeDataset.open(str(path / "first"), grows=grows)
        prepare(like.description, {"train": [path / "day2.csv"]}, path / name, like=like)
    return path


def batches(path: Path, known: dict[str, int], shuffle: Shuffle | None, rank: int) -> list[Batch]:
    order = {"batch_size": 64, "rank": rank, "world_size": 2, "dense_features": None, "sparse_features": None}
    return list(DataLoader(path, "train", known_ids=known, shuffle=shuffle, **order))  # type: ignore[arg-type]


@pytest.mark.parametrize("shuffle", [None, Shuffle(3, 100)])
@pytest.mark.parametrize("rank", [0, 1])
def test_ids_from_the_known_number_on_are_out_of_vocabulary(days: Path, shuffle: Shuffle | None, rank: int) -> None:
    first, grown = (DatasetSchema.load(days / name).num_embeddings for name in ("first", "grown"))
    more = {name: size for name, size in first.items() if grown[name] > size}
    assert set(more) == {"user", "tags", "words"}
    found, expected = (batches(days / name, more, shuffle, rank) for name in ("grown", "alike"))
    unknown = 0
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one.sparse.values(), two.sparse.values())
        assert torch.equal(one.sparse.lengths(), two.sparse.lengths())
        assert torch.equal(one.sparse.weights(), two.sparse.weights())
        unknown += int((one.sparse.values() == 0).sum())
    assert unknown > 50
    whole = batches(days / "grown", {}, shuffle, rank)
    assert any(not torch.equal(one.sparse.values(), two.sparse.values()) for one, two in zip(whole, found, strict=True))
