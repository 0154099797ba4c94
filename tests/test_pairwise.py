"""`tests/helpers/pairwise.py`: every pair of values is run, and few combinations are."""

from itertools import combinations, product

import pytest

from tests.helpers.pairwise import pairwise


@pytest.fixture(autouse=True)
def by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLET_ALL_COMBINATIONS", raising=False)


@pytest.mark.parametrize(("sizes", "most"), [((3, 2), 6), ((5, 4, 3), 22), ((3, 3, 3), 11), ((2, 2, 2, 5), 11)])
def test_all_pairs_are_in_few_combinations(sizes: tuple[int, ...], most: int) -> None:
    values = [[f"{name}{value}" for value in range(size)] for name, size in zip("abcd", sizes, strict=False)]
    found = pairwise(*values)
    assert len(set(found)) == len(found) <= most
    assert set(found) <= set(product(*values))
    for first, second in combinations(range(len(sizes)), 2):
        assert {(each[first], each[second]) for each in found} == set(product(values[first], values[second]))


def test_all_combinations_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLET_ALL_COMBINATIONS", "1")
    assert pairwise("ab", "cd", "ef") == list(product("ab", "cd", "ef"))
