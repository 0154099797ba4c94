"""Combinations of parameters in which every two values of different parameters meet; tests need not run all others."""

import os
from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return combinations, one value of each parameter, that contain every pair of values of two parameters.

    They are the same in every run. With ``MLET_ALL_COMBINATIONS=1`` in the environment, all combinations are returned.
    """
    every = list(product(*(range(len(values)) for values in parameters)))
    chosen = every if os.environ.get("MLET_ALL_COMBINATIONS") == "1" else []
    missing = set[Any]().union(*map(_pairs, every)) - set[Any]().union(*map(_pairs, chosen))
    while missing:
        best = max(every, key=lambda indices: len(_pairs(indices) & missing))
        chosen.append(best)
        missing -= _pairs(best)
    return [tuple(values[index] for values, index in zip(parameters, each, strict=True)) for each in sorted(chosen)]


def _pairs(indices: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
    """Return the pairs of (parameter, value) in a combination."""
    return set(combinations(enumerate(indices), 2))
