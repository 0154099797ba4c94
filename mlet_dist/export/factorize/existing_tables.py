"""Find the tables among the tensors of files that another program wrote, and their names."""

import re
from pathlib import Path

from mlet_dist.checkpoint.tensor_ranges import INDEX, ChunkedTensors, DcpFiles
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig
from mlet_dist.errors import UserError
from mlet_dist.export.export_directory import ExportDirectory
from mlet_dist.export.formats.safetensors import SafetensorsFiles
from mlet_dist.export.formats.torch_file import TorchFile
from mlet_dist.export.source import Tables
from mlet_dist.models.spec import TABLES_PREFIX
from mlet_dist.regular_file import open_regular
from mlet_dist.stored_tables.table_source import TableSource
from mlet_dist.training.run_directory import RunDirectory

_TORCHREC_NAME = re.compile(r"(?P<prefix>(?:.*\.)?)(?:embedding_bags|embeddings)\.(?P<table>[^.]+)\.weight")
_BARE_NAME = re.compile(r"(?P<table>[^.]+?)(?:\.weight)?")
_DENSE_PREFIXES = ("dense_arch.", "inter_arch.", "over_arch.")  # of TorchRec's DLRM and DLRM_DCN


def open_existing(path: Path, pattern: str | None = None) -> Tables:
    """Open the tables of an mlet export or run, a DCP directory, safetensors files or a state dict.

    Safetensors are a file, a directory of files or an index. Tables are the tensors named
    ``…embedding_bags.<table>.weight`` or ``…embeddings.<table>.weight``. If there are none, every tensor must be a
    table, named ``<table>.weight`` or ``<table>``.

    Args:
        pattern: a regular expression for the full names of the tensors that are tables, with a group ``table``; it
            replaces these rules.

    Raises:
        UserError: ``path`` is none of these, no tensor is a table by these rules, a tensor cannot be a table, or the
            tables have two layers already.
    """
    if ExportDirectory(path).exists() or RunDirectory(path).config.exists():
        found = Tables.open(path)
        if any(table.projection is not None for table in found.tables.values()):
            raise UserError(f"{path}: its tables have two layers already; export the run first")
        return found
    files = _open_files(path)
    expression = _TORCHREC_NAME if pattern is None else _compile(pattern)
    matches = {name: match for name in files.tensors if (match := expression.fullmatch(name))}
    if not matches and pattern is None:
        matches = {name: match for name in files.tensors if (match := _BARE_NAME.fullmatch(name))}
        if len(matches) < len(files.tensors):
            matches = {}
    if not matches:
        raise UserError(
            f"{path}: cannot tell which of its tensors are tables; name them with --table-pattern, such as "
            f"'emb_(?P<table>.+)'. It holds {_list_some(list(files.tensors))}"
        )
    tables: dict[str, TableSource] = {}
    for name, match in matches.items():
        table = match["table"]
        if not table:
            raise UserError(
                f"--table-pattern {pattern!r}: its group 'table' matches nothing in {name!r}; it must match a name"
            )
        if table in tables:
            raise UserError(f"{path}: {tables[table].stored_name!r} and {name!r} would both be table {table!r}")
        tables[table] = _table(path, table, name, files)
    return Tables(path, tables, _dense(files, matches), None, {}, files)


def _open_files(path: Path) -> ChunkedTensors:
    if path.is_dir():
        if (path / INDEX).exists():
            return DcpFiles(path, lambda name: open_regular(path / name))
        if any(path.glob("*.safetensors")):
            return SafetensorsFiles(path)
        raise UserError(
            f"{path}: holds no tables; expected an export, a directory of torch.distributed.checkpoint with "
            f"{INDEX}, or a directory of safetensors files"
        )
    if path.suffix in (".safetensors", ".json"):
        return SafetensorsFiles(path)
    return TorchFile(path)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"--table-pattern {pattern!r}: not a regular expression: {error}") from None
    if "table" not in compiled.groupindex:
        raise UserError(f"--table-pattern {pattern!r}: has no group (?P<table>…) for the table's name")
    return compiled


def _table(path: Path, table: str, name: str, files: ChunkedTensors) -> TableSource:
    found = files.tensors[name]
    if len(found.shape) != 2 or 0 in found.shape or not found.dtype.is_floating_point:
        raise UserError(
            f"{path}: {name!r} is {found.shape} of {found.dtype}; a table must have two dimensions, neither of them "
            "empty, and a floating point dtype"
        )
    rows, columns = found.shape
    try:  # find now what the model would reject later
        MultiLayerEmbeddingBagConfig(name=table, num_embeddings=rows, embedding_dim=columns, feature_names=[table])
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    state_name = f"{TABLES_PREFIX}embedding_bags.{table}.weight"
    return TableSource(table, state_name, rows, None, columns, None, found.dtype, name, files)


def _dense(files: ChunkedTensors, tables: dict[str, re.Match[str]]) -> dict[str, str]:
    """Return the dense layers next to the tables if their names are those of TorchRec's DLRM."""
    prefixes = {found.groupdict().get("prefix") for found in tables.values()}
    prefix = prefixes.pop() if len(prefixes) == 1 else None
    if prefix is None or not prefix.endswith(TABLES_PREFIX):
        return {}
    model = prefix.removesuffix(TABLES_PREFIX)
    names = [name for name in files.tensors if name.startswith(tuple(f"{model}{each}" for each in _DENSE_PREFIXES))]
    return {name.removeprefix(model): name for name in names}


def _list_some(names: list[str], limit: int = 4) -> str:
    shown = ", ".join(map(repr, sorted(names)[:limit]))
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "") if names else "no tensors"
