"""Where the rows of adaptive tables are stored: tables whose rows change their width while they train.

The rows of one width, of all adaptive tables, are stored in one table, a *pool* (see ``row_ranges``). A row of a pool
is a *slot*. Which row has which slot changes while training runs, but the number of slots of each width does not: it is
that of the rows that the tables' ``row_ranges`` give this width, rounded down to a multiple of V (below). So the memory
of the tables is fixed from the start.

All rows of all adaptive tables, numbered one table after the other, are spread over V buckets: row g is in bucket
g mod V. Each bucket has its own slots of each pool, and rows only move between the slots of their bucket. A rank owns
consecutive buckets. Therefore moving rows takes no communication and gives rows the same slots on any number of ranks
(their values but for rounding), and every rank has its share of the memory and, where ids are sorted by frequency, of
the lookups.

Rows may also be cut into chunks, groups of equally many columns of W1, each of which has a slot or none whatever the
others have (FIITED, arXiv:2401.04408). A *part* is a chunk of all rows of a table, or the table if its rows are whole.
What holds for rows above, then holds for chunks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from math import gcd

import torch
from torchrec.modules.embedding_configs import DataType

from mlet_dist.embeddings.row_moves import choose_pools, positions_in_groups
from mlet_dist.embeddings.table_config import MultiLayerEmbeddingBagConfig

_NUMBERS_OF_BUCKETS = (53_760, 6_720, 840, 120, 24)  # multiples of most numbers of ranks in use
FEWEST_SLOTS = _NUMBERS_OF_BUCKETS[-1]
"""The fewest rows that a width must have."""

_SLOTS_PER_BUCKET = 16  # of each width, so that a bucket's frequent rows are about as many as another's
_LARGEST_BUCKET = 1 << 17  # rows, of which a pass should not have many more
MAX_SLOTS = 2**31 - 1

_GOLDEN = 0.618  # of the golden ratio: the multiples of such a share of a circle are spread evenly over it
_BLOCK_ROWS = 1 << 20


def fewest_rows_of_width(num_rows: int) -> int:
    """Return the rows that each width should have at least, so that buckets of ``num_rows`` rows are small enough."""
    return max(FEWEST_SLOTS, num_rows * _SLOTS_PER_BUCKET // _LARGEST_BUCKET)


@dataclass(frozen=True)
class Pool:
    """The slots of one width.

    Attributes:
        width: the columns of W1.
        slots_per_bucket: the slots of each bucket; slot s is in bucket s // slots_per_bucket.
    """

    width: int
    slots_per_bucket: int


@dataclass(frozen=True)
class SlotLayout:
    """The buckets, pools and rows of the adaptive tables of a collection.

    A slot is known by its *code*: its number if the slots of all pools are numbered one pool after the other.

    Attributes:
        tables: the names of the T tables.
        num_embeddings: the rows of each.
        initial_widths: for each part, rows and width of consecutive rows, before training. The parts of the first chunk
            of all tables come first.
        permitted_widths: the widths that the rows of each part may have, besides none. Those of whole rows are the
            initial ones.
        pools: the P pools, widest first.
        num_buckets: V.
        num_chunks: G, 1 for whole rows.
    """

    tables: tuple[str, ...]
    num_embeddings: tuple[int, ...]
    initial_widths: tuple[tuple[tuple[int, int], ...], ...]
    permitted_widths: tuple[tuple[int, ...], ...]
    pools: tuple[Pool, ...]
    num_buckets: int
    num_chunks: int = 1

    @classmethod
    def of(cls, tables: Sequence[MultiLayerEmbeddingBagConfig], chunk_width: int | None = None) -> "SlotLayout":
        """Return the layout of tables with row ranges.

        Args:
            tables: their configs.
            chunk_width: the columns of a chunk; None for whole rows.

        Raises:
            ValueError: a width has fewer rows than there are buckets, there are too many rows, two ranges of a table
                have the same width, tables have different d or are not FP32, or a width is no multiple of
                ``chunk_width``.
        """
        rows: dict[int, int] = {}
        chunks = 1 if chunk_width is None else max(table.row_width for table in tables) // chunk_width
        parts: list[tuple[tuple[int, int], ...]] = []
        permitted: list[tuple[int, ...]] = []
        for table in tables:
            shape = table.embedding_dim, table.data_type
            if shape != (tables[0].embedding_dim, DataType.FP32):
                raise ValueError(
                    f"table {table.name!r}: its rows move between widths, so it must be FP32 and have embedding_dim "
                    f"{tables[0].embedding_dim} as table {tables[0].name!r} has; it is {shape[1].name} with {shape[0]}"
                )
            widths = [each.width for each in table.row_ranges or () if each.width]
            if len(set(widths)) < len(widths):
                raise ValueError(f"table {table.name!r}: two of its row ranges have the same width: {widths}")
            if chunk_width is not None and any(width % chunk_width for width in (*widths, table.row_width)):
                raise ValueError(
                    f"table {table.name!r}: chunks of {chunk_width} columns do not divide its widths, "
                    f"{sorted({*widths, table.row_width})}"
                )
        for chunk in range(chunks):
            for table in tables:
                parts.append(
                    tuple(
                        (each.rows, _width_of_chunk(each.width, chunk, chunk_width)) for each in table.row_ranges or ()
                    )
                )
                for number, width in parts[-1]:
                    rows[width] = rows.get(width, 0) + number
                own = dict.fromkeys(width for _, width in parts[-1] if width)
                permitted.append(
                    tuple(own) if chunk_width is None else (chunk_width,) * (table.row_width > chunk * chunk_width)
                )
        rows.pop(0, None)
        if sum(rows.values()) > MAX_SLOTS:
            raise ValueError(f"{sum(rows.values()):,} rows with columns are too many; at most {MAX_SLOTS:,} can move")
        fewest = min(rows, key=lambda width: rows[width])
        if rows[fewest] < FEWEST_SLOTS:
            raise ValueError(
                f"{rows[fewest]} rows of all tables together have {fewest} columns; rows that move need at least "
                f"{FEWEST_SLOTS} of each width"
            )
        buckets = number_of_buckets(rows[fewest])
        return cls(
            tuple(table.name for table in tables),
            tuple(table.num_embeddings for table in tables),
            tuple(parts),
            tuple(permitted),
            tuple(Pool(width, rows[width] // buckets) for width in sorted(rows, reverse=True)),
            buckets,
            chunks,
        )

    @cached_property
    def num_rows(self) -> int:
        """The rows of all tables."""
        return sum(self.num_embeddings)

    @cached_property
    def rows_per_bucket(self) -> int:
        """H, the rows of a bucket; the last ones of some buckets do not exist."""
        return -(-self.num_rows // self.num_buckets)

    @property
    def num_parts(self) -> int:
        """T·G, the number of parts."""
        return len(self.initial_widths)

    def row_ranges(self) -> list[tuple[str, int, int]]:
        """Return table, rows and width before training of consecutive rows, in the order of all rows."""
        num_tables = len(self.tables)
        found = []
        for index, table in enumerate(self.tables):
            chunks = self.initial_widths[index::num_tables]  # each has the table's ranges of rows
            found += [(table, of[0][0], sum(width for _, width in of)) for of in zip(*chunks, strict=True)]
        return found

    def first_bucket(self, rank: int, world_size: int) -> int:
        """Return the first bucket that a rank owns; its buckets end where those of the next rank begin.

        Raises:
            ValueError: there are more ranks than buckets.
        """
        if world_size > self.num_buckets:
            raise ValueError(
                f"rows that move between widths are in {self.num_buckets} buckets, of which {world_size} ranks cannot "
                "each own one; use fewer ranks, or more rows of the rarest width"
            )
        return rank * self.num_buckets // world_size

    def slots(self, pool: int) -> int:
        """Return the number of slots of a pool."""
        return self.num_buckets * self.pools[pool].slots_per_bucket

    def first_rows(self) -> torch.Tensor:
        """Return the number of the first row of each part ``(T·G,)`` int64; those of chunk 0 are the rows' own.

        The chunks of a row are in the same bucket: chunk c of row g has the number c·H·V + g.
        """
        of_tables = torch.tensor([0, *self.num_embeddings]).cumsum(0)[:-1]
        chunks = torch.arange(self.num_chunks).unsqueeze(1) * (self.rows_per_bucket * self.num_buckets)
        return (chunks + of_tables).view(-1)

    def first_codes(self) -> torch.Tensor:
        """Return the code of the first slot of each pool ``(P,)`` int64."""
        return torch.tensor([0, *(self.slots(pool) for pool in range(len(self.pools)))]).cumsum(0)[:-1]

    def permitted(self) -> torch.Tensor:
        """Return which pools may store rows of each part ``(T·G, P)`` bool."""
        return torch.tensor([[pool.width in widths for pool in self.pools] for widths in self.permitted_widths])

    def rows_of(self, first_bucket: int, stop_bucket: int) -> torch.Tensor:
        """Return the numbers of the rows of buckets ``(G·H, stop_bucket - first_bucket)``; -1 where there is none."""
        row = torch.arange(self.num_chunks * self.rows_per_bucket).unsqueeze(1) * self.num_buckets
        row = row + torch.arange(first_bucket, stop_bucket)
        return row.masked_fill_(row % (self.rows_per_bucket * self.num_buckets) >= self.num_rows, -1)

    def parts_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the index of the part of each row, by its number."""
        return torch.searchsorted(self.first_rows().to(rows.device), rows, right=True) - 1

    def choose_slots(
        self,
        buckets: torch.Tensor,
        parts: torch.Tensor,
        utility: torch.Tensor,
        codes: torch.Tensor,
        hysteresis: float,
    ) -> torch.Tensor:
        """Return the codes of the slots that the rows of some buckets get, ``(n,)`` int64; -1 for none.

        A row whose pool does not change keeps its slot. The others get the free slots of their bucket in order.

        Args:
            buckets: of all rows of these buckets, ascending ``(n,)`` int64.
            parts: the part of each row.
            utility: as in ``choose_pools``.
            codes: the slots that the rows have now.
            hysteresis: as in ``choose_pools``.
        """
        device = codes.device
        first_codes = self.first_codes()
        held = torch.searchsorted(first_codes.to(device), codes, right=True) - 1
        sizes = [pool.slots_per_bucket for pool in self.pools]
        chosen = choose_pools(utility, held, self.permitted().to(device)[parts], buckets, sizes, hysteresis)
        found = torch.where(chosen == held, codes, -1)
        distinct, index = torch.unique_consecutive(buckets, return_inverse=True)
        for pool, (first, size) in enumerate(zip(first_codes.tolist(), sizes, strict=True)):
            first_of_bucket = first + buckets * size
            stays = ((chosen == pool) & (held == pool)).nonzero().squeeze(1)
            taken = torch.zeros(len(distinct), size, dtype=torch.bool, device=device)
            taken[index[stays], codes[stays] - first_of_bucket[stays]] = True
            free_in, free = (~taken).nonzero().unbind(1)
            new = ((chosen == pool) & (held != pool)).nonzero().squeeze(1)
            own = index[new]
            nth_free = torch.searchsorted(free_in, own) + positions_in_groups(own)
            found[new] = first_of_bucket[new] + free[nth_free]
        return found

    def bucket_of_pass(self, number: int) -> int:
        """Return the bucket whose pass is pass ``number`` of the V passes of an interval.

        Buckets of consecutive passes are far apart, so that at any time each rank has its share of the passes.
        """
        return number * self._pass_stride % self.num_buckets

    @cached_property
    def _pass_stride(self) -> int:
        golden = round(self.num_buckets * _GOLDEN)
        return next(each for each in count(golden) if gcd(each, self.num_buckets) == 1)

    def initial_slots(self, first_bucket: int, stop_bucket: int) -> torch.Tensor:
        """Return the slots of the rows of buckets before training: codes of ``rows_of``'s shape, int32; -1 for none.

        A bucket's slots of a pool go to its rows with this initial width. If a bucket has more of these rows than
        slots, the last ones get narrower slots; if it has fewer, narrower rows get the slots left.
        """
        starts: list[int] = []
        widths: list[int] = []
        for first, of_part in zip(self.first_rows().tolist(), self.initial_widths, strict=True):
            for number, each in of_part:
                starts.append(first)
                widths.append(each)
                first += number

        def initial_width(rows: torch.Tensor) -> torch.Tensor:
            return torch.tensor(widths)[torch.searchsorted(torch.tensor(starts), rows, right=True) - 1].float()

        return self.slots_by(initial_width, first_bucket, stop_bucket)

    def slots_by(
        self, utility_of: Callable[[torch.Tensor], torch.Tensor], first_bucket: int, stop_bucket: int
    ) -> torch.Tensor:
        """Return slots with which the rows of the highest utility have the widest ones, as ``initial_slots`` does.

        Args:
            utility_of: from numbers of rows ``(n,)``, those of a bucket together, to their utilities ``(n,)`` float32.
            first_bucket, stop_bucket: the buckets.
        """
        lines = self.num_chunks * self.rows_per_bucket
        codes = torch.full((lines, stop_bucket - first_bucket), -1, dtype=torch.int32)
        for start in range(first_bucket, stop_bucket, max(1, _BLOCK_ROWS // lines)):
            stop = min(start + max(1, _BLOCK_ROWS // lines), stop_bucket)
            rows = self.rows_of(start, stop).t()
            bucket, line = (rows >= 0).nonzero().unbind(1)
            rows = rows[bucket, line]
            chosen = self.choose_slots(
                bucket + start, self.parts_of(rows), utility_of(rows), torch.full_like(rows, -1), hysteresis=0.0
            )
            codes[line, bucket + start - first_bucket] = chosen.int()
        return codes


def number_of_buckets(fewest: int) -> int:
    """Return V, for the fewest rows, or chunks, that a width has."""
    wanted = fewest // _SLOTS_PER_BUCKET
    return next((number for number in _NUMBERS_OF_BUCKETS if number <= wanted), FEWEST_SLOTS)


def _width_of_chunk(width: int, chunk: int, chunk_width: int | None) -> int:
    """Return the columns that a chunk has in rows of a width."""
    if chunk_width is None:
        return width
    return chunk_width if width > chunk * chunk_width else 0
