"""Lists of raw files: directories and patterns become files, and directories ``key=value`` become columns."""

import glob
import os
import posixpath
import re
from collections.abc import Hashable, Iterator, Sequence
from typing import Any
from urllib.parse import unquote

from mlet_dist.errors import UserError
from mlet_dist.storage import as_user_error, is_local, open_filesystem
from mlet_dist.urls import is_url

MISSING_VALUE = "__HIVE_DEFAULT_PARTITION__"  # the directory of rows without a value, as Hive and Spark write it

_PATTERN = re.compile(r"[*?\[]")
_WEB = ("http", "https")  # they have no directories, and ? begins a query


def expand(names: Sequence[str]) -> list[str]:
    """Return the raw files that paths, URLs, directories and patterns name.

    A directory stands for all files below it, and a pattern for all files that it matches, in the order of
    ``natural_order``; without those whose names begin with ``_`` or ``.``. A name that exists is no pattern.

    Raises:
        UserError: a directory or pattern has no files, or cannot be listed.
    """
    return [path for name in names for path in (_expand_url(name) if is_url(name) else _expand_path(name))]


def natural_order(path: str) -> tuple[Any, ...]:
    """Return a key that sorts paths by the names of their parts, with digits compared as numbers: part-2 < part-10."""
    parts = [[int(x) if i % 2 else x for i, x in enumerate(re.split("([0-9]+)", part))] for part in path.split("/")]
    return parts, path


def directory_values(path: str) -> list[tuple[str, str | None]]:
    """Return the keys and values of the directories ``key=value`` of a path or URL; None is a missing value."""
    found: list[tuple[str, str | None]] = []
    for part in path.split("/")[:-1]:
        key, equals, value = part.partition("=")
        if key and equals:
            found.append((unquote(key), None if value == MISSING_VALUE else unquote(value)))
    return found


def check_distinct(paths: Sequence[str]) -> None:
    """Check that no raw file is given twice, even by links; paths that cannot be examined are skipped.

    Raises:
        UserError: two of the paths or URLs lead to the same file.
    """
    seen: dict[Hashable, str] = {}
    for path in paths:
        try:
            identity = _identity(path)
        except (OSError, ImportError, ValueError):
            continue
        if identity in seen:
            also = "" if path == seen[identity] else f", also as {seen[identity]}"
            raise UserError(f"{path}: is given twice{also}; give each raw file once")
        seen[identity] = path


def _identity(path: str) -> Hashable:
    """Return what tells the file apart from others: device and inode, or a remote store and the path in it."""
    if is_url(path):
        filesystem, path = open_filesystem(path)
        if not is_local(filesystem):
            return filesystem, path
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _expand_path(name: str) -> list[str]:
    if os.path.isdir(name):
        return _of_directory(name, _walk(name))
    if os.path.exists(name) or not _PATTERN.search(name):
        return [name]
    with as_user_error(name, "listed"):
        found = glob.glob(name, recursive=True, include_hidden=True)
    return _of_pattern(name, {path: _walk(path) if os.path.isdir(path) else None for path in found})


def _walk(directory: str) -> Iterator[str]:
    """Yield the files below a directory; links to directories are followed, but none of them twice."""
    seen = set()
    with as_user_error(directory, "listed"):
        for path, directories, files in os.walk(directory, followlinks=True, onerror=_raise):
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in seen:
                directories.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            yield from (os.path.join(path, file) for file in files)


def _raise(error: OSError) -> None:
    raise error


def _expand_url(name: str) -> list[str]:
    protocol = name.partition("://")[0].rpartition("::")[2]
    is_pattern = _PATTERN.search(name.partition("://")[2]) is not None
    if protocol in _WEB:
        return [name]
    with as_user_error(name, "listed"):
        filesystem, path = open_filesystem(name)
        if filesystem.isfile(path):
            return [name]
        if filesystem.isdir(path):
            return [_url(name, file) for file in _of_directory(path, filesystem.find(path), name)]
        if not is_pattern:
            return [name]
        found = filesystem.glob(path, detail=True)
        directories = {each for each, info in found.items() if info["type"] == "directory"}
        below = {each: filesystem.find(each) if each in directories else None for each in found}
        return [_url(name, file) for file in _of_pattern(path, below, name)]


def _url(name: str, path: str) -> str:
    """Return the URL of a path that a file system has listed for the URL ``name``, with the protocols of that."""
    links = name.split("::")
    index = next(i for i, link in enumerate(links) if is_url(link))
    protocol = links[index].partition("://")[0]
    links[index] = path if path.startswith(f"{protocol}://") else f"{protocol}://{path}"
    return "::".join(links)


def _of_directory(directory: str, files: Any, name: str | None = None) -> list[str]:
    """Return the files below a directory that are not hidden, in order; ``name`` is its name in messages."""
    start = len(directory.rstrip("/")) + 1
    found = [file for file in files if not any(map(_is_hidden, file[start:].split("/"))) and not file.endswith("/")]
    if not found:
        raise UserError(
            f"{name or directory}: is a directory without raw files; files whose names begin with _ or . are left out"
        )
    return sorted(found, key=natural_order)


def _of_pattern(pattern: str, found: dict[str, Any], name: str | None = None) -> list[str]:
    """Return the files that a pattern matches, or that are below directories that it matches."""
    fixed = 0  # the parts of the pattern that match only themselves
    for part in pattern.split("/"):
        if _PATTERN.search(part):
            break
        fixed += 1
    # A pattern such as _part-* asks for such names.
    asks_for_hidden = _is_hidden(posixpath.basename(pattern))
    matched: dict[str, None] = {}
    for path, below in found.items():
        parts = path.rstrip("/").split("/")[fixed:]
        if any(map(_is_hidden, parts[:-1] if asks_for_hidden else parts)):
            continue
        start = len(path.rstrip("/")) + 1
        for file in [path] if below is None else below:
            if below is None or not any(map(_is_hidden, file[start:].split("/"))):
                matched[posixpath.normpath(file) if "//" in file else file] = None
    if not matched:
        raise UserError(
            f"{name or pattern}: no file matches the pattern; files whose names begin with _ or . are left out"
        )
    return sorted(matched, key=natural_order)


def _is_hidden(name: str) -> bool:
    """Return whether a file or directory is no data, such as _SUCCESS, by the rules of Hadoop and Spark."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)
