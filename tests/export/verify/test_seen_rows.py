"""Models with only the rows that are looked up see the same vectors as models with all rows."""

import torch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from mlet_dist.export import seen_rows
from mlet_dist.export.seen_rows import SeenRows, renumber


def _bags(ids: list[list[int]], lengths: list[list[int]]) -> KeyedJaggedTensor:
    values = torch.tensor([each for feature in ids for each in feature], dtype=torch.int64)
    return KeyedJaggedTensor(["a", "b", "c"], values, torch.rand(len(values)), torch.tensor(lengths).flatten())


def test_each_id_is_renumbered_to_its_position_among_the_seen_rows(monkeypatch) -> None:
    monkeypatch.setattr(seen_rows, "_BUFFERED", 2)  # so that duplicates are removed between batches, too
    batches = [
        _bags([[9, 2], [5, 5, 7], []], [[1, 1], [0, 3], [0, 0]]),
        _bags([[2, 2, 4], [], []], [[2, 1], [0, 0], [0, 0]]),
    ]
    seen = SeenRows({name: name for name in "abc"})
    for bags in batches:
        seen.add(bags)
    rows = seen.rows()
    assert {name: ids.tolist() for name, ids in rows.items()} == {"a": [2, 4, 9], "b": [5, 7], "c": []}
    tables = {"a": torch.randn(10, 3), "b": torch.randn(8, 3), "c": torch.randn(4, 3)}
    for bags in batches:
        found = renumber(bags, rows)
        assert torch.equal(found.lengths(), bags.lengths())
        assert torch.equal(found.weights(), bags.weights())
        for name, table in tables.items():
            assert torch.equal(table[rows[name]][found[name].values()], table[bags[name].values()])
