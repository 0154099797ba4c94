"""Changes a file of a run as if the run had written it so: with a seal that fits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlet_dist.formatting import to_json
from mlet_dist.training.run_seal import load_sealed_json, run_id_of_yaml, sealed_json, sealed_yaml


def reseal_json(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Replace the content of a sealed JSON file by ``change`` of it."""
    content, run_id = load_sealed_json(path)
    assert run_id is not None
    path.write_text(to_json(sealed_json(change(content), path.name, run_id)))


def reseal_yaml(path: Path, change: Callable[[str], str]) -> None:
    """Replace the text of a sealed YAML file by ``change`` of it."""
    run_id = run_id_of_yaml(path)
    assert run_id is not None
    text, _, _ = path.read_text().rpartition("# Sealed by mlet: ")
    path.write_text(sealed_yaml(change(text), path.name, run_id))
