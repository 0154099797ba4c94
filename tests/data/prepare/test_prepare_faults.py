"""Tests of faults in mlet_dist.data.prepare: each gives one clear error and leaves nothing that looks complete."""

import errno
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mlet_dist.data.prepare import chunks, passes, raw_blocks, reading, writing
from mlet_dist.data.prepare.dataset_check import check
from mlet_dist.data.prepare.passes import Shard
from mlet_dist.data.prepare.pipeline import PASSES, SHARDED, Resources, prepare, prepare_criteo
from mlet_dist.data.prepare.raw_formats import criteo
from mlet_dist.data.prepare.table_description import load_table
from mlet_dist.data.prepare.work_files import WorkDirectory
from mlet_dist.data.prepare.worker_pool import WorkerKilledError, Workers
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from tests.helpers.raw_logs import make_raw_lines, raw_bytes

Write = Callable[..., Path]

LINES = make_raw_lines(100)
ROOT = Path(__file__).parents[3]

# `mlet prepare criteo` with very small blocks, killed when it finishes its N-th result.
KILLED = """
import os, pathlib, signal, sys
from mlet_dist.data.prepare import chunks, raw_blocks
from mlet_dist.data.prepare.pipeline import prepare_criteo
raw_blocks.BLOCK_BYTES, chunks.GROUP_ROWS = 3000, 40
*raw, out, left = sys.argv[1:]
rename, left = pathlib.Path.rename, int(left)
def count(self, target):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.rename = count
prepare_criteo([pathlib.Path(path) for path in raw], pathlib.Path(out), min_count=2)
"""


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def killed(raw: list[Path], out: Path, left: int) -> int:
    command = [sys.executable, "-c", KILLED, *map(str, raw), str(out), str(left)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, check=False).returncode


def test_killed_at_any_point_and_run_again_gives_the_same(
    tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs are killed by kill -9, each a few results later than the one before, until a run completes."""
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(chunks, "GROUP_ROWS", 40)
    raw = [write_raw(raw_bytes(LINES[:60]), "a.tsv.gz"), write_raw(raw_bytes(LINES[60:]), "b.tsv")]
    prepare_criteo(raw, tmp_path / "expected", min_count=2)
    runs = 0
    # Once the read pass, which finishes a result per block, is complete, each run does some more.
    for left in (1, 4, 25, 25, 40, 3, 14, 4, 1000):
        code = killed(raw, tmp_path / "out", left)
        runs += 1
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert not (tmp_path / "out").exists()
    assert code == 0
    assert runs > 6
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "out", "raw"]


def test_finished_files_are_not_read_again(tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    good, broken = write_raw(raw_bytes(LINES[:60]), "a.tsv.gz"), write_raw(raw_bytes(LINES[60:]), "b.tsv.gz")
    complete = broken.read_bytes()
    broken.write_bytes(complete[:-900])
    work = tmp_path / ".out.prepare"
    with pytest.raises(UserError) as caught:
        prepare_criteo([good, broken], tmp_path / "out")
    assert re.fullmatch(
        rf"{broken}: truncated or corrupt gzip file: .* \(finished work is kept in {work}; it is used again once the "
        r"error is corrected\)",
        str(caught.value),
    )
    broken.write_bytes(complete)
    read = reading.text_blocks
    asked = []
    monkeypatch.setattr(reading, "text_blocks", lambda raw, *args: asked.append(raw.path) or read(raw, *args))
    prepare_criteo([good, broken], tmp_path / "out")
    assert asked == [str(broken)]
    prepare_criteo([good, broken], tmp_path / "expected")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert not work.exists()


def test_other_arguments_or_files_start_over(tmp_path: Path, write_raw: Write) -> None:
    raw, other = write_raw(raw_bytes(LINES)), write_raw(raw_bytes(LINES[:80]), "other.tsv")
    prepare(criteo(2), [raw], tmp_path / "out", only="read")
    prepare(criteo(1), [raw], tmp_path / "out", only="read")
    assert len(list((tmp_path / ".out.prepare/read").iterdir())) == 1
    os.utime(raw, ns=(1, 1))
    with pytest.raises(UserError, match=r"day\.tsv: is not read yet; run `--pass read` for all shards first"):
        prepare(criteo(1), [raw], tmp_path / "out", only="count")
    prepare_criteo([other], tmp_path / "out")
    assert sum(DatasetSchema.load(tmp_path / "out").rows.values()) == 80
    assert not (tmp_path / ".out.prepare").exists()


def test_killed_after_the_last_rename(tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data set is complete then; the next run removes what is left beside it, and reuses none of it."""
    raw = write_raw(raw_bytes(LINES))

    def kill(_: WorkDirectory) -> None:
        raise KeyboardInterrupt

    for moved in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(WorkDirectory, "remove", kill)
            with pytest.raises(KeyboardInterrupt):
                prepare_criteo([raw], tmp_path / "out")
        expected = files_of(tmp_path / "out")
        check(tmp_path / "out")
        if moved:
            (tmp_path / "out").rename(tmp_path / "moved")
            prepare_criteo([raw], tmp_path / "out")
        else:
            with pytest.raises(UserError, match="out: exists and is not empty"):
                prepare_criteo([raw], tmp_path / "out")
        assert not (tmp_path / ".out.prepare").exists()
        assert files_of(tmp_path / "out") == expected
        subprocess.run(["rm", "-r", str(tmp_path / "out")], check=True)


def test_killed_while_the_work_is_removed(tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the results is never mistaken for all of them."""
    raw = write_raw(raw_bytes(LINES))
    rmtree = shutil.rmtree

    def kill(path: Path, **_: object) -> None:
        if (path / "count").is_dir():
            rmtree(path / "count")
            next(path.glob("read/*/*.arrow")).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            prepare_criteo([raw], tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "expected")
    prepare_criteo([raw], tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "out", "raw"]


def test_a_shard_that_fails_leaves_the_work_of_others(
    tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shard 0 fails on an unusable file while shard 1 is in the middle of another."""
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 3000)
    raw = [write_raw(20 * b"bad\n", "bad.tsv"), write_raw(raw_bytes(LINES), "good.tsv")]
    read_block = reading._read_block

    def fail_beside(*args: Any) -> object:
        monkeypatch.setattr(reading, "_read_block", read_block)
        info = read_block(*args)
        with pytest.raises(UserError, match=r"bad\.tsv: 20 of 20 lines are malformed, e\.g\. line 1: [^(]*$"):
            prepare(criteo(), raw, tmp_path / "out", only="read", shard=Shard(0, 2))
        return info

    monkeypatch.setattr(reading, "_read_block", fail_beside)
    prepare(criteo(), raw, tmp_path / "out", only="read", shard=Shard(1, 2))
    raw[0].write_bytes(raw_bytes(LINES[:50]))
    monkeypatch.setattr(reading, "text_blocks", lambda raw, *args: pytest.fail(f"{raw.path} is read again"))
    with pytest.raises(UserError, match=r"bad\.tsv: is not read yet"):
        prepare(criteo(), raw, tmp_path / "out", only="count")


def test_a_shard_that_runs_twice_at_once(tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler may restart a shard that it takes for lost; neither process writes to the other's files."""
    raw = [write_raw(raw_bytes(LINES))]
    prepare(criteo(), raw, tmp_path / "expected")

    def run(name: str) -> None:
        prepare(criteo(), raw, tmp_path / "out", only=name, shard=Shard() if name in SHARDED else None)

    close = writing._PartWriter.close

    def write_again(writer: writing._PartWriter, name: str) -> object:
        monkeypatch.setattr(writing._PartWriter, "close", close)
        run("write")
        return close(writer, name)

    for name in ("read", "count", "vocabulary"):
        run(name)
    monkeypatch.setattr(writing._PartWriter, "close", write_again)
    run("write")
    run("merge")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    check(tmp_path / "out")


def test_shards_make_the_same_data_set(tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 3000)
    monkeypatch.setattr(chunks, "GROUP_ROWS", 40)
    raw = [write_raw(raw_bytes(LINES[i : i + 25]), f"{i}.tsv") for i in range(0, 100, 25)]
    prepare(criteo(2), raw, tmp_path / "expected")
    for name in PASSES:
        for shard in [Shard(i, 3) for i in (2, 0, 1)] if name in SHARDED else [None]:
            assert not (tmp_path / "out").exists()
            made = prepare(criteo(2), raw, tmp_path / "out", only=name, shard=shard)
            assert (made is None) == (name != "merge")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["expected", "out", "raw"]


def test_a_pass_names_the_missing_pass(tmp_path: Path, write_raw: Write) -> None:
    raw = [write_raw(raw_bytes(LINES[:50]), "a.tsv"), write_raw(raw_bytes(LINES[50:]), "b.tsv")]

    def run(name: str, shard: Shard | None = None) -> None:
        prepare(criteo(2), raw, tmp_path / "out", only=name, shard=shard)

    with pytest.raises(UserError, match=r"a\.tsv: is not read yet; run `--pass read` for all shards first$"):
        run("merge")
    run("read", Shard(0, 2))
    with pytest.raises(UserError, match=r"b\.tsv: is not read yet; run `--pass read` for all shards first"):
        run("count")
    run("read", Shard(1, 2))
    with pytest.raises(
        UserError, match=r"a\.tsv: rows from 0 on are not finished; run `--pass write` for all shards first"
    ):
        run("merge")
    run("count", Shard(0, 2))
    with pytest.raises(
        UserError, match=r"b\.tsv: rows from 0 on are not finished; run `--pass count` for all shards first"
    ):
        run("vocabulary")
    run("count", Shard(1, 2))
    with pytest.raises(UserError, match="table C1 has no vocabulary yet; run `--pass vocabulary` first"):
        run("write")
    run("vocabulary")
    run("write", Shard(0, 2))
    with pytest.raises(
        UserError, match=r"b\.tsv: rows from 0 on are not finished; run `--pass write` for all shards first"
    ):
        run("merge")
    with pytest.raises(UserError, match="a shard goes with one of the passes read, count, write"):
        run("merge", Shard(0, 2))
    assert not (tmp_path / "out").exists()


def test_two_at_once_are_refused(tmp_path: Path, write_raw: Write) -> None:
    raw = write_raw(raw_bytes(LINES))
    prepare(criteo(), [raw], tmp_path / "out", only="read")
    program = f"""
import fcntl, os, sys, time
handle = os.open({str(tmp_path / ".out.prepare")!r}, os.O_RDONLY)
fcntl.flock(handle, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        try:
            with pytest.raises(
                UserError,
                match=r"\.out\.prepare: another `mlet prepare` is running for this data set; wait until it has "
                r"finished$",
            ):
                prepare_criteo([raw], tmp_path / "out")
        finally:
            holder.kill()
    prepare_criteo([raw], tmp_path / "out")  # the lock ended with its process


def test_workers_end_with_their_parent() -> None:
    program = """
import os, time
from mlet_dist.data.prepare.worker_pool import Workers
if __name__ == "__main__":
    with Workers(2) as workers:
        print(*set(workers.map(os.getpid, [()] * 20)), flush=True)
        list(workers.map(time.sleep, [(60,)] * 2))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        parent.kill()
    assert pids
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in pids)


def test_killed_worker() -> None:
    with (
        Workers(2) as workers,
        pytest.raises(
            WorkerKilledError, match="a worker process of mlet prepare was killed, probably because memory is short"
        ),
    ):
        list(workers.map(os._exit, [(1,)]))


@pytest.mark.parametrize("guarded", [True, False])
def test_called_from_a_script(tmp_path: Path, write_raw: Write, guarded: bool) -> None:
    """Worker processes import the script: without a guard each would call prepare and start workers of its own."""
    raw, script = write_raw(raw_bytes(LINES)), tmp_path / "raw/script.py"
    guard = "if __name__ == '__main__': " if guarded else ""
    script.write_text(
        "import pathlib\n"
        "from mlet_dist.data.prepare.raw_formats import criteo\n"
        "from mlet_dist.data.prepare.pipeline import *\n"
        f"{guard}prepare(criteo(), [{str(raw)!r}], pathlib.Path({str(tmp_path / 'out')!r}), "
        "resources=Resources(processes=2))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    advice = "prepare was called while a worker process imported the main script; call it only under "
    advice += '`if __name__ == "__main__":`'
    if guarded:
        assert (done.returncode, (tmp_path / "out").is_dir()) == (0, True), done.stderr
    else:
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].endswith(f"no worker process of mlet prepare could start; {advice}")
        assert f"mlet_dist.errors.UserError: {advice}" in done.stderr  # of a child
        assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_several_files_at_once(tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files read by threads at the same time give the same data set; a broken file stops all threads."""
    monkeypatch.setattr(reading, "PROCESSES_PER_FILE", 1)
    files = [write_raw(raw_bytes(make_raw_lines(200, i)), f"{i}.tsv.gz") for i in range(4)]
    prepare(criteo(), files, tmp_path / "expected")
    prepare(criteo(), files, tmp_path / "out", resources=Resources(processes=2))
    assert files_of(tmp_path / "out") == files_of(tmp_path / "expected")
    files[2].write_bytes(files[2].read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"{files[2]}: truncated or corrupt gzip file"):
        prepare(criteo(), files, tmp_path / "again", resources=Resources(processes=2))
    assert not (tmp_path / "again").exists()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_limit_on_the_size_of_files(tmp_path: Path, write_raw: Write) -> None:
    """A failed write, as on a full disk, is one error message, and nothing is left if no result was finished."""
    raw = write_raw(raw_bytes(make_raw_lines(3000)))
    program = """
import resource, sys, pathlib
from mlet_dist.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(main(["prepare", "criteo", sys.argv[2], "--out", sys.argv[3]]))
"""
    out = tmp_path / "out"
    command = [sys.executable, "-c", program, "100000", str(raw), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if "error" in line] == [
        f"mlet: error: {out}: cannot be written: {os.strerror(errno.EFBIG)}"
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 400 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_and_resuming_with_free_space(
    tmp_path: Path, write_raw: Write, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 100_000)
    raw = write_raw(raw_bytes(make_raw_lines(3000)))
    out = small_disk / "out"
    with pytest.raises(UserError) as caught:
        prepare_criteo([raw], out)
    assert str(caught.value) == (
        f"{out}: cannot be written: No space left on device (finished work is kept in {small_disk}/.out.prepare; the "
        "same command resumes from it)"
    )
    assert not out.exists()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    prepare_criteo([raw], out)
    prepare_criteo([raw], tmp_path / "expected")
    assert files_of(out) == files_of(tmp_path / "expected")


@pytest.fixture
def nothing_changes(tmp_path: Path) -> Iterator[None]:
    """Check after the test that the files of tmp_path, except raw/, are the same as before."""

    def files() -> list[Path]:
        return sorted(p for p in tmp_path.rglob("*") if "raw" not in p.relative_to(tmp_path).parts)

    before = files()
    yield
    assert files() == before


@pytest.mark.usefixtures("nothing_changes")
class TestFailures:
    """Each failure leaves neither ``out`` nor a work directory nor a new parent."""

    def test_truncated_gzip(self, tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(raw_blocks, "BLOCK_BYTES", 2000)  # so that some blocks are parsed before the error
        path = write_raw(raw_bytes(LINES), "day.tsv.gz")
        path.write_bytes(path.read_bytes()[:-2000])
        with pytest.raises(
            UserError, match=f"{path}: truncated or corrupt gzip file: Compressed file ended before .*$"
        ):
            prepare_criteo([path], tmp_path / "new/out")

    @pytest.mark.parametrize("kept", [3, 0.5, 0.99])
    def test_truncated_parquet(self, tmp_path: Path, write_raw: Write, kept: float) -> None:
        path = write_raw(b"", "table.parquet")
        pq.write_table(pa.table({"y": [0, 1] * 50, "x": list(range(100))}), path)
        content = path.read_bytes()
        path.write_bytes(content[: int(kept if kept > 1 else len(content) * kept)])
        with pytest.raises(UserError, match=rf"{path}: not a complete Parquet file: .*"):
            prepare(self.table(path, "format: parquet"), [path], tmp_path / "out")

    def test_damaged_parquet(self, tmp_path: Path, write_raw: Write) -> None:
        path = write_raw(b"", "table.parquet")
        pq.write_table(pa.table({"y": [0, 1] * 50, "x": list(range(100))}), path)
        content = bytearray(path.read_bytes())
        content[4:60] = 56 * b"\xff"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path}: (not a complete Parquet file|cannot be read): .*"):
            prepare(self.table(path, "format: parquet"), [path], tmp_path / "out")

    def test_parquet_text_that_is_not_utf8(self, tmp_path: Path, write_raw: Write) -> None:
        path = write_raw(b"", "table.parquet")
        bytes_of_rows = pa.array([b"a", b"\xff"] * 50)
        texts = pa.StringArray.from_buffers(100, *bytes_of_rows.buffers()[1:])
        pq.write_table(pa.table({"y": [0, 1] * 50, "x": texts}), path)
        with pytest.raises(UserError, match=rf"{path}: not a complete Parquet file: .*Invalid UTF8"):
            prepare(self.table(path, "format: parquet"), [path], tmp_path / "out")

    def table(self, path: Path, form: str) -> object:
        description = path.parent / "table.yaml"
        description.write_text(f"{form}\nlabel: {{column: y}}\nsparse: [{{column: x}}]\n")
        return load_table(description)

    @pytest.mark.parametrize(
        ("header", "message"),
        [
            (b"y,z\n", r"line 1: the header has no column 'x'; it has y, z"),
            (b"y,x,x\n", r"line 1: the header has more than one column 'x'; it has y, x, x"),
            (b"1,2\n", r"line 1: the header has no column 'y'; it has 1, 2"),
            (b"\x1b[2J\a,\xe2\x80\xae2\n", r"line 1: the header has no column 'y'; it has \\x1b\[2J\\x07, \\u202e2"),
            (b"y,\xff\n", r"line 1: the header is not UTF-8 text; set `encoding` in the description, such as .*"),
            (b"y,x\r1,2\r\n", r"line 1: the header holds carriage returns; lines must end with \\n or \\r\\n"),
            (
                b"y," + 200_000 * b"x" + b"\n",
                r"line 1: the header 'y,x{77} is not a line of column names: field larger .*",
            ),
        ],
    )
    def test_header(self, tmp_path: Path, write_raw: Write, header: bytes, message: str) -> None:
        path = write_raw(header + 20 * b"1,2\n", "table.csv")
        with pytest.raises(UserError, match=f"{path}: {message}$"):
            prepare(self.table(path, "format: csv"), [path], tmp_path / "out")

    def test_missing_file_is_named_before_any_is_read(self, tmp_path: Path, write_raw: Write) -> None:
        with pytest.raises(UserError, match=r"nowhere\.tsv: cannot be read: No such file"):
            prepare_criteo([write_raw(b"malformed"), tmp_path / "nowhere.tsv"], tmp_path / "new/out")

    @pytest.mark.parametrize(("content", "name"), [(b"\n\r\n\n", "day.tsv"), (b"", "day.tsv.gz")])
    def test_no_lines(self, tmp_path: Path, write_raw: Write, content: bytes, name: str) -> None:
        path = write_raw(content, name)
        with pytest.raises(UserError, match=f"{path}: the file has no rows; give files with rows$"):
            prepare_criteo([path], tmp_path / "out")

    def test_empty_split(self, tmp_path: Path, write_raw: Write) -> None:
        path = write_raw(raw_bytes(LINES[:4]))
        with pytest.raises(
            UserError, match=f"{path}: split valid is empty: none of the 4 rows falls into it"
        ) as caught:
            prepare_criteo([path], tmp_path / "out")
        assert str(caught.value).endswith("it is used again once the error is corrected)")
        prepare(criteo(), [path], tmp_path / "out", only="read")  # which would remove stale results
        subprocess.run(["rm", "-r", str(tmp_path / ".out.prepare")], check=True)

    @pytest.mark.parametrize("min_count", [0, 2**63, 10**25])
    def test_min_count(self, tmp_path: Path, write_raw: Write, min_count: int) -> None:
        with pytest.raises(UserError, match=f"min_count is {min_count}; it must be at least 1 and at most {2**63 - 1}"):
            prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "out", min_count=min_count)

    def test_memory(self, tmp_path: Path, write_raw: Write) -> None:
        with pytest.raises(UserError, match="memory is 100 MiB; at least 512 MiB are needed"):
            prepare(criteo(), [write_raw(raw_bytes(LINES))], tmp_path / "out", resources=Resources(100 << 20))

    @pytest.mark.parametrize("out", ["", ".", "./"])
    def test_current_directory(
        self, tmp_path: Path, write_raw: Write, out: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = write_raw(raw_bytes(LINES))
        (path.parent / "empty").mkdir()
        monkeypatch.chdir(path.parent / "empty")
        with pytest.raises(UserError, match="out is empty or the current directory; name a directory"):
            prepare_criteo([path], Path(out))
        assert sorted(p.name for p in path.parent.rglob("*")) == ["day.tsv", "empty"]

    def test_no_files(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no raw file"):
            prepare_criteo([], tmp_path / "out")

    def test_parent_is_a_file(self, tmp_path: Path, write_raw: Write) -> None:
        path = write_raw(raw_bytes(LINES))
        with pytest.raises(UserError, match="out: cannot be written: Not a directory"):
            prepare_criteo([path], path / "out")

    @pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs /proc")
    def test_mount_point(self, write_raw: Write) -> None:
        with pytest.raises(UserError, match="/proc: is a mount point"):
            prepare_criteo([write_raw(raw_bytes(LINES))], Path("/proc"))


def test_interrupt_keeps_what_is_finished(tmp_path: Path, write_raw: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    raw = write_raw(raw_bytes(LINES))
    with monkeypatch.context() as patch:
        patch.setattr(passes, "count_group", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare_criteo([raw], tmp_path / "out")
    assert (tmp_path / ".out.prepare").is_dir()
    monkeypatch.setattr(reading, "parse_block", interrupt)  # nothing is read again
    prepare_criteo([raw], tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "raw"]


def test_data_set_has_the_usual_mode(tmp_path: Path, write_raw: Write) -> None:
    prepare_criteo([write_raw(raw_bytes(LINES))], tmp_path / "out")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
