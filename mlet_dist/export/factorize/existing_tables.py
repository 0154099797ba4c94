"""Tables that something else trained: which of a file's tensors they are, and what they are called here."""

import re
from pathlib import Path

from mlet_dist.checkpoint.tensor_ranges import ChunkedTensors, TensorFiles
from mlet_dist.embeddings.collection import MultiLayerEmbeddingBagConfig
from mlet_dist.errors import UserError
from mlet_dist.export.export_directory import ExportDirectory
from mlet_dist.export.formats.safetensors import SafetensorsFiles
from mlet_dist.export.formats.torch_file import TorchFile
from mlet_dist.export.source import Tables, TableSource
from mlet_dist.models.dlrm import TABLES_PREFIX
from mlet_dist.training.run_directory import RunDirectory

_TORCHREC = re.compile(r"(?P<prefix>(?:.*\.)?)(?:embedding_bags|embeddings)\.(?P<table>[^.]+)\.weight")
_ALONE = re.compile(r"(?P<table>[^.]+?)(?:\.weight)?")
_DENSE = ("dense_arch.", "inter_arch.", "over_arch.")  # of TorchRec's DLRM and DLRM_DCN


def open_existing(path: Path, pattern: str | None = None) -> Tables:
    """An export or a run of ours, a DCP directory, safetensors (a file, a directory or an index), or a state dict.

    Tables are the tensors called ``…embedding_bags.<table>.weight`` or ``…embeddings.<table>.weight``. Where there are
    none, every tensor must be a table, called ``<table>.weight`` or ``<table>``.

    Args:
        pattern: which tensors are tables instead: a regular expression of the whole name, with a group ``table``.

    Raises:
        UserError: nothing of these is there, or no tensor, or one that cannot be a table, goes by the rule; or tables
            are in two layers already.
    """
    if ExportDirectory(path).is_there() or RunDirectory(path).config.exists():
        found = Tables.open(path)
        if any(table.projection is not None for table in found.tables.values()):
            raise UserError(f"{path}: its tables are in two layers already; export it first")
        return found
    files = _open_files(path)
    expression = _TORCHREC if pattern is None else _compiled(pattern)
    matches = {name: match for name in files.tensors if (match := expression.fullmatch(name))}
    if not matches and pattern is None:
        matches = {name: match for name in files.tensors if (match := _ALONE.fullmatch(name))}
        if len(matches) < len(files.tensors):
            matches = {}
    if not matches:
        raise UserError(
            f"{path}: which of its tensors are tables is not clear; say so by --table-pattern, such as "
            f"'emb_(?P<table>.+)'. It holds {_some(list(files.tensors))}"
        )
    tables: dict[str, TableSource] = {}
    for name, match in matches.items():
        table = match["table"]
        if not table:
            raise UserError(
                f"--table-pattern {pattern!r}: its group 'table' takes nothing of {name!r}; it must be a name"
            )
        if table in tables:
            raise UserError(f"{path}: {tables[table].stored_name!r} and {name!r} would both be table {table!r}")
        tables[table] = _table(path, table, name, files)
    return Tables(path, tables, _dense(files, matches), None, {}, files)


def _open_files(path: Path) -> ChunkedTensors:
    if path.is_dir():
        if (path / ".metadata").exists():
            return TensorFiles(path, lambda name: (path / name).open("rb"))
        if any(path.glob("*.safetensors")):
            return SafetensorsFiles(path)
        raise UserError(
            f"{path}: holds no tables; expected an export, a directory of torch.distributed.checkpoint (with "
            ".metadata) or one of safetensors files"
        )
    if path.suffix in (".safetensors", ".json"):
        return SafetensorsFiles(path)
    return TorchFile(path)


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--table-pattern {pattern!r}: not a regular expression: {error}") from None
    if "table" not in compiled.groupindex:
        raise UserError(f"--table-pattern {pattern!r}: lacks a group (?P<table>…) for the table's name")
    return compiled


def _table(path: Path, table: str, name: str, files: ChunkedTensors) -> TableSource:
    found = files.tensors[name]
    if len(found.shape) != 2 or 0 in found.shape or not found.dtype.is_floating_point:
        raise UserError(
            f"{path}: {name!r} is {found.shape} of {found.dtype}; a table has rows and columns of "
            "floating point numbers"
        )
    rows, columns = found.shape
    try:  # whatever a model of ours would refuse later
        MultiLayerEmbeddingBagConfig(name=table, num_embeddings=rows, embedding_dim=columns, feature_names=[table])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    state_name = f"{TABLES_PREFIX}embedding_bags.{table}.weight"
    return TableSource(table, state_name, rows, None, columns, None, found.dtype, name, files)


def _dense(files: ChunkedTensors, tables: dict[str, re.Match[str]]) -> dict[str, str]:
    """Dense layers beside the tables, where those lie as in TorchRec's DLRM."""
    prefixes = {found.groupdict().get("prefix") for found in tables.values()}
    prefix = prefixes.pop() if len(prefixes) == 1 else None
    if prefix is None or not prefix.endswith(TABLES_PREFIX):
        return {}
    model = prefix.removesuffix(TABLES_PREFIX)
    names = [name for name in files.tensors if name.startswith(tuple(f"{model}{each}" for each in _DENSE))]
    return {name.removeprefix(model): name for name in names}


def _some(names: list[str], most: int = 4) -> str:
    shown = ", ".join(map(repr, sorted(names)[:most]))
    return shown + (f" and {len(names) - most} more" if len(names) > most else "") if names else "no tensors"
