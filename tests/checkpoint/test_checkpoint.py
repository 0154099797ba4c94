"""Checkpoints are complete or reported as damaged, written in the background, and removed by retention."""

import io
import os
import shutil
import zlib
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed as dist

from mlet_dist.checkpoint import manifest
from mlet_dist.checkpoint.load import latest_complete, latest_finished, load_state, require_complete
from mlet_dist.checkpoint.manifest import BLOCK_BYTES, FORMAT_VERSION, RUN_ID, Checksum, Manifest, ManifestError
from mlet_dist.checkpoint.saver import CheckpointSaver, apply_retention
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.errors import UserError
from mlet_dist.training.resume import ResumePoint, drop_later_checkpoints
from tests.helpers.ranks import RankFailed
from tests.helpers.train_in_ranks import Ranks

SIZE = 1 << 16


def _save(
    location: str, steps: tuple[int, ...], keep_last: int = 9, keep_every: int | None = None, run: str | None = None
) -> None:
    """Save checkpoints of a tensor that changes as soon as ``save`` has returned."""
    tensor, of_run = torch.zeros(SIZE), {} if run is None else {RUN_ID: run}
    saver = CheckpointSaver(CheckpointStore(location), timedelta(seconds=60), keep_last, keep_every)
    with saver:
        for step in steps:
            tensor.fill_(step)
            own = {str(dist.get_rank()): torch.full((9,), float(step))}
            saver.save(step, {"tensor": tensor, "own": own}, {"note": "λ", "numbers": [1, 0.1, None]} | of_run)
            tensor.fill_(-1)
        saver.wait()


def _load(location: str) -> tuple[int, torch.Tensor]:
    found = latest_complete(CheckpointStore(location))
    assert found is not None
    state = {"tensor": torch.empty(SIZE)}
    load_state(state, found.checkpoint.location)
    return found.manifest.step, state["tensor"]


@pytest.fixture
def two(ranks: Ranks, tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 5, by two ranks."""
    ranks(2).run(_save, str(tmp_path / "two"), (3, 5))
    return tmp_path / "two"


@pytest.mark.multirank
def test_the_state_is_copied_before_save_returns(ranks: Ranks, two: Path) -> None:
    for world_size in (1, 2):
        for step, tensor in ranks(world_size).run(_load, str(two)):
            assert step == 5
            assert torch.equal(tensor, torch.full((SIZE,), 5.0))
    saved = CheckpointStore(two).checkpoint(5).manifest()
    assert dict(saved.about) == {"note": "λ", "numbers": [1, 0.1, None]}
    on_disk = {path.name for path in (two / "step-00000005").iterdir()}
    assert on_disk == {"manifest.json", *saved.files}
    assert {".metadata", "__0_0.distcp"} <= saved.files.keys()


@pytest.mark.multirank
def test_a_store_may_be_any_url_of_fsspec(ranks: Ranks) -> None:
    pool = ranks(1)
    pool.run(_save, "memory://bucket/run", (1, 2, 3), 2)
    ((step, tensor),) = pool.run(_load, "memory://bucket/run")
    assert step == 3
    assert torch.equal(tensor, torch.full((SIZE,), 3.0))
    assert pool.run(_names, "memory://bucket/run") == [["step-00000002", "step-00000003"]]


def _names(location: str) -> list[str]:
    return [each.name for each in CheckpointStore(location).checkpoints()]


@pytest.mark.multirank
def test_the_last_ones_and_every_mth_are_kept(ranks: Ranks, tmp_path: Path) -> None:
    ranks(1).run(_save, str(tmp_path), (2, 4, 5, 6, 8, 9), 2, 4)
    assert _names(str(tmp_path)) == [f"step-{step:08d}" for step in (4, 8, 9)]
    apply_retention(CheckpointStore(tmp_path), None, 1, None, kept=4)
    assert _names(str(tmp_path)) == ["step-00000004", "step-00000009"]
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / ".incomplete").touch()  # another job may be writing it
    apply_retention(CheckpointStore(tmp_path), None, 1, None)
    assert _names(str(tmp_path)) == ["step-00000001", "step-00000009"]


@pytest.mark.multirank
@pytest.mark.parametrize("steps", [(4,), (3,), (1,)])
def test_two_runs_that_save_in_one_place_are_noticed(ranks: Ranks, tmp_path: Path, steps: tuple[int, ...]) -> None:
    """By each of them at the next checkpoint that it saves; nothing is removed."""
    ranks(2).run(_save, str(tmp_path), (2, 3), 2, None, "a")
    told = "another run saves its checkpoints there, too; stop one of them, give each run a train.checkpoint_dir"
    for run, steps_of_run in (("b", steps), ("a", (5,))):
        with pytest.raises(RankFailed, match=f"step-0000000[1234]: {told}"):
            ranks(2).run(_save, str(tmp_path), steps_of_run, 1, None, run)
    assert _names(str(tmp_path)) == [f"step-{step:08d}" for step in sorted({2, 3, 5, *steps})]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)


@pytest.mark.multirank
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_damage_to_any_file_is_found_and_named(two: Path, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    names = [path.name for path in (two / "step-00000005").iterdir()]
    assert len(names) >= 3
    for name in names:
        copy = shutil.copytree(two, tmp_path / f"copy of {name}")
        damage(copy / "step-00000005" / name)
        found = latest_complete(CheckpointStore(copy))
        assert found is not None
        assert found.checkpoint.step == 3
        (line,) = found.damage
        assert f"step-00000005: {name} " in line
        with pytest.raises(UserError, match=f"the checkpoint is not complete: .*step-00000005: {name} "):
            require_complete(CheckpointStore(copy).checkpoint(5))
        damage(copy / "step-00000003" / name)
        with pytest.raises(UserError, match=f"no checkpoint is complete: .*-00000005: {name} .*-00000003: {name} "):
            latest_complete(CheckpointStore(copy))


def test_every_bit_of_a_manifest_counts() -> None:
    checksum = Checksum()
    checksum.update(b"123456789")
    assert checksum.entry() == {"bytes": 9, "crc32": ["cbf43926"]}  # the check value of CRC-32
    rendered = Manifest(7, {"a": checksum.entry()}, {"loss": 0.1})
    data = rendered.render()
    assert Manifest.parse(data, "here") == rendered
    for position in range(0, 8 * len(data), 5):
        broken = bytearray(data)
        broken[position // 8] ^= 1 << position % 8
        with pytest.raises(ManifestError, match=r"^here"):
            Manifest.parse(bytes(broken), "here")


def test_a_checkpoint_of_another_version_is_neither_damaged_nor_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    store.checkpoint(1).begin()
    store.checkpoint(1).finish(Manifest(1, {}, {}))
    store.checkpoint(2).begin()
    monkeypatch.setattr(manifest, "FORMAT_VERSION", FORMAT_VERSION + 1)
    store.checkpoint(2).finish(Manifest(2, {}, {}))
    monkeypatch.undo()
    version = FORMAT_VERSION + 1
    with pytest.raises(
        UserError, match=rf"step-00000002: manifest\.json: format_version is {version}, and this .*reads"
    ):
        latest_complete(store)


def test_a_checkpoint_under_the_name_of_another_step_is_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2):
        store.checkpoint(step).begin()
        store.checkpoint(step).finish(Manifest(step, {}, {}))
    (tmp_path / "step-00000002").rename(tmp_path / "step-00000009")
    found = latest_complete(store)
    assert found is not None
    assert found.checkpoint.step == 1
    assert found.damage == [f"{tmp_path}/step-00000009: manifest.json is that of step 2: the directory was renamed"]
    drop_later_checkpoints(store, ResumePoint(found, is_own=True))
    assert [each.name for each in tmp_path.iterdir()] == ["step-00000001"]


def test_each_block_of_a_file_has_a_checksum_of_its_own() -> None:
    content = bytes(range(256)) * (BLOCK_BYTES // 256) * 2 + b"rest"
    at_once, by_parts = Checksum(), Checksum()
    at_once.update(content)
    for start in range(0, len(content), 5_000_001):
        by_parts.update(content[start : start + 5_000_001])
    blocks = [content[start : start + BLOCK_BYTES] for start in range(0, len(content), BLOCK_BYTES)]
    expected = {"bytes": len(content), "crc32": [f"{zlib.crc32(block):08x}" for block in blocks]}
    assert at_once.entry() == by_parts.entry() == expected
    written = Manifest(1, {"a": expected}, {})
    assert written.find_damage("a", lambda _: io.BytesIO(content)) is None
    broken = bytearray(content)
    broken[BLOCK_BYTES + 7] ^= 1
    damage = written.find_damage("a", lambda _: io.BytesIO(broken))
    assert damage is not None
    assert damage.startswith("a is damaged: the block at byte 16,777,216 has checksum ")


def test_a_checkpoint_is_completed_and_removed_atomically(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    checkpoint = store.checkpoint(4)
    checkpoint.begin()
    with checkpoint.open_new("file") as file:
        file.write(b"12")
    assert checkpoint.is_unfinished
    assert latest_complete(store) is None  # a job that was killed before its first checkpoint was complete
    checksum = Checksum()
    checksum.update(b"12")
    checkpoint.finish(Manifest(4, {"file": checksum.entry()}, {}))
    assert not checkpoint.is_unfinished
    found = latest_complete(store)
    assert found is not None
    named = Checkpoint.at(f"{tmp_path}/step-00000004/")
    assert named is not None
    assert found.checkpoint.location == checkpoint.location == named.location
    checkpoint.begin()  # the same step again
    assert latest_complete(store) is None
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []
    assert Checkpoint.at(str(tmp_path)) is None


def test_files_are_synced_before_the_manifest_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power failure cannot be tested here; the order of system calls can."""
    calls: list[tuple[str, str]] = []

    def sync(handle: int, fsync: Callable[[int], None] = os.fsync) -> None:
        calls.append(("fsync", Path(f"/proc/self/fd/{handle}").resolve().name))
        fsync(handle)

    def replace(source: str, target: str, replace: Callable[[str, str], None] = os.replace) -> None:
        assert Path(source).stat().st_size > 0
        calls.append((Path(source).name, Path(target).name))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    checkpoint = CheckpointStore(tmp_path / "run").checkpoint(7)
    checkpoint.begin()
    with checkpoint.open_new("a") as file:
        file.write(b"1")
    checkpoint.finish(Manifest(7, {}, {}))
    assert calls == [
        ("fsync", "a"),
        ("fsync", checkpoint.name),
        ("fsync", ".manifest.json.tmp"),
        (".manifest.json.tmp", "manifest.json"),
        ("fsync", checkpoint.name),
        ("fsync", "run"),
    ]


class _Killed(BaseException):
    """Stands for kill -9."""


@pytest.mark.parametrize("num_removed", range(5))
def test_a_kill_during_removal_leaves_nothing_that_looks_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_removed: int
) -> None:
    store = CheckpointStore(tmp_path)
    checkpoint = store.checkpoint(4)
    checkpoint.begin()
    entries = {}
    for name in ("a", "b"):
        with checkpoint.open_new(name) as file:
            file.write(b"1")
        entries[name] = {"bytes": 1, "crc32": ["83dcefb7"]}
    checkpoint.finish(Manifest(4, entries, {}))
    assert latest_complete(store) is not None
    removed: list[str] = []

    def until_killed(remove: Callable[..., None]) -> Callable[..., None]:
        def wrapped(path: Any, *args: Any, **arguments: Any) -> None:
            if len(removed) == num_removed:
                raise _Killed
            remove(path, *args, **arguments)
            removed.append(str(path))

        return wrapped

    for name in ("remove", "unlink", "rmdir"):
        monkeypatch.setattr(os, name, until_killed(getattr(os, name)))
    with pytest.raises(_Killed):
        checkpoint.remove()
    monkeypatch.undo()
    assert len(removed) == num_removed
    if num_removed:
        assert latest_complete(store) is None
        assert checkpoint.is_unfinished
        drop_later_checkpoints(store, None)
        assert list(tmp_path.iterdir()) == []


def _fail_to_write(location: str) -> None:
    """Save a second checkpoint that the last rank cannot write."""
    store = CheckpointStore(location)
    with CheckpointSaver(store, timedelta(seconds=60), 9, None) as saver:
        saver.save(1, {"tensor": torch.ones(2)}, {})
        saver.wait()
        saver.save(2, {"tensor": torch.ones(2), "broken": _Unwritable() if dist.get_rank() == 1 else 1}, {})
        saver.wait()


class _Unwritable:
    def __reduce__(self) -> tuple[object, ...]:
        raise OSError(5, "Input/output error")


@pytest.mark.multirank
def test_a_failed_save_is_an_error_on_every_rank_and_leaves_no_files(ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankFailed) as failed:
        ranks(2).run(_fail_to_write, str(tmp_path))
    lines = [line for line in str(failed.value).splitlines() if "UserError: " in line]
    assert len(lines) == 2
    assert all("step-00000002: rank 1 cannot write it: " in line and "Input/output error" in line for line in lines)
    assert _names(str(tmp_path)) == ["step-00000001"]
    assert latest_finished(CheckpointStore(tmp_path))[0].step == 1


def _fill_the_disk(location: str) -> None:
    """Save to a disk that has space when saving starts and is full when files are written: they are /dev/full."""
    store = CheckpointStore(location)
    with CheckpointSaver(store, timedelta(seconds=60), 9, None) as saver, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "open_new", lambda self, name: open("/dev/full", "wb"))  # noqa: SIM115
        saver.save(1, {"tensor": torch.ones(SIZE)}, {})
        saver.wait()


def _fail_to_remove(location: str) -> None:
    def refuse(checkpoint: Checkpoint) -> None:
        if Path(checkpoint.path).exists():
            raise PermissionError(13, "Permission denied")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "remove", refuse)
        _save(location, (1, 2), keep_last=1)


@pytest.mark.multirank
def test_errors_of_the_disk_are_in_the_message(ranks: Ranks, tmp_path: Path) -> None:
    full = tmp_path / "full"
    with pytest.raises(RankFailed) as failed:
        ranks(1).run(_fill_the_disk, str(full))
    expected = f"UserError: {full}/step-00000001: rank 0 cannot write it: [Errno 28] No space left on device; it needs "
    assert expected in str(failed.value)
    assert "are free: fewer were free while it was written" in str(failed.value)
    assert _names(str(full)) == []
    kept = tmp_path / "kept"
    kept.mkdir()
    with pytest.raises(RankFailed) as failed:
        ranks(1).run(_fail_to_remove, str(kept))
    expected = f"UserError: {kept}: older checkpoints cannot be removed: [Errno 13] Permission denied"
    assert expected in str(failed.value)
    assert latest_finished(CheckpointStore(kept))[0].step == 2
