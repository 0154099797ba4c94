"""Generated raw Criteo files and prepared data sets for the tests."""

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from mlet_dist.data.schema import DatasetSchema
from mlet_dist.data.synthetic import synthesize


@pytest.fixture
def write_raw(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes bytes to a file in ``tmp_path / "raw"``, compressed if the name ends in .gz."""

    def write(content: bytes, name: str = "day.tsv") -> Path:
        path = tmp_path / "raw" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a synthetic data set of 45,003 rows, with three row groups in train; tests must not change it."""
    path = tmp_path_factory.mktemp("data") / "synthetic"
    synthesize(path, rows=45_003, seed=3, num_embeddings=500)
    assert DatasetSchema.load(path).rows == {"train": 36_002, "valid": 4_500, "test": 4_501}
    return path
