"""Check what the sdist and the wheel in a directory hold; `make wheel` runs this on dist/.

The wheel must hold the files of mlet_dist and nothing else: modules, package data and py.typed, with the components of
launch/ as ordinary files in place of the link mlet_dist/launch. The sdist must hold what a wheel is built from, the
example configs and the project's documents.
"""

import argparse
import os
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

from mlet_dist import __version__

ROOT = Path(__file__).resolve().parents[2]
NAME = f"mlet_dist-{__version__}"
DOCUMENTS = {"CHANGELOG.md", "CITATION.cff", "LICENSE", "README.md", "SECURITY.md"}
BUILD_FILES = {"MANIFEST.in", "PKG-INFO", "constraints.txt", "pyproject.toml", "setup.cfg"}


def package_files() -> set[str]:
    """The files below mlet_dist, by their paths from the root; links are followed."""
    found = set()
    for folder, folders, names in os.walk(ROOT / "mlet_dist", followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        found |= {(Path(folder) / name).relative_to(ROOT).as_posix() for name in names}
    return found


def config_files() -> set[str]:
    """The files below configs, by their paths from the root."""
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")}


def differences(found: set[str], expected: set[str]) -> Iterator[str]:
    """One line for each file that is missing or should not be there."""
    yield from (f"{name} is missing" for name in sorted(expected - found))
    yield from (f"{name} should not be there" for name in sorted(found - expected))


def wheel_problems(path: Path) -> Iterator[str]:
    """What is wrong with a wheel."""
    with zipfile.ZipFile(path) as archive:
        info = f"{NAME}.dist-info"
        files = {entry.filename: entry for entry in archive.infolist() if not entry.is_dir()}
        metadata_files = {
            f"{info}/{name}"
            for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt")
        }
        yield from differences(set(files), package_files() | metadata_files)
        for name, entry in files.items():
            if entry.external_attr >> 16 & 0o170000 == 0o120000:
                yield f"{name} is a symbolic link"
            elif (ROOT / name).is_file() and archive.read(name) != (ROOT / name).read_bytes():
                yield f"{name} differs from the file in this directory"
        metadata = message_from_bytes(archive.read(f"{info}/METADATA"))
        expected = {
            "Name": "mlet-dist",
            "Version": __version__,
            "License-Expression": "BSD-3-Clause",
            "License-File": "LICENSE",
            "Author": "the mlet_dist authors",
        }
        for key, value in expected.items():
            if metadata[key] != value:
                yield f"METADATA: {key} is {metadata[key]!r}, not {value!r}"


def sdist_problems(path: Path) -> Iterator[str]:
    """What is wrong with an sdist."""
    with tarfile.open(path) as archive:
        members = archive.getmembers()
        files = {member.name.removeprefix(f"{NAME}/") for member in members if not member.isdir()}
        own = {name for name in files if not name.startswith("mlet_dist.egg-info/")}
        yield from differences(own, package_files() | config_files() | DOCUMENTS | BUILD_FILES)
        yield from (f"{member.name} is a link" for member in members if member.issym() or member.islnk())


def main() -> int:
    """Check both, and print what is wrong; return 0 if nothing is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="holds one wheel and one sdist of this version")
    directory = parser.parse_args().directory
    wheel, sdist = f"{NAME}-py3-none-any.whl", f"{NAME}.tar.gz"
    problems = list(differences({path.name for path in directory.iterdir()}, {wheel, sdist}))
    if not problems:
        problems += [f"{wheel}: {problem}" for problem in wheel_problems(directory / wheel)]
        problems += [f"{sdist}: {problem}" for problem in sdist_problems(directory / sdist)]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{wheel} and {sdist} hold what they should")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
