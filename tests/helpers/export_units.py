"""Export small runs in many work units: in this process, in ranks, or in a program that tests kill."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlet_dist.embeddings import collapse
from mlet_dist.export.collapse import units
from mlet_dist.export.collapse.run_collapse import ExportOptions, collapse_run, export_run
from tests.helpers.small_run import this_worker


@contextmanager
def small_units() -> Iterator[None]:
    """Multiply 64 rows at a time, and make units of 4 KB of W, or of 64 rows if these are more."""
    before = collapse._BLOCK_BYTES, units.UNIT_BYTES
    collapse._BLOCK_BYTES, units.UNIT_BYTES = 1, 1 << 12
    try:
        yield
    finally:
        collapse._BLOCK_BYTES, units.UNIT_BYTES = before


def export(run: Path, out: Path, **options: Any) -> dict[str, Any]:
    """Export in this process."""
    with small_units():
        return export_run(run, out, ExportOptions(**options))


def export_in_rank(run: Path, out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Export as one of several ranks."""
    with small_units():
        return collapse_run(run, out, ExportOptions(**options), this_worker())


def contents(directory: Path) -> dict[str, bytes]:
    """Return the contents of all files below a directory, by relative path."""
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


if __name__ == "__main__":
    import sys

    export(Path(sys.argv[1]), Path(sys.argv[2]), outputs=("dcp", "int8"), gather=sys.argv[3] == "gather")
