"""The tables of ``compression_arms.py``: rows of several widths, trained by hand-written Adagrad, within given bytes.

All tables are one weight whose rows count through the tables. A row belongs to a *class* of rows of one width w. The
classes of other widths than d have a W2 ``(w, d)`` for each table. Memory is counted, not saved: the weight has columns
for the widest class, and columns beyond a row's width are always zero.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]

FLOAT = 4
ADAGRAD = 2  # the floats of a weight and of its state
EPS = 1e-8


@dataclass(frozen=True)
class Layout:
    """The sizes of all tables, and the widths that rows may have.

    Attributes:
        sizes: rows of each table.
        embedding_dim: d.
        widths: the width of each class, descending, the last one 0.
        factorised: whether each class has a W2.
    """

    sizes: tuple[int, ...]
    embedding_dim: int
    widths: tuple[int, ...]
    factorised: tuple[bool, ...]

    @property
    def table_of_row(self) -> Ints:
        """The table of each row."""
        return np.repeat(np.arange(len(self.sizes)), self.sizes)

    def cells(self, classes: Ints) -> Ints:
        """Return the number of rows of each table in each class ``(tables, classes)``."""
        flat = self.table_of_row * len(self.widths) + classes
        return np.bincount(flat, minlength=len(self.sizes) * len(self.widths)).reshape(len(self.sizes), -1)

    def row_bytes(self) -> Ints:
        """Return the bytes of a row of each class in training."""
        return np.array(self.widths) * FLOAT * ADAGRAD

    def projection_bytes(self) -> Ints:
        """Return the bytes of one W2 of each class in training."""
        return np.array(self.widths) * self.embedding_dim * FLOAT * ADAGRAD * np.array(self.factorised)

    def training_bytes(self, classes: Ints, all_projections: bool = False) -> int:
        """Return the bytes of rows and W2 with their state; a W2 counts where rows use it, or in every table."""
        cells = self.cells(classes)
        used = np.ones_like(cells) if all_projections else cells > 0
        return int((cells * self.row_bytes() + used * self.projection_bytes()).sum())


def allocate(
    layout: Layout, counts: npt.NDArray[np.float64], budget: float, alpha: float, all_projections: bool
) -> Ints:
    """Return the class of each row: the largest width up to s·count^alpha, with the largest s within ``budget`` bytes.

    Args:
        layout: sizes and widths.
        counts: how often each row is looked up; distinct values, so that any number of rows can be told from the rest.
        budget: bytes of rows and W2 with their state.
        alpha: how fast widths grow with counts.
        all_projections: whether every table has every W2. If not, rows of a table that are fewer than their W2 pays
            for pass to a neighbouring class.
    """
    widths = np.array(layout.widths[:-1])
    row_bytes, projection_bytes = layout.row_bytes(), layout.projection_bytes()
    table, d = layout.table_of_row, layout.embedding_dim

    def at(log_scale: float) -> Ints:
        least = (widths / math.exp(log_scale)) ** (1 / alpha)
        classes = (counts[:, None] < least).sum(axis=1)
        for c, width in enumerate(widths if not all_projections else ()):
            rows = layout.cells(classes)[:, c]
            if width > d and c + 1 < len(widths):
                classes[(classes == c) & ((rows < width) & (rows > 0))[table]] = c + 1
            elif width < d and d in widths:
                own = int(np.flatnonzero(widths == d)[0])
                poor = (rows > 0) & (rows * (row_bytes[own] - row_bytes[c]) <= projection_bytes[c])
                classes[(classes == c) & poor[table]] = own
        return classes

    low, high = math.log(widths[-1]) - alpha * math.log(counts.max()) - 1, 1 + math.log(widths[0]) + 20 * alpha
    for _ in range(50):
        middle = (low + high) / 2
        fits = layout.training_bytes(at(middle), all_projections) <= budget
        low, high = (middle, high) if fits else (low, middle)
    found = at(low)
    if layout.training_bytes(found, all_projections) > budget:
        raise ValueError(f"{budget:,.0f} bytes are too few for any row")
    return found


def rank(
    layout: Layout,
    utility: npt.NDArray[np.float64],
    classes: Ints,
    capacity: Ints,
    hysteresis: float,
    by_table: bool,
) -> Ints:
    """Return new classes: rows of the largest utility fill the widest class, and so on.

    A row that has at least the width of the class in question counts with 1 + ``hysteresis`` times its utility.

    Args:
        layout: sizes and widths.
        utility: of each row.
        classes: the present class of each row.
        capacity: rows of each class, ``(tables, classes)``.
        hysteresis: the advantage of rows that are there.
        by_table: whether rows compete within their table; else all rows compete for the sum of the capacities.
    """
    table = layout.table_of_row
    group = table if by_table else np.zeros_like(table)
    limits = capacity if by_table else capacity.sum(axis=0, keepdims=True)
    found = np.full_like(classes, len(layout.widths) - 1)
    waiting = np.arange(len(classes))
    for c in range(len(layout.widths) - 1):
        score = utility[waiting] * np.where(classes[waiting] <= c, 1 + hysteresis, 1.0)
        # Of rows of equal utility, those stay that are there.
        order = waiting[np.lexsort((classes[waiting], -score, group[waiting]))]
        of = group[order]
        first = np.searchsorted(of, of, side="left")
        taken = np.arange(len(order)) - first < limits[of, c]
        found[order[taken]] = c
        waiting = order[~taken]
    return found


class Tables:
    """Rows of several widths, and their W2.

    Args:
        layout: sizes and widths.
        classes: the class of each row.
        shared_rows: rows of d columns that the rows of width 0 of all tables share by a hash; -1: one row for each
            table; 0: rows of width 0 read zero.
    """

    def __init__(self, layout: Layout, classes: Ints, shared_rows: int = 0) -> None:
        self.layout = layout
        self.rows, self.num_tables, self.d = sum(layout.sizes), len(layout.sizes), layout.embedding_dim
        width, extra = max(layout.widths), self.num_tables if shared_rows < 0 else shared_rows
        self.bound = torch.from_numpy(np.repeat(np.sqrt(1 / np.array(layout.sizes)), layout.sizes)).float()
        self.classes = torch.from_numpy(np.concatenate([classes, np.full(extra, self._class_of_d(extra))]))
        self.width_of_class = torch.tensor(layout.widths)
        bound = torch.cat([self.bound, torch.zeros(extra)])[:, None]
        self.weight = (2 * torch.rand(self.rows + extra, width) - 1) * bound * self._stored(self.classes)
        self.state = torch.zeros_like(self.weight)
        self.projections = [
            torch.randn(self.num_tables, w, self.d) / math.sqrt(w) if has else None
            for w, has in zip(layout.widths, layout.factorised, strict=True)
        ]
        self.projection_states = [None if w2 is None else torch.zeros_like(w2) for w2 in self.projections]
        self.mask: torch.Tensor | None = None  # (rows, columns): which columns are stored, where not a prefix
        table = torch.from_numpy(layout.table_of_row)
        hashed = torch.arange(self.rows) * 2654435761 % 2**32 % max(1, shared_rows)
        self.shared = self.rows + (table if shared_rows < 0 else hashed) if shared_rows else None

    def _class_of_d(self, needed: int) -> int:
        return self.layout.widths.index(self.d) if needed else 0

    def _stored(self, classes: torch.Tensor) -> torch.Tensor:
        columns = torch.arange(max(self.layout.widths))
        return (columns < self.width_of_class[classes][:, None]).float()

    def lookup(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the vectors ``(B, tables, d)`` of the ids ``(B, tables)``, and remember what ``update`` needs."""
        self._ids = ids.T.contiguous()
        self._at = self._ids
        if self.shared is not None:
            absent = self.width_of_class[self.classes[self._ids]] == 0
            self._at = torch.where(absent, self.shared[self._ids], self._ids)
        found = self.weight[self._at]
        here = self.classes[self._at]
        self._parts = []
        vectors = torch.zeros(*self._at.shape, self.d)
        for c, (width, w2) in enumerate(zip(self.layout.widths, self.projections, strict=True)):
            if width == 0 or not bool((here == c).any()):
                continue
            member = (here == c).unsqueeze(-1)
            part = found[..., :width] * member
            vectors += part if w2 is None else part @ w2
            self._parts.append((c, width, member, part))
        return vectors.transpose(0, 1).contiguous()

    def update(self, gradient: torch.Tensor, rate: float, projection_rate: float, rate_power: float) -> None:
        """One step of Adagrad on the rows and W2 of the last lookup, given the gradient of its result.

        The rate of a class of width w is ``rate``·(d/w)^``rate_power``.
        """
        gradient = gradient.transpose(0, 1)
        of_rows = torch.zeros(*self._at.shape, self.weight.shape[1])
        for c, width, member, part in self._parts:
            w2, state = self.projections[c], self.projection_states[c]
            if w2 is None or state is None:
                of_rows[..., :width] += gradient * member
                continue
            of_rows[..., :width] += (gradient @ w2.transpose(1, 2)) * member
            of_w2 = part.transpose(1, 2) @ gradient
            state.addcmul_(of_w2, of_w2)
            w2.addcdiv_(of_w2, state.sqrt().add_(EPS), value=-projection_rate)
        rows, index = torch.unique(self._at, return_inverse=True)
        total = torch.zeros(len(rows), self.weight.shape[1]).index_add_(0, index.flatten(), of_rows.flatten(0, 1))
        if self.mask is not None:
            total *= self.mask[rows]
        squares = self.state[rows].addcmul_(total, total)
        self.state[rows] = squares
        step = total / squares.sqrt_().add_(EPS)
        if rate_power:
            columns = self.width_of_class[self.classes[rows]].clamp(min=1)
            step *= ((self.d / columns) ** rate_power)[:, None]
        self.weight[rows] = self.weight[rows].sub_(step, alpha=rate)

    def gradients_of_ids(self, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the distinct ids of the last lookup, the sums of the gradients of their vectors, and their counts."""
        rows, index, counts = torch.unique(self._ids, return_inverse=True, return_counts=True)
        flat = gradient.transpose(0, 1).flatten(0, 1)
        return rows, torch.zeros(len(rows), self.d).index_add_(0, index.flatten(), flat), counts

    def vectors(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Return the vectors ``(rows, d)`` of all rows, from other rows than the stored ones if given."""
        weight = self.weight if weight is None else weight
        at = torch.arange(self.rows)
        if self.shared is not None:
            at = torch.where(self.width_of_class[self.classes[: self.rows]] == 0, self.shared, at)
        table = torch.from_numpy(self.layout.table_of_row)
        found = torch.zeros(self.rows, self.d)
        for c, w2 in enumerate(self.projections):
            width = self.layout.widths[c]
            members = torch.nonzero(self.classes[at] == c).flatten()
            if width == 0 or not len(members):
                continue
            part = weight[at[members], :width]
            if w2 is None:
                found[members] = part
            else:
                found[members] = _by_table(part, table[members], w2)
        return found

    def move(self, classes: Ints, policy: str) -> int:
        """Give rows new classes, and return how many moved.

        Args:
            classes: the new class of each row.
            policy: ``fit``: the vector is kept as well as the new class can express it, by least squares; ``reset``:
                rows begin anew; ``reset_on_shrink``: those that lose columns do.
        """
        new, old = torch.from_numpy(classes), self.classes[: self.rows]
        moved = torch.nonzero(new != old).flatten()
        if not len(moved):
            return 0
        before, after = self.width_of_class[old[moved]], self.width_of_class[new[moved]]
        vectors = self.vectors()[moved]
        mean = self.state[moved].sum(dim=1) / before.clamp(min=1)
        state = torch.where(before > 0, mean * before / after.clamp(min=1), torch.zeros(()))
        table = torch.from_numpy(self.layout.table_of_row)[moved]
        self.classes[moved] = new[moved]
        weight = torch.zeros(len(moved), self.weight.shape[1])
        for c, (width, w2) in enumerate(zip(self.layout.widths, self.projections, strict=True)):
            members = torch.nonzero(new[moved] == c).flatten()
            if width == 0 or not len(members):
                continue
            fitted = vectors[members]
            if w2 is not None:
                fitted = _by_table(fitted, table[members], torch.linalg.pinv(w2))
            weight[members, :width] = fitted
        if policy != "fit":
            anew = (before > 0) if policy == "reset" else (after < before)
            fresh = (2 * torch.rand_like(weight) - 1) * self.bound[moved][:, None]
            weight = torch.where(anew[:, None], fresh, weight)
            state = torch.where(anew, torch.zeros(()), state)
        self.weight[moved] = weight * self._stored(new[moved])
        self.state[moved] = state[:, None] * self._stored(new[moved])
        return len(moved)


def _by_table(rows: torch.Tensor, table: torch.Tensor, matrices: torch.Tensor) -> torch.Tensor:
    """Multiply rows, sorted by table, by the matrices of their tables."""
    counts = torch.bincount(table, minlength=len(matrices)).tolist()
    return torch.cat([part @ matrices[t] for t, part in enumerate(torch.split(rows, counts))])


def quantise(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """Return rows as they read after rowwise quantisation with a scale and a bias in half precision."""
    if bits == 32 or not rows.numel():
        return rows
    low, high = rows.amin(dim=1, keepdim=True), rows.amax(dim=1, keepdim=True)
    low = low.half().float()
    scale = ((high - low) / (2**bits - 1)).half().float().clamp(min=1e-8)
    return ((rows - low) / scale).round().clamp(0, 2**bits - 1) * scale + low


def served_row_bytes(width: int, bits: int) -> float:
    """Return the bytes of a served row: float32, or ``bits`` a value and 4 bytes of scale and bias."""
    return FLOAT * width if bits == 32 else width * bits / 8 + 4


def drop_order(kind: str, counts: Ints, vectors: torch.Tensor) -> Ints:
    """Return the rows in the order in which they are kept: by ``count``, or by ``magnitude`` of their vectors."""
    if kind == "count":
        return np.argsort(-counts, kind="stable")
    return np.argsort(-vectors.norm(dim=1).numpy(), kind="stable")
