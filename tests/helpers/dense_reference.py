"""A dense float64 reference of multi-layer tables and their optimizers, in one process and without TorchRec."""

from dataclasses import dataclass, field
from itertools import accumulate

import torch

Bags = dict[str, list[list[tuple[int, float]]]]


@dataclass
class Table:
    """A table: ``rows`` is W1 ``(n, k)``, ``projection`` W2 ``(k, d)`` or None, ``pooling`` sum or mean.

    The rows of a table with ``ranges`` are those of tables of other widths; ranges without columns are zero, or if
    ``shared_row`` is set the row before them.
    """

    name: str
    rows: torch.Tensor
    projection: torch.Tensor | None
    pooling: str
    features: list[str]
    ranges: list["Table"] = field(default_factory=list)
    shared_row: bool = False

    @property
    def stored(self) -> list[tuple[int, "Table"]]:
        """The first row of each range that has columns, and the range; the table itself if it has no ranges."""
        starts = accumulate((len(each.rows) for each in self.ranges), initial=0)
        parts = [(start, each) for start, each in zip(starts, self.ranges, strict=False) if each.rows.shape[1]]
        return parts if self.ranges else [(0, self)]

    def product(self, embedding_dim: int) -> torch.Tensor:
        """Return W ``(n, d)``."""
        if not self.ranges:
            return self.rows if self.projection is None else self.rows @ self.projection
        zero = torch.zeros(1, embedding_dim, dtype=torch.float64)
        products = [
            each.product(embedding_dim) if each.rows.shape[1] else zero.expand(len(each.rows), -1)
            for each in self.ranges
        ]
        if self.shared_row and not self.ranges[-1].rows.shape[1]:
            products[-1] = products[-2][-1:].expand(len(self.ranges[-1].rows), -1)
        return torch.cat(products)


@dataclass
class DenseReference:
    """Trains tables on bags: ``bags[feature]`` has a list of (id, weight) for each row of the global batch.

    ``optimizer`` is sgd, adagrad, rowwise_adagrad (W2: adagrad) or adam (W1: only rows that the batch looks up).
    """

    tables: list[Table]
    optimizer: str
    rates: dict[str, float]
    embedding_dim: int = 4
    _steps: int = 0
    _states: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for _, table in (stored for each in self.tables for stored in each.stored):
            table.rows = table.rows.double().clone().requires_grad_()
            if table.projection is not None:
                table.projection = table.projection.double().clone().requires_grad_()

    def forward(self, bags: Bags) -> dict[str, torch.Tensor]:
        """Return pooled vectors ``(B, d)`` by feature, or by ``feature@table`` if several tables have the feature."""
        outputs = {}
        served = [feature for table in self.tables for feature in table.features]
        for table in self.tables:
            product = table.product(self.embedding_dim)
            for feature in table.features:
                vectors = []
                for ids in bags[feature]:
                    total = 0 * product[0]  # an empty bag has a gradient of zero
                    for each, weight in ids:
                        total = total + weight * product[each]
                    size = sum(weight for _, weight in ids)
                    vectors.append(total / size if ids and table.pooling == "mean" else total)
                key = feature if served.count(feature) == 1 else f"{feature}@{table.name}"
                outputs[key] = torch.stack(vectors)
        return outputs

    def step(self, bags: Bags, factor: float = 1.0) -> dict[str, torch.Tensor]:
        """Train one step on ``toy_loss`` of the global batch at ``factor`` times the rates; return the outputs."""
        outputs = self.forward(bags)
        toy_loss(outputs).backward()
        self._steps += 1
        with torch.no_grad():
            for table in self.tables:
                ids = {each for feature in table.features for bag in bags[feature] for each, _ in bag}
                if table.shared_row:
                    ids = {min(each, sum(len(part.rows) for part in table.ranges[:-1]) - 1) for each in ids}
                for first, part in table.stored:
                    own = sorted(each - first for each in ids if first <= each < first + len(part.rows))
                    self._update_rows(f"{part.name}.rows", part.rows, own, factor * self.rates["rows"])
                    if part.projection is not None:
                        self._update(f"{part.name}.projection", part.projection, factor * self.rates["projections"])
        return {name: output.detach() for name, output in outputs.items()}

    def _update_rows(self, name: str, rows: torch.Tensor, looked_up: list[int], rate: float) -> None:
        if self.optimizer == "rowwise_adagrad":
            assert rows.grad is not None
            total, _ = self._state(name, rows)
            total += (rows.grad**2).mean(dim=1, keepdim=True)
            rows -= rate * rows.grad / (total.sqrt() + 1e-8)
            rows.grad = None
            return
        before, states = rows.clone(), [state.clone() for state in self._state(name, rows)]
        self._update(name, rows, rate)
        if self.optimizer == "adam":
            unused = [row for row in range(len(rows)) if row not in looked_up]
            for changed, kept in zip((rows, *self._state(name, rows)), (before, *states), strict=True):
                changed[unused] = kept[unused]

    def _update(self, name: str, weight: torch.Tensor, rate: float) -> None:
        gradient = weight.grad
        assert gradient is not None
        first, second = self._state(name, weight)
        if self.optimizer == "sgd":
            weight -= rate * gradient
        elif self.optimizer == "adam":
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            mean, square = first / (1 - 0.9**self._steps), second / (1 - 0.999**self._steps)
            weight -= rate * mean / (square.sqrt() + 1e-8)
        else:
            first += gradient**2
            weight -= rate * gradient / (first.sqrt() + 1e-8)
        weight.grad = None

    def _state(self, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._states.setdefault(name, (torch.zeros_like(weight), torch.zeros_like(weight)))


def toy_loss(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return a mean over rows in which each feature and column has its own factor and gradients depend on values.

    With positive weights all gradients are positive, so nothing cancels. float32 then stays close to float64, even with
    Adagrad, which amplifies the rounding error of a gradient near zero.
    """
    total: torch.Tensor | float = 0.0
    for index, name in enumerate(sorted(outputs)):
        of_name = outputs[name]
        columns = torch.linspace(0.5, 1.5, of_name.shape[1], dtype=of_name.dtype, device=of_name.device)
        total = total + (of_name * columns).sum(dim=1) * (1 + 0.3 * index)
    assert isinstance(total, torch.Tensor)
    return (total**2).mean() / 100
