"""A failed export is reported in one line that names the cause, and the next export resumes from finished units."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.made_run import make_run, random_rows
from mlet_dist.atomic_directory import swap_directories
from mlet_dist.config.model_section import ModelConfig
from mlet_dist.errors import UserError
from mlet_dist.export.collapse.work_directory import WorkDirectory
from mlet_dist.export.export_directory import ExportDirectory
from tests.helpers.export_units import contents, export
from tests.helpers.forked_command import ForkedCommand

MODEL = ModelConfig(embedding_dim=8, hidden_dim=16, bottom_mlp=(16,), top_mlp=(16,))
TABLES = {"a": 15_003, "b": 2_048}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "run"
    make_run(path, TABLES, MODEL, shards=2)
    return path


@pytest.fixture(scope="module")
def expected(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict[str, bytes]]:
    """The contents of undisturbed exports by ``gather``."""
    out = tmp_path_factory.mktemp("expected")
    for gather in (False, True):
        export(made, out / str(gather), outputs=("dcp", "int8"), gather=gather)
    return {gather: contents(out / str(gather)) for gather in (False, True)}


def _records(out: Path) -> dict[str, int]:
    """Return the finished units and the times of their records."""
    return {path.stem: path.stat().st_mtime_ns for path in (out / "records").glob("*.json")}


@pytest.mark.e2e
def test_an_export_that_is_killed_resumes_and_is_bitwise_identical(
    made: Path, expected: dict[bool, dict[str, bytes]], tmp_path: Path
) -> None:
    chance = random.Random(7)
    for gather in (False, True):
        out, partial = tmp_path / f"out-{gather}", tmp_path / f".out-{gather}.partial"
        kept: dict[str, int] = {}
        command = [sys.executable, "-m", "tests.helpers.export_units", made, out, "gather" if gather else "shards"]
        for least in (30,) if gather else (1, 30):
            with ForkedCommand(command, stderr=subprocess.DEVNULL) as child:
                deadline = time.monotonic() + 60
                while len(_records(partial)) < least + chance.randrange(20):
                    assert child.poll() is None
                    assert time.monotonic() < deadline
                child.send_signal(signal.SIGKILL)
            assert not out.exists()
            found = _records(partial)
            assert found.items() >= kept.items()
            kept = found
            # A kill during a write leaves such a file.
            (partial / "export" / "model").mkdir(parents=True, exist_ok=True)
            (partial / "export" / "model" / ".b-00000-of-00016.distcp.tmp").write_bytes(b"half")
        files = {path: path.stat().st_ino for path in partial.rglob("*.distcp")}
        export(made, out, outputs=("dcp", "int8"), gather=gather)
        assert contents(out) == expected[gather]
        assert not partial.exists()
        if not gather:
            again = {path.stat().st_ino for path in out.rglob("*.distcp")}
            assert len(kept) >= 30
            recorded = {path for path, _ in files.items() if path.stem in kept}
            assert {files[path] for path in recorded} <= again


def test_finished_units_of_another_export_are_removed(
    made: Path, expected: dict[bool, dict[str, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    make_run(other, TABLES, MODEL, shards=1)
    out = tmp_path / "out"
    _interrupt(other, out)
    assert _records(tmp_path / ".out.partial")
    capsys.readouterr()
    export(made, out, outputs=("dcp", "int8"))
    assert f"warning: {tmp_path}/.out.partial: removed: it was left by an export of another run" in (
        capsys.readouterr().err
    )
    assert contents(out) == expected[False]


def _interrupt(run: Path, out: Path) -> None:
    """Start an export and stop it after its first unit."""

    class Stopped(Exception):
        pass

    def record(self: WorkDirectory, name: str, content: object) -> None:
        if (self.root / "records").exists() and any((self.root / "records").iterdir()):
            raise Stopped
        before(self, name, content)  # type: ignore[arg-type]

    before = WorkDirectory.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WorkDirectory, "record", record)
        with pytest.raises(Stopped):
            export(run, out, outputs=("dcp", "int8"))


def test_two_exports_cannot_write_the_same_directory(made: Path, tmp_path: Path) -> None:
    message = "another `mlet export` is writing the same export"
    with WorkDirectory(tmp_path / "out").locked(), pytest.raises(UserError, match=message):
        export(made, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_is_replaced_only_with_overwrite(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(made, out, outputs=("safetensors",))
    before = contents(out)
    with pytest.raises(UserError, match=f"^{out}: exists and is not empty; use --overwrite to replace it$"):
        export(made, out)
    assert contents(out) == before
    export(made, out, overwrite=True)
    assert ExportDirectory(out).load()[1]["outputs"].keys() == {"dcp"}
    assert not (out / "safetensors").exists()

    # Killed between the two renames: the old export is back, and may be replaced again.
    out.rename(tmp_path / ".out.replaced")
    with pytest.raises(UserError, match="exists and is not empty"):
        export(made, out)
    export(made, out, outputs=("safetensors",), overwrite=True)
    assert contents(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    # A directory that is not an export is never replaced.
    for content in ("{}", "[", "[1]", '{"format_version": 2, "packages": []}', None):
        shutil.rmtree(out)
        out.mkdir()
        (out / "notes.txt").write_text("mine")
        if content is not None:
            (out / "manifest.json").write_text(content)
        with pytest.raises(UserError, match="exists and is not empty; name another directory or remove this one"):
            export(made, out, overwrite=True)
        assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_out_is_always_a_complete_export_when_its_replacement_is_killed(
    made: Path, expected: dict[bool, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    out = tmp_path / "out"
    export(made, out, outputs=("safetensors",))
    old = contents(out)
    partial, left = tmp_path / ".out.partial", tmp_path / "left"

    class Killed(Exception):
        pass

    def swap_and_die(one: Path, other: Path) -> bool:
        assert contents(out) == old
        if moment == "after":
            assert swap_directories(one, other)
        shutil.copytree(partial, left)  # a killed process does not clean up
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("mlet_dist.export.collapse.work_directory.swap_directories", swap_and_die)
        with pytest.raises(UserError, match="cannot be written"):
            export(made, out, outputs=("dcp", "int8"), overwrite=True)
    assert contents(out) == (old if moment == "before" else expected[False])

    # The next call does not resume from the directory that is left, which may contain the old export.
    shutil.copytree(left, partial)
    with pytest.raises(UserError, match="use --overwrite to replace it"):
        export(made, out, outputs=("dcp", "int8"))
    assert not partial.exists()
    left.rename(partial)
    export(made, out, outputs=("dcp", "int8"), overwrite=True)
    assert contents(out) == expected[False]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_where_names_cannot_be_exchanged_the_old_export_is_moved_aside(
    made: Path, expected: dict[bool, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(made, tmp_path / "out", outputs=("safetensors",))
    monkeypatch.setattr("mlet_dist.export.collapse.work_directory.swap_directories", lambda one, other: False)
    export(made, tmp_path / "out", outputs=("dcp", "int8"), overwrite=True)
    assert contents(tmp_path / "out") == expected[False]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("factor", "row", "column", "value", "message"),
    [
        ("a", 4_321, 3, float("nan"), "table 'a': W1 holds nan in row 4,321, column 3"),
        ("b", 2_047, 0, float("-inf"), "table 'b': W1 holds -inf in row 2,047, column 0"),
        ("b.projection", 15, 7, float("inf"), "table 'b': W2 holds inf in row 15, column 7"),
        ("a", 17, 2, 3e38, "table 'a': W1·W2 holds -inf in row 17, column"),
    ],
)
def test_a_value_that_is_not_finite_is_named(
    tmp_path: Path, factor: str, row: int, column: int, value: float, message: str
) -> None:
    def rows(name: str, start: int, count: int, columns: int) -> torch.Tensor:
        found = random_rows(name, start, count, columns)
        if name == "a.projection" and value == 3e38:
            found[:] = -4.0
        if name == factor and start <= row < start + count:
            found[row - start, column] = value
        return found

    make_run(tmp_path / "run", TABLES, MODEL, shards=2, rows=rows)
    with pytest.raises(UserError, match=message):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_value_that_is_too_large_for_fp16_is_named(tmp_path: Path) -> None:
    def rows(name: str, start: int, count: int, columns: int) -> torch.Tensor:
        found = random_rows(name, start, count, columns)
        if name == "b":
            found[1_000 - start] *= 1e7
        return found

    make_run(tmp_path / "run", TABLES, MODEL, shards=1, rows=rows)
    with pytest.raises(UserError, match=r"table 'b', row 1,000: the value -?[\d.e+]+ is too large for fp16"):
        export(tmp_path / "run", tmp_path / "out", outputs=("dcp", "fp16"))
    export(tmp_path / "run", tmp_path / "out")


def test_a_flipped_bit_is_named_and_units_that_read_it_are_repeated(
    expected: dict[bool, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Make shards of several blocks: the first of a file is verified as soon as its tensors' positions are read.
    for module in ("manifest", "checked_file"):
        monkeypatch.setattr(f"mlet_dist.checkpoint.{module}.BLOCK_BYTES", 1 << 16)
    run = tmp_path / "run"
    make_run(run, TABLES, MODEL, shards=2)
    (shard,) = run.glob("checkpoints/*/__1_0.distcp")
    content = shard.read_bytes()
    position = content.find(random_rows("a", 7_502, 7_501, 16).numpy().tobytes()) + 64 * 1_020 + 3
    # Flip a sign, and set all bits of an exponent, so that the product is not finite before the checksum is verified.
    for value in (0x80, (content[position] ^ 0xFF) & 0x7F):
        changed = bytearray(content)
        changed[position] ^= value
        changed[position - 1] |= 0x80 if value != 0x80 else 0
        shard.write_bytes(changed)
        with pytest.raises(UserError, match=r"__1_0\.distcp is damaged: the block at byte 65,536 has checksum"):
            export(run, tmp_path / "out", outputs=("dcp", "int8"), memory=40 << 20)  # one unit at a time
    assert len(_records(tmp_path / ".out.partial")) == (7_502 + 1_020) // 128  # those before it
    shard.write_bytes(content)
    export(run, tmp_path / "out", outputs=("dcp", "int8"))
    found = contents(tmp_path / "out")
    assert found.keys() == expected[False].keys()
    assert {name for name, content in found.items() if content != expected[False][name]} == {
        "manifest.json"
    }  # which contains the path of the run
    shard.unlink()
    with pytest.raises(UserError, match=r"step-00000001: __1_0\.distcp is missing"):
        export(run, tmp_path / "other")


def test_a_disk_that_is_too_small_is_reported_before_the_export(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError) as raised:
        export(made, tmp_path / "new" / "out")
    needed = sum(TABLES.values()) * 8 * 4
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/new/out: cannot be written: it needs ")
    assert message.endswith(" bytes are missing")
    reported, missing = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) bytes", message))
    assert needed < reported < 8 * needed
    assert missing == reported - 1_000
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system requires root")
def test_an_export_that_fills_the_disk_keeps_its_finished_units(
    made: Path, expected: dict[bool, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", small], check=False)
    if mounted.returncode:
        pytest.skip("mounting is not permitted on this machine")
    try:
        real = shutil.disk_usage
        answers = iter([real(tmp_path)])  # at the start there seems to be enough space
        monkeypatch.setattr(shutil, "disk_usage", lambda path: next(answers, None) or real(path))
        with pytest.raises(UserError) as raised:
            export(made, small / "out", outputs=("dcp", "int8"))
        message = str(raised.value)
        kept_in = f"{small}/.out.partial"
        assert "No space left on device: it needs " in message
        assert f"bytes are missing; finished units are kept in {kept_in}, and the same command resumes" in message
        kept = _records(small / ".out.partial")
        assert len(kept) > 10
        assert not (small / "out").exists()
        assert not list((small / ".out.partial").rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=8m", small], check=True)
        export(made, small / "out", outputs=("dcp", "int8"))
        assert contents(small / "out") == expected[False]
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_changed_manifest_is_rejected(made: Path, tmp_path: Path) -> None:
    export(made, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    manifest["tables"][0]["num_embeddings"] += 1
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"broken manifest: .*its checksum is wrong"):
        ExportDirectory(tmp_path / "out").load()
