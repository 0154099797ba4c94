"""Tests of mlet_dist.atomic_directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from mlet_dist.atomic_directory import staged_directory, swap_directories
from mlet_dist.errors import UserError


def test_the_directory_of_a_killed_process_is_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The directory that a process fills is kept while the process lives, and removed after it is killed."""
    program = f"""
import sys, time
from pathlib import Path
from mlet_dist.atomic_directory import staged_directory
with staged_directory(Path({str(tmp_path / "o[u]t")!r})) as directory:
    (directory / "half").write_text("written")
    print(directory, flush=True)
    time.sleep(60)
"""
    kept = [tmp_path / name for name in (".other.0123abcd.tmp", ".o[u]t.mine.tmp", ".out.0123abcd.tmp")]
    for path in kept:
        path.mkdir()
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=root) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        with staged_directory(tmp_path / "o[u]t"):
            assert (theirs / "half").exists()
        assert capsys.readouterr().err == (
            f"mlet: warning: {theirs}: another process seems to be writing {tmp_path}/o[u]t now\n"
        )
        other.kill()
    (tmp_path / "o[u]t").rmdir()
    with staged_directory(tmp_path / "o[u]t") as directory:
        assert not theirs.exists()
        (directory / "whole").touch()
    assert capsys.readouterr().err == ""
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / "o[u]t"])
    assert [path.name for path in (tmp_path / "o[u]t").iterdir()] == ["whole"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with staged_directory(tmp_path / "new/out") as directory:
            (directory / "half").touch()
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="out: cannot be written: No space left on device"):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_two_directories_swap_their_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / name).mkdir(parents=True)
    assert swap_directories(tmp_path / "a", tmp_path / "b")
    assert {path.name: [each.name for each in path.iterdir()] for path in tmp_path.iterdir()} == {
        "a": ["b"],
        "b": ["a"],
    }
    assert not swap_directories(tmp_path / "a", tmp_path / "gone")
    assert (tmp_path / "a" / "b").exists()
