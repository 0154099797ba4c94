"""Sealed files and records: every change of their bytes or names is noticed."""

import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from mlet_dist.data.prepare.sealed_files import (
    DamagedPieceError,
    Repairs,
    check_sealed,
    check_seals,
    load_record,
    map_sealed,
    new_sealed,
    read_sealed,
    save_record,
    seal_of,
)
from mlet_dist.errors import UserError

CONTENT = random.Random(5).randbytes(700)


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    path = tmp_path / "piece.bin"
    with new_sealed(path) as sink:
        for start in range(0, len(CONTENT), 100):
            sink.write(CONTENT[start : start + 100])
    assert [each.name for each in tmp_path.iterdir()] == ["piece.bin"]
    return path


def is_damaged(path: Path) -> bool:
    """Whether both readers say so."""
    found = [damage_of(read, path) for read in (read_sealed, check_sealed)]
    assert (found[0] is None) == (found[1] is None)
    for error in found:
        assert error is None or (error.path == path and str(error).startswith(f"{path}: this finished piece "))
    return found[0] is not None


def damage_of(read: Callable[[Path], object], path: Path) -> DamagedPieceError | None:
    try:
        read(path)
    except DamagedPieceError as error:
        return error
    return None


def test_what_is_read_is_what_was_written(sealed: Path) -> None:
    assert bytes(read_sealed(sealed)) == bytes(map_sealed(sealed)) == CONTENT
    check_sealed(sealed)


def test_every_changed_byte_and_every_length_is_noticed(sealed: Path) -> None:
    written = sealed.read_bytes()
    for position in range(len(written)):
        changed = bytearray(written)
        changed[position] ^= 1 << position % 8
        sealed.write_bytes(changed)
        assert is_damaged(sealed), position
    for length in range(len(written)):
        sealed.write_bytes(written[:length])
        assert is_damaged(sealed), length
        sealed.write_bytes(written[:length] + bytes(len(written) - length))
        assert is_damaged(sealed), length
    sealed.write_bytes(written + b"\0")
    assert is_damaged(sealed)
    sealed.write_bytes(written)
    assert not is_damaged(sealed)


def test_a_name_is_part_of_the_seal_but_not_the_place(sealed: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / Path(*sealed.parts[-3:])
    moved.parent.mkdir(parents=True)
    moved.write_bytes(sealed.read_bytes())
    assert not is_damaged(moved)
    assert is_damaged(sealed.rename(tmp_path / "other.bin"))


@pytest.mark.parametrize("kind", ["missing", "directory", "pipe", "loop of links"])
def test_what_is_no_file_is_damaged_and_can_be_replaced(tmp_path: Path, kind: str) -> None:
    path, record = tmp_path / "piece.bin", tmp_path / "piece.json"
    for each in (path, record):
        if kind == "directory":
            (each / "below").mkdir(parents=True)
        elif kind == "pipe":
            os.mkfifo(each)
        elif kind == "loop of links":
            each.symlink_to(each)
    assert is_damaged(path)
    if kind == "missing":
        assert load_record(record) is None
    else:
        with pytest.raises(DamagedPieceError):
            load_record(record)
    with new_sealed(path) as sink:
        sink.write(CONTENT)
    save_record(record, {"rows": 3})
    assert bytes(read_sealed(path)) == CONTENT
    assert load_record(record) == {"rows": 3}


def test_a_record_notices_every_change_of_its_values(tmp_path: Path) -> None:
    content = {"rows": [1, 2, 3], "mean": 0.1, "texts": ["a\ud800", None], "of": {"x": float("inf")}}
    path = tmp_path / "record.json"
    save_record(path, content)
    assert load_record(path) == content
    written = path.read_bytes()
    for position in range(len(written)):
        changed = bytearray(written)
        changed[position] ^= 1 << position % 7
        path.write_bytes(changed)
        assert damage_of(load_record, path) is not None or load_record(path) == content  # other white space
    for length in range(len(written) - 1):  # the last byte is a line end
        path.write_bytes(written[:length])
        with pytest.raises(DamagedPieceError):
            load_record(path)
    path.write_bytes(written)
    with pytest.raises(DamagedPieceError):
        load_record(path.rename(tmp_path / "other.json"))


@pytest.mark.parametrize("text", ["", "null", "3", "[]", "{}", '{"sha256": 1}', "[" * 100_000, "\0" * 50, "\xff"])
def test_a_record_that_is_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "record.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedPieceError, match=f"{path}: this finished piece has a wrong checksum"):
        load_record(path)


def test_seals_of_files_without_a_trailer(tmp_path: Path) -> None:
    path = tmp_path / "part.parquet"
    path.write_bytes(CONTENT)
    seal = seal_of(path)
    assert seal.startswith("700-")
    check_seals([(path, seal)])
    assert seal_of(path, final=tmp_path / "other.parquet") != seal
    for changed in (CONTENT[:-1], CONTENT + b"\0", bytes(700), b"", CONTENT[:300] + b"?" + CONTENT[301:]):
        path.write_bytes(changed)
        with pytest.raises(DamagedPieceError):
            check_seals([(path, seal)])


def test_a_failed_write_leaves_what_was_there(sealed: Path, tmp_path: Path) -> None:
    def write() -> None:
        with new_sealed(sealed) as sink:
            sink.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert bytes(read_sealed(sealed)) == CONTENT
    assert [each.name for each in tmp_path.iterdir()] == ["piece.bin"]


def test_worker_processes_can_raise_it(tmp_path: Path) -> None:
    error = pickle.loads(pickle.dumps(DamagedPieceError(tmp_path / "a", "is missing")))
    assert (error.path, str(error)) == (tmp_path / "a", f"{tmp_path}/a: this finished piece is missing")


def test_what_is_damaged_again_and_again_ends(tmp_path: Path) -> None:
    made = []

    def action() -> None:
        raise DamagedPieceError(tmp_path / "piece", "is cut short")

    make_again: Callable[[Path], None] = made.append
    with pytest.raises(UserError, match="piece: this finished piece is cut short, though it was made again 2 times"):
        Repairs().run(action, make_again)
    assert made == 2 * [tmp_path / "piece"]
