"""Generated raw Criteo logs for the tests."""

import random

COLUMNS = ("label", *(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27)))

RawLine = list[str]


def make_raw_lines(rows: int, seed: int = 0, distinct: int = 40) -> list[RawLine]:
    """Return lines of 40 fields: missing, zero, negative and large integers, and skewed categories, some empty."""
    rng = random.Random(seed)
    lines = []
    for _ in range(rows):
        label = str(int(rng.random() < 0.3))
        dense = [rng.choice(["", "0", "-2", str(rng.randrange(100)), str(rng.randrange(10**7))]) for _ in range(13)]
        sparse = []
        for feature in range(26):
            value = min(int(rng.expovariate(1 / (1 + feature))), distinct)
            sparse.append("" if value == 1 else f"{value * 7919 + feature:08x}")
        lines.append([label, *dense, *sparse])
    return lines


def raw_bytes(lines: list[RawLine]) -> bytes:
    """Return the lines as the content of a raw Criteo file."""
    return "".join("\t".join(line) + "\n" for line in lines).encode()
