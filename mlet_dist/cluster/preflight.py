"""Checks before a job starts: what each node knows of itself, its storage included, judged by node 0 for all."""

import hashlib
import os
import platform
import shutil
import socket
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mlet_dist import __version__
from mlet_dist.cluster.software_checks import installed_versions
from mlet_dist.config.sections import Config
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json

PREFIX = ".mlet-preflight-"
_SECONDS_TO_APPEAR = 10.0  # NFS clients look again after a while


@dataclass(frozen=True)
class Mark:
    """An empty file that somebody has put where a job will write.

    Attributes:
        setting: that names the place, e.g. ``run.dir``.
        place: as the setting has it.
        file: path or URL of the mark.
    """

    setting: str
    place: str
    file: str

    def remove(self) -> None:
        """Remove it; whatever hinders that."""
        with suppress(OSError):
            filesystem, path = fsspec.core.url_to_fs(self.file)
            filesystem.rm_file(path)


def put_mark(setting: str, place: str) -> Mark:
    """Write a mark into a directory, or into the nearest one above it that exists.

    Raises:
        UserError: it cannot be written.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(place)
        if isinstance(filesystem, LocalFileSystem):
            path = str(next(each for each in (Path(path), *Path(path).parents) if each.exists()))
        mark = Mark(setting, place, filesystem.unstrip_protocol(f"{path}/{PREFIX}{uuid.uuid4().hex}"))
        filesystem.pipe_file(f"{path}/{Path(mark.file).name}", b"")
    except (OSError, ValueError, ImportError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{setting} {place} cannot be written: {why}") from None
    return mark


def unseen(marks: Iterable[Mark]) -> list[Mark]:
    """Those of others' marks that do not appear here."""
    deadline, left = time.monotonic() + _SECONDS_TO_APPEAR, list(marks)
    while left := [mark for mark in left if not _exists(mark.file)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return left


def _exists(file: str) -> bool:
    with suppress(OSError):
        filesystem, path = fsspec.core.url_to_fs(file)
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))
    return False


SHM_CPU, SHM_CUDA = 16 << 20, 1 << 30
"""Bytes of /dev/shm that OpenMP and semaphores want, and that NCCL's ranks of one node want."""

Facts = dict[str, Any]


@contextmanager
def facts_of(name: str, config: Config | None, problem: str, on_cuda: bool, writes: bool = True) -> Iterator[Facts]:
    """What is known here; within the block, marks lie where the job will write.

    Args:
        name: of this node or rank.
        config: None where none is known; then no storage is looked at.
        problem: found already, or nothing.
        on_cuda: whether ranks will talk by NCCL.
        writes: whether to look at storage; one rank of a node is enough.

    Returns:
        Plain values: ``name``, ``problems`` (lines), ``versions`` (by package), ``settings`` (a digest), ``marks``,
        ``environment`` (variables that steer ranks).
    """
    problems, marks = [problem] if problem else [], list[Mark]()
    try:
        if writes and not problem and config is not None:
            try:
                for setting, place in _written(config):
                    marks.append(put_mark(setting, place))
            except UserError as error:
                problems.append(str(error))
        problems += _shared_memory(on_cuda)
        yield {
            "name": f"{name} on {socket.gethostname()}",
            "problems": problems,
            "versions": _versions(),
            "settings": None if config is None else hashlib.sha256(to_json(config.to_dict()).encode()).hexdigest(),
            "marks": [asdict(mark) for mark in marks],
            "environment": shown_settings(os.environ),
        }
    finally:
        for mark in marks:
            mark.remove()


def judge(told: Sequence[Facts]) -> list[str]:
    """What is wrong, a line each, the worst first.

    Args:
        told: of all nodes or ranks; the first is who asks, and looks for the others' marks.
    """
    found: dict[str, list[str]] = {}
    for facts in told:
        for problem in facts["problems"]:
            found.setdefault(problem, []).append(facts["name"])
    wrong = [f"{_some(names)}: {problem}" for problem, names in found.items()]
    wrong += _differing_versions(told)
    first, others = told[0], [facts for facts in told[1:] if facts["settings"] != told[0]["settings"]]
    if others and not wrong:
        names = _some([facts["name"] for facts in others])
        wrong.append(f"{names} reads other settings than {first['name']}: all need the same config file")
    if not wrong:
        wrong += _storage_apart(told)
    return wrong


def _written(config: Config) -> list[tuple[str, str]]:
    written = [("run.dir", config.run.dir)]
    if config.train.checkpoint_dir is not None:
        written.append(("train.checkpoint_dir", str(config.train.checkpoint_dir)))
    return written


def _shared_memory(on_cuda: bool) -> list[str]:
    total = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    needed = SHM_CUDA if on_cuda else SHM_CPU
    if total >= needed:
        return []
    return [
        f"/dev/shm has {total >> 20} MiB, and {'NCCL needs' if on_cuda else 'ranks need'} {needed >> 20} MiB: in k8s "
        "mount an emptyDir with medium: Memory there, or docker run --shm-size=2g"
    ]


def _versions() -> dict[str, str]:
    found = {name: version for name, version in installed_versions().items() if version}
    ours = f"{__version__}+{digest_of_code(Path(__file__).parents[1])}"
    return {"python": ".".join(platform.python_version_tuple()[:2]), "mlet-dist": ours} | found


def digest_of_code(package: Path) -> str:
    """Of a package's files: two clones are of one version, and not always of one code."""
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(package).as_posix() for path in package.rglob("*.*")):
        # launch/ is a link in a clone, and a folder where mlet_dist is installed.
        if name.endswith((".py", ".yaml")) and not name.startswith("launch/"):
            digest.update(f"{name}\0".encode() + (package / name).read_bytes())
    return digest.hexdigest()[:8]


def _differing_versions(told: Sequence[Facts]) -> list[str]:
    lines = []
    for package in sorted({name for facts in told for name in facts["versions"]}):
        by_version: dict[str, list[str]] = {}
        for facts in told:
            by_version.setdefault(facts["versions"].get(package, "none"), []).append(facts["name"])
        if len(by_version) > 1:
            each = ", ".join(f"{version} ({_some(names)})" for version, names in by_version.items())
            lines.append(f"{package} differs: {each}; all need the same")
    return lines


def _storage_apart(told: Sequence[Facts]) -> list[str]:
    whose = {Mark(**mark): facts["name"] for facts in told[1:] for mark in facts["marks"]}
    apart: dict[str, list[str]] = {}
    for mark in unseen(whose):
        apart.setdefault(f"{mark.setting} {mark.place}", []).append(whose[mark])
    return [
        f"{place} is not one storage: what {_some(names)} writes there, {told[0]['name']} does not see"
        for place, names in apart.items()
    ]


def _some(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def shown_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that steer rendezvous, gloo, NCCL and threads, as far as they are set."""
    prefixes = ("MASTER_", "GLOO_", "NCCL_", "TORCH_NCCL_", "TORCH_ELASTIC_", "FI_", "UCX_", "OMP_", "CUDA_VISIBLE_")
    return {name: value for name, value in sorted(environment.items()) if name.startswith(prefixes)}
