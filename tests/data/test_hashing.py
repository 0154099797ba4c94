"""Tests of mlet_dist.data.hashing: hashes never change."""

import hashlib

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from mlet_dist.data.hashing import hash_counters, hash_texts

M = 2**64 - 1

KNOWN = [2270449071338478274, 7115050667818819125, 14228194426102057575, 7609927962613182497]
KNOWN_COUNTERS = [6241425951882855318, 3676011910089664473]


def mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & M
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M
    return x ^ (x >> 31)


def one_by_one(text: str, salt: str) -> int:
    """The formulas of the module's docstring, in Python integers."""
    content = text.encode()
    state = (int.from_bytes(hashlib.blake2b(salt.encode(), digest_size=8).digest(), "little") + len(content)) & M
    for start in range(0, len(content), 8):
        state = mix(state ^ int.from_bytes(content[start : start + 8], "little"))
    return mix(state)


def test_known_hashes() -> None:
    """Ids of data sets that exist must keep their meaning."""
    texts = pa.array(["", "05db9164", "a longer text than a word", "ünï"])
    assert hash_texts(texts, "C1").tolist() == KNOWN
    assert hash_counters(7, 2**40, 2).tolist() == KNOWN_COUNTERS


@settings(deadline=None)
@given(texts=st.lists(st.text(max_size=40)), salt=st.text(max_size=5), skipped=st.integers(0, 3))
def test_hashes_follow_the_docstring(texts: list[str], salt: str, skipped: int) -> None:
    array = pa.array(texts, pa.string())[skipped:]  # an array that starts in the middle of its buffers
    assert hash_texts(array, salt).tolist() == [one_by_one(text, salt) for text in texts[skipped:]]


def test_counters_do_not_depend_on_the_start() -> None:
    whole = hash_counters(3, 0, 1000)
    assert np.array_equal(np.concatenate([hash_counters(3, 0, 10), hash_counters(3, 10, 990)]), whole)
    assert len({*whole.tolist(), *hash_counters(4, 0, 1000).tolist()}) == 2000


def test_bits_look_random() -> None:
    """Each of the 64 bits is set in about half of the hashes of similar texts, and of counters."""
    for hashes in (hash_texts(pa.array([f"{i:08x}" for i in range(10_000)]), "C1"), hash_counters(0, 0, 10_000)):
        shares = [((hashes >> np.uint64(bit)) & np.uint64(1)).mean() for bit in range(64)]
        assert 0.475 < min(shares) < max(shares) < 0.525
