"""The file of a vocabulary that an export carries, for servers in any language, which can map it into memory.

All numbers are little-endian and unsigned; n is the number of values, and t that of bytes of their texts::

    0            8 bytes      MLETVOC1
    8            64 bits      n
    16           64 bits      t
    24           n · 64 bits  hashes of the values (``mlet_dist.data.hashing``, salted with the table's name), ascending
    24 + 8n      n + 1 · 64   offsets: the text of id i is the bytes [offset i - 1, offset i) of the texts, from 0 on
    32 + 16n     n · 32 bits  the id of each hash; ids of equal hashes are ascending
    32 + 20n     t bytes      the texts in UTF-8, in the order of their ids, which begin with 1
"""

import struct
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mlet_dist.data.hashing import hash_texts
from mlet_dist.errors import UserError

SUFFIX = ".vocabulary"

_MAGIC = b"MLETVOC1"
_HEADER = struct.Struct("<8sQQ")


class Sink(Protocol):
    """What bytes can be written to."""

    def write(self, data: Any, /) -> Any:
        """Write all of ``data``."""


def write_vocabulary(sink: Sink, table: str, values: pa.StringArray) -> None:
    """Write the values of a table, which are in the order of their ids."""
    hashes = hash_texts(values, table)
    order = np.argsort(hashes, kind="stable")
    offsets = np.concatenate([[0], np.cumsum(pc.binary_length(values).to_numpy(), dtype=np.int64)]).astype("<u8")
    sink.write(_HEADER.pack(_MAGIC, len(values), int(offsets[-1])))
    for numbers in (hashes[order].astype("<u8"), offsets, (order + 1).astype("<u4")):
        sink.write(numbers.view(np.uint8).data)
    _, starts, texts = values.buffers()
    if int(offsets[-1]):
        first = int(np.frombuffer(starts, np.int32)[values.offset])
        sink.write(memoryview(texts)[first : first + int(offsets[-1])])


def vocabulary_bytes(values: int, text_bytes: int) -> int:
    """Return the size of the file of a vocabulary."""
    return _HEADER.size + 8 + 20 * values + text_bytes


def read_vocabulary(path: Path) -> pa.StringArray:
    """Return the values in the order of their ids.

    Raises:
        UserError: the file is damaged.
        OSError: it cannot be read.
    """
    with pa.memory_map(str(path)) as source:
        content = source.read_buffer()
    if len(content) >= _HEADER.size:
        magic, count, text_bytes = _HEADER.unpack_from(content)
        if magic == _MAGIC and len(content) == vocabulary_bytes(count, text_bytes):
            offsets = np.frombuffer(content, "<u8", count + 1, _HEADER.size + 8 * count).astype(np.int32)
            return pa.StringArray.from_buffers(count, pa.py_buffer(offsets), content.slice(len(content) - text_bytes))
    raise UserError(f"{path}: is damaged, or is no vocabulary of an export")
