"""Tests of mlet_dist.data.prepare.splits: the times at which shares are cut."""

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlet_dist.data.prepare.splits import SplitRule, make_splitter

TIMES = st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-3, 3), st.integers(0, 2**20))


@settings(deadline=None)
@given(st.lists(st.lists(TIMES), min_size=1).filter(any), st.integers(1, 9))
def test_cuts_are_the_times_at_the_shares(arrays: list[list[int]], tenths: int) -> None:
    shares = {"train": Fraction(tenths, 20), "valid": Fraction(tenths, 20), "test": 1 - Fraction(tenths, 10)}
    ordered = sorted(time for array in arrays for time in array)
    found = make_splitter(
        SplitRule("time", shares, column="t"),
        [len(ordered)],
        [np.array(array, np.int64) for array in arrays],
    )
    assert found.cuts == tuple(ordered[len(ordered) * tenths * i // 20] for i in (1, 2))
