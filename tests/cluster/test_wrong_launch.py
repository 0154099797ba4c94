"""Launches that cannot work end soon on every node, with one line that gives the reason; no rank is started."""

import os
import re
import shlex
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from tests.helpers.forked_command import MLET, ROOT, ForkedCommand

pytestmark = pytest.mark.e2e

CONFIG = ROOT / "configs" / "criteo_kaggle.yaml"
_TCPSTORE_MAGIC = 0x3C85F7CE  # what a client sends first to a TCPStore


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
        return port


def connect(port: int) -> socket.socket:
    """Connect to the port, as soon as a process listens on it."""
    while True:
        try:
            return socket.create_connection(("localhost", port))
        except ConnectionRefusedError:
            time.sleep(0.05)


def node(
    rank: int, *settings: str, before: str = "", environment: dict[str, str] | None = None
) -> "subprocess.Popen[str]":
    """Start one of two nodes; the shell command ``before`` runs first, in a mount namespace of its own."""
    command = [*MLET, "train", str(CONFIG), *settings]
    command += ["--nproc", "1", "--nnodes", "2", "--node-rank", str(rank)]
    if "--master-addr" not in settings:
        command += ["--master-addr", "localhost"]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if not before and environment is None:
        return ForkedCommand(command, **output)
    if before:
        command = ["unshare", "-rm", "sh", "-c", f"{before} && exec {shlex.join(command)}"]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | (environment or {}), text=True, **output)


def end(process: "subprocess.Popen[str]", code: int) -> str:
    """Return the one line that a node prints at its end."""
    output, errors = process.communicate(timeout=60)
    assert output == ""
    (line,) = [line for line in errors.splitlines() if not re.match(r"mlet: [\dTZ:-]{20} node \d of 2: started", line)]
    assert process.returncode == code, line
    assert line.startswith("mlet: error: ")
    return line.removeprefix("mlet: error: ")


def common_error(first: "subprocess.Popen[str]", second: "subprocess.Popen[str]") -> str:
    lines = [end(each, 2) for each in (first, second)]
    assert lines[0] == lines[1]
    return lines[0]


@pytest.fixture
def settings(small_model: tuple[str, ...], tmp_path: Path) -> tuple[str, ...]:
    return (*small_model, f"run.dir={tmp_path / 'runs' / 'run'}", "--wait", "50")


def test_node_0_is_unreachable(settings: tuple[str, ...]) -> None:
    port = free_port()
    lonely = node(0, *settings[:-1], "4", "--master-port", str(port))
    unknown = node(1, *settings[:-1], "2", "--master-addr", "no-such-host.invalid")
    nobody = free_port()
    closed = node(1, *settings[:-1], "2", "--master-port", str(nobody))
    with connect(port) as stranger:  # torch would log this, with a stack trace
        stranger.sendall(b"\0" + struct.pack("<I", _TCPSTORE_MAGIC) + b"\1" + b"\xff" * 8)
    assert "the host name no-such-host.invalid cannot be resolved; --master-addr" in end(unknown, 69)
    assert f"nothing listens on localhost:{nobody}; check that --master-addr is that of node 0" in end(closed, 69)
    assert f"node 1 of 2 did not join at localhost:{port} within 4 s (--wait)" in end(lonely, 69)


def test_two_jobs_on_one_port(settings: tuple[str, ...]) -> None:
    port = ("--master-port", str(free_port()))
    with socket.socket() as taken:
        taken.bind(("", int(port[1])))
        taken.listen()
        assert f"port {port[1]} of {socket.gethostname()} is in use by another job" in end(
            node(0, *settings[:-1], "2", *port), 2
        )
    first = node(0, *settings, *port)
    try:
        stranger = node(1, *settings[:-1], "6", *port, "train.seed=7")
        assert "is not node 0 of this job: another job uses the port" in end(stranger, 69)
    finally:
        first.kill()
        first.communicate()


def test_different_versions(settings: tuple[str, ...], tmp_path: Path) -> None:
    older = tmp_path / "torchrec-1.7.0.dist-info"
    older.mkdir()
    (older / "METADATA").write_text("Metadata-Version: 2.1\nName: torchrec\nVersion: 1.7.0\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    line = common_error(node(0, *settings), node(1, *settings, environment={"PYTHONPATH": path}))
    host = socket.gethostname()
    assert line.startswith("torchrec differs: ")
    assert f"1.7.0 (node 1 on {host}); install the same version everywhere" in line


def test_data_set_that_one_node_does_not_see(settings: tuple[str, ...], small_data: Path) -> None:
    line = common_error(node(0, *settings), node(1, *settings, before=f"mount -t tmpfs none {small_data}"))
    assert line.startswith(f"node 1 on {socket.gethostname()}: {small_data}")


def test_checkpoint_directory_that_one_node_cannot_write(settings: tuple[str, ...], tmp_path: Path) -> None:
    store = tmp_path / "checkpoints"
    store.mkdir()
    read_only = f"mount --bind {store} {store} && mount -o remount,ro,bind {store}"
    settings += (f"train.checkpoint_dir={store}",)
    line = common_error(node(0, *settings), node(1, *settings, before=read_only))
    host = socket.gethostname()
    assert line == f"node 1 on {host}: train.checkpoint_dir {store} cannot be written: Read-only file system"
    assert list(store.iterdir()) == []


def test_too_little_shared_memory(settings: tuple[str, ...]) -> None:
    line = common_error(node(0, *settings), node(1, *settings, before="mount -t tmpfs -o size=1m none /dev/shm"))
    assert line.startswith(f"node 1 on {socket.gethostname()}: /dev/shm has 1 MiB, but ranks need 16 MiB")


def test_storage_that_is_not_shared(settings: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    line = common_error(node(0, *settings), node(1, *settings, before=f"mount -t tmpfs none {tmp_path / 'runs'}"))
    host = socket.gethostname()
    assert line.endswith(f"is not shared storage: node 0 on {host} does not see what node 1 on {host} writes there")
    assert line.startswith(f"run.dir {tmp_path / 'runs' / 'run'} ")
    assert list((tmp_path / "runs").iterdir()) == []
