"""Ranges of rows that are read from a checkpoint's files equal those that were saved, or damage is reported."""

import random
import shutil
import zlib
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from mlet_dist.checkpoint import manifest as manifest_module
from mlet_dist.checkpoint.checked_file import CheckedFile
from mlet_dist.checkpoint.manifest import BLOCK_BYTES, Checksum
from mlet_dist.checkpoint.saver import CheckpointSaver
from mlet_dist.checkpoint.store import CheckpointStore
from mlet_dist.checkpoint.tensor_ranges import DcpFiles
from mlet_dist.errors import UserError
from tests.helpers.train_in_ranks import Ranks

ROWS = 1_001
PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}
DTYPES = (torch.float32, torch.float16)


def _table(name: str, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(ROWS, 12, generator=generator).to(dtype)


def _save(location: str) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    state: dict[str, torch.Tensor] = {"bias": torch.arange(5.0), "scalar": torch.tensor(3, dtype=torch.int64)}
    for name, placement in PLACEMENTS.items():
        for dtype in DTYPES:
            state[f"{name}.{dtype}"] = distribute_tensor(_table(name, dtype), mesh, [placement])
    with CheckpointSaver(CheckpointStore(location), timedelta(seconds=60), 9, None) as saver:
        saver.save(1, {"model": state}, {})


@pytest.fixture(scope="module")
def saved(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three ranks."""
    path = tmp_path_factory.mktemp("saved")
    ranks(3).run(_save, str(path))
    return path


def _open(store: Path, checked: bool = True) -> DcpFiles:
    checkpoint = CheckpointStore(store).checkpoint(1)
    return DcpFiles(checkpoint.location, checkpoint.open, checkpoint.manifest().files if checked else None)


@pytest.mark.multirank
@pytest.mark.parametrize("checked", [True, False])
def test_any_range_of_rows_of_any_sharding_is_read(saved: Path, checked: bool) -> None:
    chance = random.Random(0)
    with _open(saved, checked) as files:
        for name in PLACEMENTS:
            for dtype in DTYPES:
                table, stored = _table(name, dtype), files.tensors[f"model.{name}.{dtype}"]
                assert (stored.shape, stored.dtype) == ((ROWS, 12), dtype)
                bounds = [sorted(chance.choices(range(ROWS + 1), k=2)) for _ in range(20)]
                for start, stop in [*bounds, [0, ROWS], [500, 500]]:
                    out = torch.full((stop - start, 12), -7, dtype=dtype)
                    files.read_rows(f"model.{name}.{dtype}", start, out)
                    assert torch.equal(out, table[start:stop])
        assert torch.equal(files.load("model.bias"), torch.arange(5.0))
        assert int(files.load("model.scalar")) == 3
        assert torch.equal(files.load(f"model.columns.{DTYPES[1]}"), _table("columns", DTYPES[1]))


@pytest.mark.multirank
def test_missing_tensors_and_damaged_files_are_named(saved: Path, tmp_path: Path) -> None:
    name, out = f"model.rows.{torch.float32}", torch.empty(ROWS, 12)
    with _open(saved) as files:
        with pytest.raises(UserError, match=r"holds no tensor 'model\.row'"):
            files.read_rows("model.row", 0, out)
        with pytest.raises(UserError, match=r"holds 36 of 48 values of rows of"):
            files.read_rows(name, ROWS - 3, out[:4])

    copy = shutil.copytree(saved, tmp_path / "flipped")
    path = copy / "step-00000001" / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    row = content.find(_table("rows", torch.float32)[400].numpy().tobytes())
    assert row > 0
    content[row] ^= 1
    path.write_bytes(content)
    with _open(copy) as files:
        files.read_rows(name, 0, out[:300])  # of another rank's file
        with pytest.raises(UserError, match=r"__1_0\.distcp is damaged: the block at byte 0 has checksum"):
            files.read_rows(name, 399, out[:1])
    path.write_bytes(content[:-1])
    with _open(copy) as files, pytest.raises(UserError, match=r"__1_0\.distcp has [\d,]+ bytes instead of [\d,]+"):
        files.read_rows(name, 400, out[:1])
    path.unlink()
    with _open(copy) as files, pytest.raises(UserError, match=r"__1_0\.distcp is missing"):
        files.read_rows(name, 400, out[:1])

    index = path.with_name(".metadata")
    flipped = bytearray(index.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    index.write_bytes(flipped)
    with pytest.raises(UserError, match=r"step-00000001: \.metadata is damaged: the block at byte 0 has checksum"):
        _open(copy)

    copy = shutil.copytree(saved, tmp_path / "cut")
    path = copy / "step-00000001" / "__1_0.distcp"
    path.write_bytes(content[:row])
    with (
        _open(copy, checked=False) as files,
        pytest.raises(UserError, match=r"__1_0\.distcp ends at byte [\d,]+, before"),
    ):
        files.read_rows(name, 400, out[:1])


def test_every_block_that_is_read_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "BLOCK_BYTES", 64)
    monkeypatch.setattr("mlet_dist.checkpoint.checked_file.BLOCK_BYTES", 64)
    assert BLOCK_BYTES != 64
    content = random.Random(1).randbytes(1_000)
    checksum = Checksum()
    checksum.update(content)
    path = tmp_path / "file"
    for damaged in range(-1, 1_000, 37):
        broken = bytearray(content)
        if damaged >= 0:
            broken[damaged] ^= 4
        path.write_bytes(broken)
        for start, stop in [(0, 1_000), (0, 64), (64, 128), (10, 20), (60, 70), (130, 900), (999, 1_000), (5, 5)]:
            file = CheckedFile("file", path.open("rb"), checksum.entry())
            out = bytearray(stop - start)
            touched = stop > start and start // 64 <= damaged // 64 <= (stop - 1) // 64
            if damaged >= 0 and touched:
                with pytest.raises(UserError, match=f"^file is damaged: the block at byte {damaged // 64 * 64:,} has"):
                    file.read_into(start, memoryview(out))
            else:
                for _ in range(2):
                    file.read_into(start, memoryview(out))
                    assert out == content[start:stop]
            file.close()


def test_streamed_bytes_are_read_once_and_verified_by_verify_streamed_at_the_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "BLOCK_BYTES", 64)
    monkeypatch.setattr("mlet_dist.checkpoint.checked_file.BLOCK_BYTES", 64)
    chance = random.Random(2)
    content = chance.randbytes(1_000)
    checksum = Checksum()
    checksum.update(content)
    path = tmp_path / "file"

    def stream(start: int, stop: int) -> bytes:
        """Read from start to stop in steps of random sizes, with random jumps back."""
        file = CheckedFile("file", path.open("rb"), checksum.entry())
        try:
            found, position = bytearray(), start
            while position < stop:
                out = bytearray(min(chance.randrange(1, 150), stop - position))
                file.stream_into(position, memoryview(out))
                found += out
                position += len(out)
                if chance.randrange(10) == 0:
                    other = bytearray(min(30, position))
                    file.stream_into(position - len(other), memoryview(other))
                    assert other in content or broken != content
            file.verify_streamed()
            return bytes(found)
        finally:
            file.close()

    broken = bytearray(content)
    path.write_bytes(content)
    for _ in range(200):
        start, stop = sorted(chance.choices(range(1_001), k=2))
        assert stream(start, stop) == content[start:stop]
    for damaged in range(0, 1_000, 7):
        broken = bytearray(content)
        broken[damaged] ^= 4
        path.write_bytes(broken)
        for start, stop in [(0, 1_000), (damaged, damaged + 1), (max(0, damaged - 90), min(1_000, damaged + 90))]:
            with pytest.raises(UserError, match=f"^file is damaged: the block at byte {damaged // 64 * 64:,} has"):
                stream(start, stop)

    # From the start of a block on, only requested bytes are read; verify_streamed reads the rest of the last block.
    path.write_bytes(content)
    read: list[int] = []
    file = CheckedFile("file", path.open("rb"), checksum.entry())
    monkeypatch.setattr(file, "_read", lambda start, out, real=file._read: (read.append(len(out)), real(start, out)))
    for position in range(64, 264, 20):
        file.stream_into(position, memoryview(bytearray(20)))
    assert sum(read) == 200
    file.verify_streamed()
    assert sum(read) == 256
    file.close()


def test_checksums_are_those_of_zlib() -> None:
    content = random.Random(3).randbytes(BLOCK_BYTES + 1_000)
    checksum = Checksum()
    for start in range(0, len(content), 5_000_001):
        checksum.update(content[start : start + 5_000_001])
    expected = [f"{zlib.crc32(content[:BLOCK_BYTES]):08x}", f"{zlib.crc32(content[BLOCK_BYTES:]):08x}"]
    assert checksum.entry() == {"bytes": len(content), "crc32": expected}
