"""Seals the files of a run: each holds the id of its run and a checksum, so that no change or exchange is unnoticed.

A run gets its id when it begins, keeps it when it is resumed, and writes it into its checkpoints, too. A JSON file
holds its seal under the key ``seal``, and config.yaml in a comment in its last line, which readers of YAML skip: as an
input of another run it is a config like any other.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlet_dist.errors import UserError
from mlet_dist.formatting import CHECKSUM, load_json, to_json, with_checksum
from mlet_dist.regular_file import read_regular_file

SEAL = "seal"
_RUN = "run"
_LINE = re.compile(rb"# Sealed by mlet: run ([0-9a-f]{32}), sha256 ([0-9a-f]{64})\n\Z")


def new_run_id() -> str:
    """Return the id of a new run."""
    return uuid.uuid4().hex


def sealed_yaml(text: str, name: str, run_id: str) -> str:
    """Return a YAML text with a seal as its last line."""
    return f"{text}# Sealed by mlet: run {run_id}, sha256 {_digest(text, name, run_id)}\n"


def sealed_json(content: dict[str, Any], name: str, run_id: str) -> dict[str, Any]:
    """Return plain data for JSON with a seal; ``name`` is the file's, which may not take another file's place."""
    plain = json.loads(to_json(content))
    return plain | {SEAL: {_RUN: run_id, CHECKSUM: _digest(plain, name, run_id)}}


def run_id_of_yaml(path: Path) -> str | None:
    """Return the id of the run that wrote a YAML file; None if it has no seal.

    Raises:
        UserError: the file cannot be read, or was changed after it was sealed.
    """
    try:
        content = read_regular_file(path)
        found = _LINE.search(content)
        if found is None:
            return None
        text, run_id = content[: found.start()].decode(), found[1].decode()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if found[2].decode() != _digest(text, path.name, run_id):
        raise UserError(
            f"{path}: was changed after the run wrote it, as its checksum shows; put the run's own file back (to train "
            "with other settings, give `mlet train` a copy of it, or section.key=value)"
        )
    return run_id


def load_sealed_json(path: Path) -> tuple[dict[str, Any], str | None]:
    """Return the object in a JSON file without its seal, and the id of the run that wrote it; None if it has no seal.

    Raises:
        UserError: the file cannot be read, holds no object, or was changed after it was sealed.
    """
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a JSON {type(content).__name__} instead of an object")
    if SEAL not in content:
        return content, None
    seal = content.pop(SEAL)
    run_id = seal.get(_RUN) if isinstance(seal, dict) else None
    if not isinstance(run_id, str) or seal.get(CHECKSUM) != _digest(content, path.name, run_id):
        raise UserError(
            f"{path}: was changed after the run wrote it, as its checksum shows; put the run's own file back"
        )
    return content, run_id


def check_one_run(run: Path, ids: Sequence[tuple[str, str | None]]) -> str | None:
    """Return the id that all files share; None if none of them has a seal, because an older version wrote them.

    Args:
        run: the run directory.
        ids: each file's name and id.

    Raises:
        UserError: the files are not all of one run.
    """
    names_by_id: dict[str | None, list[str]] = {}
    for name, run_id in ids:
        names_by_id.setdefault(run_id, []).append(name)
    if len(names_by_id) == 1:
        return next(iter(names_by_id))
    shown = "; ".join(
        f"{' and '.join(names)} {'without a seal' if run_id is None else f'of run {run_id[:8]}'}"
        for run_id, names in names_by_id.items()
    )
    raise UserError(f"{run}: its files were not written by one run: {shown}; put the run's own files back")


def _digest(content: Any, name: str, run_id: str) -> str:
    if isinstance(content, str):
        content = hashlib.sha256(content.encode()).hexdigest()
    digest: str = with_checksum({"file": name, _RUN: run_id, "content": content})[CHECKSUM]
    return digest
