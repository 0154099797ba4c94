"""`mlet factorize`: factor existing tables into W1 and W2, and write them in blocks as a checkpoint to train from."""

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from mlet_dist.atomic_directory import staged_directory
from mlet_dist.checkpoint.load import MODEL_KEY, first_cause
from mlet_dist.checkpoint.manifest import Manifest
from mlet_dist.checkpoint.store import Checkpoint, CheckpointStore
from mlet_dist.checkpoint.writer import ChecksumStream
from mlet_dist.embeddings.factors import Factors, factors_of
from mlet_dist.errors import UserError
from mlet_dist.export.factorize.existing_tables import open_existing
from mlet_dist.export.formats.dcp import DcpFormat
from mlet_dist.export.formats.tensor_shards import TensorShard
from mlet_dist.export.row_blocks import read_blocks, sum_grams
from mlet_dist.export.source import Tables
from mlet_dist.progress import Progress
from mlet_dist.stored_tables.table_source import TableSource, projection_name
from mlet_dist.training.snapshot import versions

_MAX_RELATIVE_ERROR = 1e-6  # float32 factors reach 4e-8; a larger error means overflow or underflow
_WRITE_VALUES = 1 << 22  # of W1 at a time


def factorize_tables(
    path: Path,
    hidden_dim: int,
    out: Path,
    *,
    seed: int = 0,
    gain: float | None = None,
    table_pattern: str | None = None,
    tables_only: bool = False,
) -> dict[str, Any]:
    """Write exact factors of all tables at ``path`` as a checkpoint in ``out``, which must not exist or be empty.

    Each table is read twice in blocks: for its Gram matrix and for W1. Memory is a few blocks and the Gram matrix,
    whatever the number of rows. ``out`` appears once everything is written.

    Args:
        hidden_dim, seed, gain: as for ``factors_of``.
        table_pattern: as for ``open_existing``.
        tables_only: omit the dense layers.

    Returns:
        ``out``, the number of ``tables`` and of ``dense`` tensors, ``hidden_dim``, ``bytes`` of W1 and W2, the largest
        ``relative_error`` ||W1·W2 - W|| / ||W|| of a table, and the smallest and largest ``mean_gain`` of a table: the
        mean of W2ᵀW2, by which the factorization multiplies SGD's learning rate of the table.

    Raises:
        UserError: a table cannot be read or factored exactly, or ``out`` cannot be written.
    """
    with open_existing(path, table_pattern) as existing:
        for table in existing.tables.values():
            if hidden_dim < table.embedding_dim:
                raise UserError(
                    f"--hidden-dim {hidden_dim} is below the {table.embedding_dim} columns of table {table.name!r}; "
                    f"exact factors take {table.embedding_dim} or more"
                )
        dense = {} if tables_only else existing.dense
        rows = sum(table.num_embeddings for table in existing.tables.values())
        with staged_directory(out) as staging:
            _check_space(staging, out, existing, hidden_dim)
            writer = BlockWriter(CheckpointStore(staging).checkpoint(0))
            entries = []
            with Progress("factorize", 2 * rows, "rows") as progress:
                for number, table in enumerate(existing.tables.values()):
                    entries.append(_factorize(table, hidden_dim, seed, gain, writer, f"table-{number}", progress))
            if dense:
                with writer.file("dense") as file:
                    for name in dense:
                        file.add(name, [existing.load_dense(name)])
            spec = existing.spec
            if spec is not None:
                spec = spec.with_hidden_dim(hidden_dim)
            writer.finish(
                {
                    "factorized": {"source": str(path), "seed": seed, "gain": gain, "tables": entries},
                    "spec": None if spec is None else spec.to_dict(),
                    "vocabulary_id": None if spec is None else spec.vocabulary_id,
                    "versions": versions(),
                }
            )
    gains = [each["mean_gain"] for each in entries]
    return {
        "out": str(out),
        "tables": len(entries),
        "dense": len(dense),
        "hidden_dim": hidden_dim,
        "bytes": sum(each["bytes"] for each in entries),
        "relative_error": max(each["relative_error"] for each in entries),
        "mean_gain": {"min": min(gains), "max": max(gains)},
    }


def _check_space(staging: Path, out: Path, existing: Tables, k: int) -> None:
    needed = sum(4 * k * (table.num_embeddings + table.embedding_dim) for table in existing.tables.values())
    free = shutil.disk_usage(staging).free
    if free < needed:
        raise UserError(f"{out}: cannot be written: it needs {needed:,} bytes and {free:,} are free")


def _factorize(
    table: TableSource, k: int, seed: int, gain: float | None, writer: "BlockWriter", file_name: str, progress: Progress
) -> dict[str, Any]:
    """Write W1 and W2 of a table to one file, and return the table's entry for the manifest."""
    n, d = table.num_embeddings, table.embedding_dim
    gram = sum_grams(table, None, progress).table
    try:
        factors = factors_of(gram, k, table.name, seed, gain)
    except ValueError as error:
        raise UserError(f"{table.location}: {error}") from None
    squared_errors: list[float] = []
    with writer.file(file_name) as file:
        file.add(table.state_name, _first_layer(table, factors, squared_errors, progress))
        file.add(projection_name(table.tables_prefix, table.name), [factors.projection])
    energy = float(gram.trace())
    relative_error = (sum(squared_errors) / energy) ** 0.5 if energy else 0.0
    if not relative_error <= _MAX_RELATIVE_ERROR:
        raise UserError(
            f"{table.location}: table {table.name!r}: the product of its float32 factors has a relative error of "
            f"{relative_error:.1e}; its values are too large or too small for float32"
        )
    return {
        "name": table.name,
        "shape": [n, d],
        "hidden_dim": k,
        "dtype": str(table.rows_dtype).removeprefix("torch."),
        "bytes": 4 * k * (n + d),
        "rank": factors.rank,
        "singular_values": factors.singular_values.tolist(),
        "mean_gain": float(factors.projection.double().square().sum()) / d,
        "relative_error": relative_error,
    }


def _first_layer(
    table: TableSource, factors: Factors, squared_errors: list[float], progress: Progress
) -> Iterator[torch.Tensor]:
    """Yield W1 in blocks, float32, and append ||W1·W2 - W||² of each block to ``squared_errors``."""
    d, k = factors.to_rows.shape
    projection = factors.projection.double()
    step = max(1, _WRITE_VALUES // k)  # rows; blocks of a narrow W can be large blocks of a wide W1
    for _, values in read_blocks(table):
        for begin in range(0, len(values), step):
            part = values[begin : begin + step]
            rows = (part @ factors.to_rows).float()
            squared_errors.append(float((rows[:, :d].double() @ projection[:d] - part).square().sum()))
            yield rows
            progress.update(len(part), table=table.name)


class BlockWriter:
    """Writes a model's tensors into a new checkpoint, in the format of torch.distributed.checkpoint.

    Each block of rows is a shard of its tensor, like that of a rank, so all readers of sharded checkpoints can load the
    result. Writing takes memory for one block.

    Args:
        checkpoint: is removed first if it exists.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint, self._format = checkpoint, DcpFormat()
        self._shards: list[TensorShard] = []
        self._files: dict[str, dict[str, Any]] = {}
        checkpoint.begin()

    @contextmanager
    def file(self, name: str) -> Iterator["BlockFile"]:
        """Write a new file of the checkpoint, named without its suffix; it is synced to disk when the context exits."""
        name = f"{name}{self._format.suffix}"
        with self._checkpoint.open_new(name) as raw:
            stream = ChecksumStream(raw)
            yield BlockFile(f"{self._checkpoint}/{name}", name, stream, self._format, self._shards)
            self._files[name] = stream.checksum.entry()

    def finish(self, about: Mapping[str, Any]) -> None:
        """Write the index and the manifest, with ``about`` in it, which completes the checkpoint."""
        name, content = self._format.index(self._shards)
        with self._checkpoint.open_new(name) as raw:
            stream = ChecksumStream(raw)
            stream.write(content)
            self._files[name] = stream.checksum.entry()
        self._checkpoint.finish(Manifest(self._checkpoint.step, self._files, about))


class BlockFile:
    """One file of a checkpoint that is being written."""

    def __init__(
        self, path: str, name: str, stream: ChecksumStream, format: DcpFormat, shards: list[TensorShard]
    ) -> None:
        self._path, self._name, self._stream, self._format, self._shards = path, name, stream, format, shards

    def add(self, name: str, blocks: Iterable[torch.Tensor]) -> None:
        """Write a tensor of the model.

        Args:
            name: its state name.
            blocks: all of the tensor in order, split along the first dimension, on the CPU.

        Raises:
            UserError: the file cannot be written.
        """
        row = 0
        for block in blocks:
            # torch.save would write the full storage of a view.
            tensors = {f"{MODEL_KEY}.{name}": block.clone() if block._is_view() else block}
            try:
                self._shards += self._format.write(self._stream, self._name, row, tensors)
            except Exception as error:  # torch.save hides the OSError
                raise UserError(f"{self._path}: cannot be written: {first_cause(error)}") from None
            row += len(block) if block.dim() else 0
