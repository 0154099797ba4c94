"""Preflight checks: before a job, every node or rank reports what it sees, and the first one compares the reports.

Whether storage is shared is found by marker files: each node writes one where the job will write, and the first node
looks for those of the others.
"""

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

from mlet_dist import __version__
from mlet_dist.cluster.software_checks import installed_versions
from mlet_dist.config.config_file import Config
from mlet_dist.errors import UserError
from mlet_dist.formatting import to_json
from mlet_dist.storage import as_os_error, is_local, open_filesystem

MARKER_PREFIX = ".mlet-preflight-"
_MARKER_TIMEOUT_S = 10.0  # NFS clients cache a directory for some seconds

SHM_CPU, SHM_CUDA = 16 << 20, 1 << 30
"""Bytes of /dev/shm that OpenMP and semaphores need, and that the NCCL ranks of one node need."""

Report = dict[str, Any]


@contextmanager
def collect_report(
    name: str, config: Config | None, problem: str, on_cuda: bool, writes: bool = True
) -> Iterator[Report]:
    """Report what this node or rank sees; the marker files exist until the block ends.

    Args:
        name: the name of this node or rank.
        config: the config of the job; None if it is not known, and then storage is not checked.
        problem: a problem that is already known, or "".
        on_cuda: whether the ranks of the job will use NCCL.
        writes: whether to check storage; one rank of a node suffices.

    Yields:
        A dict that JSON can hold: ``name``, ``problems`` (lines), ``versions`` (by package), ``config_sha256``,
        ``markers``, ``environment`` (the variables that affect ranks).
    """
    problems, markers = [problem] if problem else [], list[Marker]()
    try:
        if writes and not problem and config is not None:
            try:
                for setting, place in _output_places(config):
                    markers.append(write_marker(setting, place))
            except UserError as error:
                problems.append(str(error))
        problems += _shared_memory_problems(on_cuda)
        yield {
            "name": f"{name} on {socket.gethostname()}",
            "problems": problems,
            "versions": _versions(),
            "config_sha256": None if config is None else hashlib.sha256(to_json(config.to_dict()).encode()).hexdigest(),
            "markers": [asdict(marker) for marker in markers],
            "environment": relevant_variables(os.environ),
        }
    finally:
        for marker in markers:
            marker.remove()


def find_problems(reports: Sequence[Report]) -> list[str]:
    """Return what is wrong with the job, one line each, the most serious first.

    Args:
        reports: the reports of all nodes or ranks. The first is that of this process, which looks for the marker files
            of the others.
    """
    names_by_problem: dict[str, list[str]] = {}
    for report in reports:
        for problem in report["problems"]:
            names_by_problem.setdefault(problem, []).append(report["name"])
    problems = [f"{_shortened(names)}: {problem}" for problem, names in names_by_problem.items()]
    problems += _differing_versions(reports)
    first = reports[0]
    others = [report for report in reports[1:] if report["config_sha256"] != first["config_sha256"]]
    if others and not problems:
        names = _shortened([report["name"] for report in others])
        problems.append(f"the config of {names} differs from that of {first['name']}; use the same file on all nodes")
    if not problems:
        problems += _storage_not_shared(reports)
    return problems


def _output_places(config: Config) -> list[tuple[str, str]]:
    """Return the settings that name where the job writes, with their values."""
    places = [("run.dir", config.run.dir)]
    if config.train.checkpoint_dir is not None:
        places.append(("train.checkpoint_dir", str(config.train.checkpoint_dir)))
    return places


def _shared_memory_problems(on_cuda: bool) -> list[str]:
    total = shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0
    needed = SHM_CUDA if on_cuda else SHM_CPU
    if total >= needed:
        return []
    return [
        f"/dev/shm has {total >> 20} MiB, but {'NCCL needs' if on_cuda else 'ranks need'} {needed >> 20} MiB; in "
        "Kubernetes mount an emptyDir with medium: Memory there, with Docker use --shm-size=2g"
    ]


def _versions() -> dict[str, str]:
    found = {name: version for name, version in installed_versions().items() if version}
    own = f"{__version__}+{digest_of_code(Path(__file__).parents[1])}"
    return {"python": ".".join(platform.python_version_tuple()[:2]), "mlet-dist": own} | found


def digest_of_code(package: Path) -> str:
    """Return a digest of a package's files, since two clones of the same version may differ in their code."""
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(package).as_posix() for path in package.rglob("*.*")):
        # launch/ is a link in a clone, and a folder in an installed package.
        if name.endswith((".py", ".yaml")) and not name.startswith("launch/"):
            digest.update(f"{name}\0".encode() + (package / name).read_bytes())
    return digest.hexdigest()[:8]


def relevant_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that configure rendezvous, gloo, NCCL and threads, as far as they are set."""
    prefixes = ("MASTER_", "GLOO_", "NCCL_", "TORCH_NCCL_", "TORCH_ELASTIC_", "FI_", "UCX_", "OMP_", "CUDA_VISIBLE_")
    own = "TORCH_ELASTIC_WORKER_IDENTICAL"  # set by the launcher
    return {name: value for name, value in sorted(environment.items()) if name.startswith(prefixes) and name != own}


def _differing_versions(reports: Sequence[Report]) -> list[str]:
    lines = []
    for package in sorted({name for report in reports for name in report["versions"]}):
        names_by_version: dict[str, list[str]] = {}
        for report in reports:
            names_by_version.setdefault(report["versions"].get(package, "none"), []).append(report["name"])
        if len(names_by_version) > 1:
            found = ", ".join(f"{version} ({_shortened(names)})" for version, names in names_by_version.items())
            lines.append(f"{package} differs: {found}; install the same version everywhere")
    return lines


def _storage_not_shared(reports: Sequence[Report]) -> list[str]:
    writers = {Marker(**marker): report["name"] for report in reports[1:] for marker in report["markers"]}
    names_by_place: dict[str, list[str]] = {}
    for marker in invisible_markers(writers):
        names_by_place.setdefault(f"{marker.setting} {marker.place}", []).append(writers[marker])
    return [
        f"{place} is not shared storage: {reports[0]['name']} does not see what {_shortened(names)} writes there"
        for place, names in names_by_place.items()
    ]


def _shortened(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


@dataclass(frozen=True)
class Marker:
    """An empty file that a node or rank has written where the job will write.

    Attributes:
        setting: the setting that names the place, for example ``run.dir``.
        place: the value of the setting.
        file: the path or URL of the file.
    """

    setting: str
    place: str
    file: str

    def remove(self) -> None:
        """Remove the file; ignore errors."""
        with suppress(OSError), as_os_error():
            filesystem, path = open_filesystem(self.file)
            filesystem.rm_file(path)


def write_marker(setting: str, place: str) -> Marker:
    """Write a marker file into a directory, or into the nearest parent that exists.

    Raises:
        UserError: the file cannot be written.
    """
    try:
        with as_os_error():
            filesystem, path = open_filesystem(place)
            if is_local(filesystem):
                path = str(next(each for each in (Path(path), *Path(path).parents) if each.exists()))
            marker = Marker(setting, place, filesystem.unstrip_protocol(f"{path}/{MARKER_PREFIX}{uuid.uuid4().hex}"))
            filesystem.pipe_file(f"{path}/{Path(marker.file).name}", b"")
    except OSError as error:
        raise UserError(f"{setting} {place} cannot be written: {error.strerror}") from None
    return marker


def invisible_markers(markers: Iterable[Marker]) -> list[Marker]:
    """Return the marker files that this process does not see within some seconds."""
    deadline, left = time.monotonic() + _MARKER_TIMEOUT_S, list(markers)
    while left := [marker for marker in left if not _exists(marker.file)]:
        if time.monotonic() > deadline:
            break
        time.sleep(0.2)
    return left


def _exists(file: str) -> bool:
    with suppress(OSError), as_os_error():
        filesystem, path = open_filesystem(file)
        filesystem.invalidate_cache()
        return bool(filesystem.exists(path))
    return False
