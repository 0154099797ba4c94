"""A Slurm cluster of two nodes on this host, for tests: munged, slurmctld and two slurmd, with their files in a folder.

All processes run in a mount namespace in which /etc/hosts contains node1 and node2.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack, suppress
from pathlib import Path

NODES = ("node1", "node2")
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n.spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=16000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=16000
PartitionName=batch Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
    """Return why Slurm cannot run here; "" if it can."""
    programs = [name for name in ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol") if not _find(name)]
    if programs:
        return f"{', '.join(programs)} not installed: `make slurm` installs Slurm and runs this test"
    return "" if os.geteuid() == 0 else "slurmctld and slurmd need root in this test"


class SlurmCluster:
    """A context manager: ``with SlurmCluster(folder) as slurm: slurm.run("squeue")``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._stack = folder, ExitStack()
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: object, environment: dict[str, str] | None = None, check: bool = True) -> str:
        """Run a command on the cluster and return its output."""
        done = subprocess.run(
            [*self._inside, *map(str, command)],
            env=self.environment | (environment or {}),
            cwd=self._folder / "work",
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0 or not check, done.stdout + done.stderr
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """Return the fields of the job's first component from `scontrol show job`."""
        lines = self.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        return dict(word.split("=", 1) for word in lines[0].split() if "=" in word)

    def logs(self) -> str:
        """Return the ends of all logs, for the message of a failed test."""
        files = [*self._folder.glob("*.log"), *(self._folder / "work").glob("slurm-*")]
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in sorted(files))

    def __enter__(self) -> "SlurmCluster":
        with ExitStack() as stack:
            self._start(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self, stack: ExitStack) -> None:
        folder = self._folder
        for name in ("work", "state", *(f"{node}.spool" for node in NODES)):
            (folder / name).mkdir(parents=True)
        host = socket.gethostname().partition(".")[0]
        config = CONFIG.format(folder=folder, host=host, ports=_free_ports(3))
        (folder / "slurm.conf").write_text(config)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        (folder / "hosts").write_text(f"127.0.0.1 localhost {host} {' '.join(NODES)}\n")
        mount = f"mount --bind {shlex.quote(str(folder / 'hosts'))} /etc/hosts && exec sleep infinity"
        space = subprocess.Popen(["unshare", "-m", "sh", "-c", mount])
        stack.callback(_end, space)
        self._inside = ["nsenter", "-t", str(space.pid), "-m", f"--wd={folder / 'work'}"]
        _wait(lambda: "node1" in subprocess.run(
            [*self._inside, "cat", "/etc/hosts"], capture_output=True, text=True, check=False).stdout)  # fmt: skip
        munge = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder / 'munge.sock'}"]
        munge += [f"--pid-file={folder / 'munged.pid'}", f"--seed-file={folder / 'munge.seed'}"]
        self._daemon(stack, "munged", [*munge, f"--log-file={folder / 'munged.log'}"])
        _wait(lambda: (folder / "munge.sock").exists())
        self._daemon(stack, "slurmctld", ["slurmctld", "-D", "-c"])
        for node in NODES:
            self._daemon(stack, node, ["slurmd", "-D", "-N", node])
        _wait(lambda: self._idle() == len(NODES))

    def _daemon(self, stack: ExitStack, name: str, command: list[str]) -> None:
        command[0] = _find(command[0])
        log = stack.enter_context((self._folder / f"{name}.out.log").open("w"))
        process = subprocess.Popen(
            [*self._inside, *command], env=self.environment, stdout=log, stderr=log, start_new_session=True
        )
        stack.callback(_end, process)

    def _idle(self) -> int:
        listed = [*self._inside, "sinfo", "--noheader", "--Node", "--format=%T"]
        done = subprocess.run(listed, env=self.environment, capture_output=True, text=True, timeout=30, check=False)
        return done.stdout.split().count("idle")


def _find(program: str) -> str:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") or ""


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait(condition, seconds: float = 60) -> None:  # type: ignore[no-untyped-def]
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
