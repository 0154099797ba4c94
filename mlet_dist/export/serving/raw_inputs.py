"""What turns raw rows into the inputs of a model: found in a data set, carried by an export, read from it again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from mlet_dist.data.location import data_set_path
from mlet_dist.data.prepare.carried_rules import description_of, rules_of
from mlet_dist.data.prepare.like_dataset import LikeDataset
from mlet_dist.data.prepare.vocabulary_file import Sink, write_vocabulary
from mlet_dist.data.preprocessing import find_difference
from mlet_dist.data.schema import DatasetSchema
from mlet_dist.errors import UserError
from mlet_dist.export.export_directory import PREPROCESSING, ExportDirectory
from mlet_dist.formatting import load_json, to_json
from mlet_dist.models.spec import ModelSpec

RULES = "preprocessing.json"
SYNTHETIC = "synthetic"  # source of a data set that was made from no raw rows

_PROGRAMS = Path(__file__).parent / "preprocessing_files"

NewFile = Callable[[str], AbstractContextManager[Sink]]


def data_set_of(config: Mapping[str, Any], where: object) -> str:
    """Return the path or URL of a model's data set, given the settings of its run; UserError if there are none."""
    path = config.get("data", {}).get("path")
    if path is None:
        raise UserError(f"{where}: does not record which data set it was trained on")
    return str(path)


def has_raw_rows(data_set: str) -> bool:
    """Return whether a data set was made from raw rows; UserError if it cannot be read."""
    return DatasetSchema.load(data_set_path(data_set)).source != SYNTHETIC


def preprocessing_of(spec: ModelSpec, data_set: str) -> LikeDataset:
    """Return what makes the inputs of a model from raw rows, from a data set with the model's vocabularies.

    Raises:
        UserError: there is no such data set, or it makes the inputs in another way.
    """
    like = LikeDataset.open(data_set)
    if (unknown := spec.check_data(like.schema, data_set)) is not None:
        raise UserError(unknown)
    assert spec.preprocessing is not None
    difference = find_difference(like.schema.preprocessing, spec.preprocessing, "here", "in the model's data set")
    if difference is not None:
        raise UserError(f"{data_set}: {difference.text}; name the data set that the model was trained on")
    return like.select(spec.dense, [feature.name for feature in spec.sparse])


def write_preprocessing(like: LikeDataset, new_file: NewFile) -> Iterator[str]:
    """Write the files of ``preprocessing/``, each by ``new_file`` of its name, and yield the names.

    A vocabulary is in memory while it is written, of at most 2 GiB of text.
    """
    rules = rules_of(like)
    for table, about in rules["tables"].items():
        if about["vocabulary"] is not None:
            with new_file(about["vocabulary"]) as sink:
                write_vocabulary(sink, table, like.known_values(table).read())
            yield about["vocabulary"]
    with new_file(RULES) as sink:
        sink.write(f"{to_json(rules, indent=1)}\n".encode())
    yield RULES
    for program in sorted(_PROGRAMS.iterdir()):
        if program.is_file():
            with new_file(program.name) as sink:
                sink.write(program.read_bytes())
            yield program.name


def carried_preprocessing(export: ExportDirectory, manifest: Mapping[str, Any], spec: ModelSpec) -> LikeDataset:
    """Return what makes the inputs of an exported model from raw rows; its files are verified.

    Raises:
        UserError: the export carries none, or a file is missing or damaged.
    """
    if PREPROCESSING not in manifest:
        raise UserError(
            f"{export.path}: carries no {PREPROCESSING}, which raw rows need; export again with --preprocessing and "
            "the data set that the model was trained on, or give rows that `mlet prepare` made"
        )
    export.check_preprocessing(manifest)
    directory = export.path / PREPROCESSING
    try:
        description = description_of(load_json(directory / RULES))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{directory / RULES}: cannot be used: {error!r}; export again") from None
    assert spec.preprocessing is not None
    schema = DatasetSchema(
        source=description.source,
        label=spec.labels[0],
        more_labels=spec.labels[1:],
        dense=spec.dense,
        sparse=spec.sparse,
        malformed=0,
        parts={},
        preprocessing=spec.preprocessing,
        vocabulary_id=spec.vocabulary_id,
    )
    return LikeDataset(str(export.path), schema, description, grows=False, carried=directory)
