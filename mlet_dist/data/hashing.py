"""Hashes that are the same on every platform and in every version of every library: integer operations on numpy arrays.

The UTF-8 bytes of a text are cut into little-endian 64-bit words w_1 … w_m, the last one padded with zeros, and

    h_0 = salt + length in bytes        h_i = mix(h_{i-1} xor w_i)        hash = mix(h_m)
    mix(x): x += 0x9e3779b97f4a7c15; x = (x xor x >> 30)·0xbf58476d1ce4e5b9; x = (x xor x >> 27)·0x94d049bb133111eb;
            x xor x >> 31

all modulo 2^64. mix is a step of SplitMix64; the salt (``salt_of``) is the 8-byte BLAKE2b digest of the
salt text, as a little-endian number. Since mix is a permutation, texts of the same length of up to 8 bytes never
collide.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Hashes = npt.NDArray[np.uint64]

WORD_BYTES = 8

_GAMMA, _MULTIPLIER_1, _MULTIPLIER_2 = (
    np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
)


def hash_texts(texts: pa.StringArray, salt: str) -> Hashes:
    """Return the hash of each text under ``salt``: (len(texts),) uint64. ``texts`` must not contain nulls."""
    _, raw_offsets, raw_bytes = texts.buffers()
    offsets = np.frombuffer(raw_offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    lengths = np.diff(offsets)
    with np.errstate(over="ignore"):
        state: Hashes = salt_of(salt) + lengths.astype(np.uint64)
        if len(texts) and lengths.max():
            first, last = int(offsets[0]), int(offsets[-1])
            padded = np.zeros(last - first + WORD_BYTES, np.uint8)
            padded[: last - first] = np.frombuffer(raw_bytes, np.uint8)[first:last]
            # words[i] is the word that starts at byte i; the stride is one byte.
            words = np.ndarray((last - first + 1,), "<u8", padded, strides=(1,))
            _mix_words(state, words, offsets[:-1] - first, lengths)
        return _mix(state)


def hash_counters(seed: int, start: int, count: int) -> Hashes:
    """Return random bits of the counters [start, start + count): (count,) uint64, each from seed and counter alone."""
    with np.errstate(over="ignore"):
        return _mix(_mix(np.arange(start, start + count, dtype=np.uint64)) ^ salt_of(f"counter {seed}"))


def _mix_words(
    state: Hashes, words: npt.NDArray[np.uint64], starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]
) -> None:
    """Mix each text's words into its state, in place: the first word of all texts, then the second, and so on."""
    rows = np.flatnonzero(lengths)
    position = 0
    while rows.size:
        remaining = lengths[rows] - position
        word = words[starts[rows] + position].astype(np.uint64)
        short = remaining < WORD_BYTES
        # Clear the bytes that belong to the next text.
        word[short] &= (np.uint64(1) << (8 * remaining[short]).astype(np.uint64)) - np.uint64(1)
        state[rows] = _mix(state[rows] ^ word)
        position += WORD_BYTES
        rows = rows[remaining > WORD_BYTES]


def _mix(state: Hashes) -> Hashes:
    state = state + _GAMMA
    state = (state ^ (state >> np.uint64(30))) * _MULTIPLIER_1
    state = (state ^ (state >> np.uint64(27))) * _MULTIPLIER_2
    return state ^ (state >> np.uint64(31))


def salt_of(text: str) -> np.uint64:
    """Return the number that a salt text stands for."""
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))
