"""Tests of `mlet prepare avazu` against a second computation with the standard library's csv module."""

import csv
import gzip
import io
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mlet_dist.data.hashing import hash_counters
from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.raw_formats import AVAZU_COLUMNS, AVAZU_SPARSE, avazu
from mlet_dist.errors import UserError

Write = Callable[..., Path]

REAL_SAMPLE = Path(__file__).parents[4] / "shared/data/avazu_32k.csv.gz"


def assert_as_computed_independently(path: Path, out: Path, min_count: int) -> None:
    """Check counts, vocabularies, rates and every row of ``out``, which was prepared from the .gz file ``path``."""
    schema = check(out)
    with gzip.open(path, "rt", newline="") as text:
        rows = list(csv.DictReader(text))
    # A row's split is where its hash lies in the 64-bit range: 80% train, 10% valid, 10% test.
    names = [
        "train" if bits < 0.8 * 2**64 else "valid" if bits < 0.9 * 2**64 else "test"
        for bits in hash_counters(0, 0, len(rows)).tolist()
    ]
    splits = {s: [row for row, name in zip(rows, names, strict=True) if name == s] for s in ("train", "valid", "test")}
    ids: dict[str, dict[str, int]] = {}
    for name in AVAZU_SPARSE:
        counts = Counter(row[name] for row in splits["train"])
        kept = sorted((-count, value) for value, count in counts.items() if count >= min_count)
        ids[name] = {value: i for i, (_, value) in enumerate(kept, start=1)}
        vocabulary = pq.read_table(out / f"vocabulary/{name}.parquet").to_pydict()
        assert vocabulary == {"value": [value for _, value in kept], "count": [-count for count, _ in kept]}
    assert schema.num_embeddings == {name: 1 + len(ids[name]) for name in AVAZU_SPARSE}
    assert schema.dense == ()
    for split, expected in splits.items():
        assert schema.rows[split] == len(expected)
        assert schema.positive_rate[split] == sum(row["click"] == "1" for row in expected) / len(expected)
        found = [row for part in schema.parts[split] for row in pq.read_table(out / part.path).to_pylist()]
        for row, source in zip(found, expected, strict=True):
            wanted = {name: ids[name].get(source[name], 0) for name in AVAZU_SPARSE}
            assert row == {"label": int(source["click"])} | wanted


def make_avazu(rows: int) -> str:
    rng = random.Random(3)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(AVAZU_COLUMNS)
    for index in range(rows):
        values = [f"{int(rng.expovariate(0.3)) * 7919 + i:08x}" for i in range(len(AVAZU_SPARSE) - 1)]
        writer.writerow([10**18 + index, int(rng.random() < 0.2), "14102100", *values])
    return text.getvalue()


def test_synthetic_logs(tmp_path: Path, write_raw: Write) -> None:
    path = write_raw(make_avazu(2000).encode(), "train.gz")
    prepare(avazu(min_count=3), [path], tmp_path / "out")
    assert_as_computed_independently(path, tmp_path / "out", 3)


@pytest.mark.skipif(not REAL_SAMPLE.exists(), reason="the real Avazu sample (../shared/data) is not here")
def test_real_sample(tmp_path: Path) -> None:
    schema = prepare(avazu(min_count=2), [REAL_SAMPLE], tmp_path / "out")
    assert schema is not None
    assert schema.malformed == 0
    assert_as_computed_independently(REAL_SAMPLE, tmp_path / "out", 2)


def test_another_header(tmp_path: Path, write_raw: Write) -> None:
    path = write_raw(make_avazu(20).replace("banner_pos", "banner").encode(), "train.csv")
    with pytest.raises(UserError, match=r"train\.csv: line 1: the header is 'id,click,hour,C1,banner,.* instead of"):
        prepare(avazu(), [path], tmp_path / "out")
