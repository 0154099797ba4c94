"""Runs a command as the first process of a new process namespace, as a container does, and sends it a signal.

The kernel drops a signal that the first process has no handler for. Run as a script, this sends SIGTERM at many random
moments of each command and prints what became of them: `python -m tests.helpers.first_process --moments 50`.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.helpers.mlet_command import mlet

ROOT = Path(__file__).parents[2]
MLET = (sys.executable, "-m", "mlet_dist")
_NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child=SIGKILL")
# What arrives before Python runs waits until the command can answer it; docs/design/failures.md.
_BLOCKED = ("env", "--block-signal=TERM", "--block-signal=USR1")


@cache
def namespaces_work() -> bool:
    """Return whether this kernel lets this user make process namespaces."""
    try:
        return subprocess.run([*_NAMESPACE, "true"], capture_output=True, timeout=20, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


@dataclass(frozen=True)
class End:
    """How a command ended: its exit code and output, and the seconds from the signal, if one was sent, to the end."""

    code: int
    stdout: str
    stderr: str
    seconds: float = 0.0
    was_sent: bool = False


def run_as_first_process(
    command: Sequence[object], moment: float | None, log: Path, number: int = signal.SIGTERM, timeout: float = 180
) -> End:
    """Run a command as process 1 of a namespace, and send it a signal ``moment`` seconds after its start."""
    with (
        (log / "stdout").open("w+") as stdout,
        (log / "stderr").open("w+") as stderr,
        subprocess.Popen(
            [*_NAMESPACE, *_BLOCKED, *map(str, command)], cwd=ROOT, stdout=stdout, stderr=stderr, start_new_session=True
        ) as outer,
    ):
        try:
            sent = None
            first = _first_process(outer)
            if moment is not None:
                time.sleep(moment)
                with suppress(ProcessLookupError):
                    if first is not None and outer.poll() is None:
                        os.kill(first, number)
                        sent = time.monotonic()
            code = outer.wait(timeout)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(outer.pid, signal.SIGKILL)
        seconds = 0.0 if sent is None else time.monotonic() - sent
        stdout.seek(0)
        stderr.seek(0)
        return End(code, stdout.read(), stderr.read(), seconds, sent is not None)


def _first_process(outer: "subprocess.Popen[bytes]") -> int | None:
    """Return the process id of the namespace's first process, once it is the command or `env` before it."""
    while outer.poll() is None:
        with suppress(OSError):
            found = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
            if found and Path(f"/proc/{found[0]}/cmdline").read_bytes().split(b"\0")[0] != b"unshare":
                mask = re.search(r"SigBlk:\s*(\w+)", Path(f"/proc/{found[0]}/status").read_text())
                if mask is not None and int(mask[1], 16) & 1 << (signal.SIGTERM - 1):
                    return int(found[0])
        time.sleep(0.0005)
    return None


def wrong(command: str, end: End, finished: bool) -> str:
    """Return what is wrong with the way a command ended after a stop signal; "" if nothing is.

    Args:
        command: its name.
        end: how it ended.
        finished: whether the files that it makes are complete.
    """
    expected = 75 if command.startswith("train") else 143
    if "Traceback" in end.stderr or "Exception ignored" in end.stderr:
        return "a traceback"
    if end.code == 0:
        return "" if finished else "success without a result"
    return "" if end.code == expected else f"exit code {end.code} instead of {expected}"


def commands(folder: Path, data: Path, run: Path, export: Path) -> dict[str, tuple[list[object], Path]]:
    """Return commands of a few seconds with the file that each of them completes, all below ``folder``.

    Args:
        folder: a new directory.
        data: a data set; its model is trained in ``run`` and exported in ``export``.
    """
    small = [f"data.path={data}", *SMALL, f"run.dir={folder / 'run'}"]
    config = ROOT / "configs" / "criteo_kaggle.yaml"
    done = {"train": folder / "run" / "summary.json", "export": folder / "export" / "manifest.json"}
    raw = data.parent / "raw"
    return {
        "train": (["train", config, *small], done["train"]),
        "train --nproc": (["train", config, *small, "--nproc", 2], done["train"]),
        "train --export": (
            ["train", config, f"data.path={data}", *SMALL, f"run.dir={run}", "--export", folder / "export"],
            done["export"],
        ),
        "export": (["export", run, "--out", folder / "export"], done["export"]),
        "verify": (["verify", export, "--run", run, "--data", data], export / "manifest.json"),
        "prepare": (["prepare", "criteo", *sorted(raw.iterdir()), "--out", folder / "data"],
                    folder / "data" / "manifest.json"),
    }  # fmt: skip


SMALL = (
    "data.batch_size=64",
    "data.eval_batch_size=250",
    "model.bottom_mlp=[16]",
    "model.top_mlp=[16]",
    "model.embedding_dim=4",
    "model.hidden_dim=12",
    "train.max_steps=57",
)


def make_inputs(folder: Path) -> tuple[Path, Path, Path]:
    """Make raw files, a data set, a run and its export, and return the last three."""
    data, run, export = folder / "data", folder / "run", folder / "export"
    config = ROOT / "configs" / "criteo_kaggle.yaml"
    for command in (
        ["synth", "--out", folder / "raw", "--rows", 20000, "--format", "tsv"],
        ["synth", "--out", data, "--rows", 6001, "--num-embeddings", 300],
        ["train", config, f"data.path={data}", *SMALL, f"run.dir={run}"],
        ["export", run, "--out", export],
    ):
        mlet(*command)
    return data, run, export


def strike(name: str, moment: float | None, place: Path, inputs: tuple[Path, Path, Path]) -> tuple[End, str]:
    """Run a command, send it SIGTERM after so many seconds, and return how it ended and what is wrong with that."""
    place.mkdir()
    command, result = commands(place, *inputs)[name]
    end = run_as_first_process([*MLET, *command], moment, place)
    return end, wrong(name, end, result.exists())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="signals for each command (default: 50)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32)
    parser.add_argument("--commands", nargs="+", help="names of commands (default: all)")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        inputs = make_inputs(Path(folder))
        for name in args.commands or commands(Path(folder), *inputs):
            dice, results = random.Random(f"{args.seed} {name}"), []
            started = time.monotonic()
            _, problem = strike(name, None, Path(folder) / f"{name}-undisturbed", inputs)
            assert not problem, problem
            seconds = time.monotonic() - started
            for number in range(args.moments):
                moment = dice.uniform(0, seconds)
                results.append((moment, *strike(name, moment, Path(folder) / f"{name}-{number}", inputs)))
            codes = Counter(end.code for _, end, _ in results if end.was_sent)
            slowest = max((end.seconds for _, end, _ in results), default=0.0)
            shown = ", ".join(f"{count} with {code}" for code, count in sorted(codes.items()))
            print(f"{name}: {sum(codes.values())} signals in {seconds:.1f} s: {shown}; slowest end {slowest:.1f} s")
            for moment, end, problem in results:
                if problem:
                    failed = True
                    print(f"  after {moment:.3f} s: {problem}\n{end.stderr}")
            sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
