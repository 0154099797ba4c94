"""Tests of mlet_dist.atomic_file."""

from contextlib import suppress
from pathlib import Path

import pytest

from mlet_dist.atomic_file import replaced_file, temporary_of


def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    with replaced_file(path) as file:
        file.write(b"new, which is longer than what a buffer holds" * 1000)
        assert path.read_text() == "old"
        assert temporary_of(path).exists()
    assert path.read_bytes() == b"new, which is longer than what a buffer holds" * 1000
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_old_file_stays_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    with suppress(type(error)), replaced_file(path) as file:
        file.write(b"new")
        raise error
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


def test_a_directory_in_the_place_of_a_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.mkdir()
    with pytest.raises(IsADirectoryError), replaced_file(path) as file:
        file.write(b"new")
    assert [*tmp_path.iterdir()] == [path]
