"""Writes the scores of a model for the rows of a split, batch by batch, as a Parquet file."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mlet_dist.atomic_file import replaced_file
from mlet_dist.errors import writing
from mlet_dist.training.label_metrics import metric_prefixes

_ROWS_A_GROUP = 1 << 20


class ScoresWriter:
    """A file with the columns ``row``, ``label``, ``logit``, ``probability`` and, if rows have weights, ``weight``.

    With several labels there are ``label``, ``logit`` and ``probability`` of each, as ``click_label``. ``quality``
    reads the file.

    Args:
        file: a binary file, open for writing.
        labels: the names of the data set's labels.
    """

    def __init__(self, file: IO[bytes], labels: Sequence[str]) -> None:
        self._file, self._prefixes = file, metric_prefixes(labels)
        self._writer: pq.ParquetWriter | None = None
        self._rows = 0

    def add(self, logits: torch.Tensor, labels: torch.Tensor | None, weights: torch.Tensor | None) -> None:
        """Write the next rows.

        Args:
            logits: ``(b,)``; with several labels ``(b, L)``.
            labels: the same shape; NaN where a row lacks a label. None: the rows have no labels.
            weights: ``(b,)``; None if rows have no weights.
        """
        rows = len(logits)
        by_label = logits.reshape(rows, -1).t().contiguous()
        columns = {"row": pa.array(range(self._rows, self._rows + rows), pa.int64())}
        for index, prefix in enumerate(self._prefixes):
            if labels is not None:
                found = labels.reshape(rows, -1)[:, index].numpy()
                columns[f"{prefix}label"] = pa.array(found, mask=np.isnan(found))
            columns[f"{prefix}logit"] = pa.array(by_label[index].numpy())
            columns[f"{prefix}probability"] = pa.array(torch.sigmoid(by_label[index]).numpy())
        if weights is not None:
            columns["weight"] = pa.array(weights.numpy())
        table = pa.table(columns)
        self._writer = self._writer or pq.ParquetWriter(self._file, table.schema)
        self._writer.write_table(table, _ROWS_A_GROUP)
        self._rows += rows

    def close(self) -> None:
        """Complete the file."""
        if self._writer is not None:
            self._writer.close()


@contextmanager
def written_scores(path: Path, labels: Sequence[str]) -> Iterator[ScoresWriter]:
    """Yield the writer of a file that appears under its name when the block has ended without an exception.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(path), replaced_file(path) as file:
        writer = ScoresWriter(file, labels)
        yield writer
        writer.close()
