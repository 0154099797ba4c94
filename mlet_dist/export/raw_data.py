"""Raw files to be scored: rank 0 makes a data set of them with a model's own preprocessing, for one command."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import distributed as dist

from mlet_dist.checkpoint.writer import on_first_rank
from mlet_dist.data.location import RemotePath, data_set_path
from mlet_dist.data.prepare.file_lists import directory_values, expand
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.pipeline import prepare
from mlet_dist.data.prepare.raw_files import first_fields, inspect_file
from mlet_dist.data.prepare.raw_formats import LabelColumn, TableSpec, TextFormat
from mlet_dist.data.schema import FILE_NAME
from mlet_dist.errors import UserError, print_warning
from mlet_dist.storage import as_user_error, open_filesystem
from mlet_dist.training.process_group import Worker

SPLIT = "test"

_PATTERN = "*?["


@dataclass(frozen=True)
class PreparedRows:
    """Raw rows as a data set whose only split is ``SPLIT``.

    Attributes:
        path: of the data set.
        is_labelled: whether the files have labels; those of the data set mean nothing otherwise.
    """

    path: Path
    is_labelled: bool


def is_raw(data: str) -> bool:
    """Return whether a path, URL or pattern names raw files and not a data set; what does not exist is no raw file."""
    place = data_set_path(data)
    if isinstance(place, RemotePath):
        with as_user_error(data):
            filesystem, path = open_filesystem(data)
            return not filesystem.exists(f"{path.rstrip('/')}/{FILE_NAME}") and (
                bool(set(data) & set(_PATTERN)) or bool(filesystem.exists(path))
            )
    if place.is_dir():
        return not (place / FILE_NAME).exists() and any(place.iterdir())
    return place.exists() or bool(set(data) & set(_PATTERN))


@contextmanager
def prepared_rows(
    raw: str, preprocessing: Callable[[], LikeDataset], beside: Path, worker: Worker
) -> Iterator[PreparedRows]:
    """Yield raw rows as a data set in a temporary directory beside a file. A collective call.

    Args:
        raw: path, URL or pattern of raw files.
        preprocessing: returns what makes the inputs of the model; rank 0 calls it.
        beside: a file in a directory that all ranks share.
        worker: this rank.

    Raises:
        UserError: on all ranks: as ``preprocessing`` and ``prepare``, or lines are malformed, so that scores would not
            be aligned with lines.
    """
    found: list[PreparedRows | None] = [None]
    with ExitStack() as stack:

        def make() -> None:
            like = preprocessing()
            made = TemporaryDirectory(prefix=f".{beside.name}.", dir=beside.parent)
            directory = Path(stack.enter_context(made))
            paths = expand([raw])
            spec, defaults = _scored(like.description, paths)
            schema = prepare(spec, {SPLIT: paths}, directory / "rows", like=like, defaults=defaults)
            assert schema is not None
            if schema.malformed:
                raise UserError(
                    f"{raw}: {schema.malformed:,} lines are malformed, so that scores would not be those of the file's "
                    "rows; correct the lines, or score what `mlet prepare --like` makes, which leaves them out"
                )
            if 0 < len(defaults) < len(like.description.labels):
                print_warning(f"{raw}: has no column {next(iter(defaults))!r}; the scores have none of the labels")
            found[0] = PreparedRows(directory / "rows", is_labelled=not defaults)

        on_first_rank(make, f"{raw}: cannot be prepared", None)
        dist.broadcast_object_list(found, src=0)
        rows = found[0]
        assert rows is not None
        if not (rows.path / FILE_NAME).exists():
            raise UserError(f"{rows.path}: rank {worker.rank} cannot see it; --out must be in a directory of all ranks")
        yield rows
        # Rank 0 removes the files, which others may still read. A rank that failed must not wait for them: they are in
        # collectives that need it.
        dist.barrier()


def _scored(spec: TableSpec, paths: list[str]) -> tuple[TableSpec, dict[str, str]]:
    """Return the description for files that may lack labels, and the value of each that they then have in all rows."""
    spec = replace(spec, sample_weight=None)
    labels, text = {label.column: _any_label(label) for label in spec.labels}, spec.text
    for path in paths:
        if isinstance(text, TextFormat) and text.columns is not None:
            columns, fields = text.columns, first_fields(path, text)
            without = tuple(name for name in columns if name not in labels)
            if len(fields) == len(without) < len(columns):
                columns, spec = without, replace(spec, text=replace(text, columns=without))
            is_empty = not fields
        else:
            columns = inspect_file(path, text, ()).columns
            is_empty = not columns
        if not is_empty:
            known = {*columns, *dict(directory_values(path))}
            return spec, {name: value for name, value in labels.items() if name not in known}
    return spec, {}


def _any_label(label: LabelColumn) -> str:
    if label.positive is not None:
        return label.positive[0]
    return "1" if "0" in (label.missing_values or ()) else "0"
