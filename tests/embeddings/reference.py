"""What multi-layer tables must compute, written plainly: dense, float64, one process, no TorchRec."""

from dataclasses import dataclass, field

import torch

Bags = dict[str, list[list[tuple[int, float]]]]


@dataclass
class Table:
    """``rows`` (n, k or d), ``projection`` (k, d) or None; pooled by ``pooling`` for each of ``features``."""

    name: str
    rows: torch.Tensor
    projection: torch.Tensor | None
    pooling: str
    features: list[str]


@dataclass
class DenseReference:
    """Trains tables on bags: ``bags[feature]`` holds, for each row of the global batch, a list of (id, weight)."""

    tables: list[Table]
    optimizer: str
    rates: dict[str, float]
    _sums: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for table in self.tables:
            table.rows = table.rows.double().clone().requires_grad_()
            if table.projection is not None:
                table.projection = table.projection.double().clone().requires_grad_()

    def forward(self, bags: Bags) -> dict[str, torch.Tensor]:
        """Feature -> pooled vectors ``(B, d)``; ``feature@table`` where several tables serve one feature."""
        outputs = {}
        served = [feature for table in self.tables for feature in table.features]
        for table in self.tables:
            whole = table.rows if table.projection is None else table.rows @ table.projection
            for feature in table.features:
                vectors = []
                for ids in bags[feature]:
                    total = whole.new_zeros(whole.shape[1])
                    for each, weight in ids:
                        total = total + weight * whole[each]
                    size = sum(weight for _, weight in ids)
                    vectors.append(total / size if ids and table.pooling == "mean" else total)
                key = feature if served.count(feature) == 1 else f"{feature}@{table.name}"
                outputs[key] = torch.stack(vectors)
        return outputs

    def step(self, bags: Bags) -> dict[str, torch.Tensor]:
        """One step on ``toy_loss`` of the whole global batch; returns the outputs before it."""
        outputs = self.forward(bags)
        toy_loss(outputs).backward()
        with torch.no_grad():
            for table in self.tables:
                self._update(f"{table.name}.rows", table.rows, self.rates["rows"])
                if table.projection is not None:
                    self._update(f"{table.name}.projection", table.projection, self.rates["projections"])
        return {name: output.detach() for name, output in outputs.items()}

    def _update(self, name: str, weight: torch.Tensor, rate: float) -> None:
        assert weight.grad is not None
        if self.optimizer == "sgd":
            weight -= rate * weight.grad
        else:
            total = self._sums.setdefault(name, torch.zeros_like(weight))
            total += weight.grad**2
            weight -= rate * weight.grad / (total.sqrt() + 1e-8)
        weight.grad = None


def toy_loss(outputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """A mean over rows in which every feature and column counts, differently, and gradients depend on values.

    With positive weights all gradients are positive: nothing cancels, so float32 must follow float64 closely, also
    through Adagrad, which blows up the rounding of a gradient near zero.
    """
    total: torch.Tensor | float = 0.0
    for index, name in enumerate(sorted(outputs)):
        columns = torch.linspace(0.5, 1.5, outputs[name].shape[1], dtype=outputs[name].dtype)
        total = total + (outputs[name] * columns).sum(dim=1) * (1 + 0.3 * index)
    assert isinstance(total, torch.Tensor)
    return (total**2).mean() / 100
