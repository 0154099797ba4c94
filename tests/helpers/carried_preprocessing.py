"""Writes the directory ``preprocessing`` of an export without a run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.export.serving.raw_inputs import write_preprocessing

PROGRAMS = Path(__file__).parents[2] / "mlet_dist" / "export" / "serving" / "preprocessing_files"


def carry(like: LikeDataset, out: Path) -> Path:
    """Write what an export of a model with all columns of a data set carries, into a new directory, and return it."""
    out.mkdir()

    @contextmanager
    def new_file(name: str) -> Iterator[IO[bytes]]:
        with (out / name).open("wb") as file:
            yield file

    assert sorted(write_preprocessing(like, new_file)) == sorted(path.name for path in out.iterdir())
    return out
