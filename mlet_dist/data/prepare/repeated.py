"""Finds a raw file that is given twice, by whatever names: its rows would count twice, and lie in two splits."""

import os
from collections.abc import Hashable, Sequence

import fsspec
from fsspec.implementations.local import LocalFileSystem

from mlet_dist.errors import UserError


def refuse_repeated(paths: Sequence[str]) -> None:
    """Compare what paths and URLs lead to; what cannot be looked at is left to those who open it.

    Raises:
        UserError: two of them lead to one file, be it by links.
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
    if "://" in path:
        filesystem, path = fsspec.core.url_to_fs(path)
        if not isinstance(filesystem, LocalFileSystem):
            return filesystem, path
    status = os.stat(path)
    return status.st_dev, status.st_ino
