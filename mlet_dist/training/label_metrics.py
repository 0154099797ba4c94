"""Metrics of a model of one label or several: those of ``BinaryMetrics`` for each label, by its name.

With several labels a row may lack some of them (NaN). Such a row has no part in the metrics of that label.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import distributed as dist

from mlet_dist.training.binary_metrics import BinaryMetrics


def metric_prefixes(labels: Sequence[str]) -> list[str]:
    """Return what the names of each label's metrics begin with: nothing for one label, ``click_`` for one of several.

    Args:
        labels: the names of all labels of a model.
    """
    return [""] if len(labels) == 1 else [f"{label}_" for label in labels]


def by_row(logits: torch.Tensor, labels: int) -> torch.Tensor:
    """Return the logits of a network, ``(b,)``, ``(b, 1)`` or ``(b, L)``, as ``(b,)``; with several labels ``(b, L)``.

    Args:
        logits: what the network returned.
        labels: L.
    """
    return logits.reshape(-1) if labels == 1 else logits.reshape(-1, labels)


class LabelMetrics:
    """The metrics of each label over any number of rows; of one label, those of ``BinaryMetrics``.

    Args:
        labels: the names of the labels.
        device: the device of the counts.
        bins: as in ``BinaryMetrics``.
        weighted: whether rows have weights.
    """

    def __init__(
        self, labels: Sequence[str], device: torch.device, bins: int = 1 << 20, *, weighted: bool = False
    ) -> None:
        self._weighted, self._several = weighted, len(labels) > 1
        # A row that lacks a label has weight 0 in its metrics, so that no shape depends on values.
        self._metrics = {
            prefix: BinaryMetrics(device, bins, weighted=weighted or self._several)
            for prefix in metric_prefixes(labels)
        }
        self._known = torch.zeros(len(labels), dtype=torch.int64, device=device)

    def update(self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> None:
        """Count rows.

        Args:
            logits: ``(b,)``, or ``(b, L)`` with several labels.
            labels: of the same shape, 0, 1, or NaN where a row lacks one of several.
            weights: ``(b,)``, if rows have weights.
        """
        if not self._several:
            (metrics,) = self._metrics.values()
            metrics.update(logits, labels, weights)
            return
        known = ~labels.isnan()
        self._known += known.sum(dim=0)
        of_rows = known.float() if weights is None else known * weights[:, None]
        found = labels.nan_to_num()
        for index, metrics in enumerate(self._metrics.values()):
            metrics.update(logits[:, index], found[:, index], of_rows[:, index])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the state of each label's metrics, its names with the label's prefix. A collective call."""
        state = {
            f"{prefix}{name}": tensor
            for prefix, metrics in self._metrics.items()
            for name, tensor in metrics.state_dict().items()
        }
        return state | {"known": _sum(self._known)} if self._several else state

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a state on any number of ranks; on the same number, sums are bitwise identical."""
        for prefix, metrics in self._metrics.items():
            names = ("counts", "loss", "rows")
            metrics.load_state_dict({name: state[f"{prefix}{name}"] for name in names if f"{prefix}{name}" in state})
        if self._several:
            is_first = not dist.is_initialized() or dist.get_rank() == 0
            self._known.copy_(state["known"] if is_first else torch.zeros_like(self._known))

    def compute(self) -> dict[str, float]:
        """Return the metrics of all labels over all ranks; NaN where undefined. A collective call.

        Of one label those of ``BinaryMetrics.compute``. Of several ``rows``, and for each of them, with its prefix,
        ``auc``, ``logloss``, ``normalized_entropy`` (LogLoss divided by that of a constant, the positive rate),
        ``rows`` (those that have the label), ``positive_rate`` and, if rows have weights, ``weight``.
        """
        if not self._several:
            (metrics,) = self._metrics.values()
            return metrics.compute()
        known, result = _sum(self._known).tolist(), {}
        for (prefix, metrics), rows in zip(self._metrics.items(), known, strict=True):
            found = metrics.compute()
            result["rows"] = found["rows"]
            rate, logloss = found["positive_rate"], found["logloss"]
            of_label = {
                "auc": found["auc"],
                "logloss": logloss,
                "normalized_entropy": logloss / _entropy(rate) if 0 < rate < 1 else math.nan,
                "rows": rows,
                "positive_rate": rate,
            }
            if self._weighted:
                of_label["weight"] = found["weight"]
            result |= {f"{prefix}{name}": value for name, value in of_label.items()}
        return result


def undefined_aucs(metrics: Mapping[str, float], labels: Sequence[str], description: str) -> list[str]:
    """Return a warning for each label of which the rows have both values, but those of weight above 0 do not.

    Args:
        metrics: of ``LabelMetrics``.
        labels: the names of the labels.
        description: the data set and split, for the messages.
    """
    found = []
    for prefix in metric_prefixes(labels):
        if f"{prefix}weight" not in metrics or not math.isnan(metrics[f"{prefix}auc"]):
            continue
        rows, what = f"{metrics[f'{prefix}rows']:,}", f" {prefix.removesuffix('_')}" if prefix else ""
        if not metrics[f"{prefix}weight"]:
            found.append(f"{description}: all {rows} rows have sample_weight 0, so nothing can be measured")
            continue
        label = int(metrics[f"{prefix}positive_rate"] > 0)
        found.append(
            f"{description}: all rows whose sample_weight is above 0 have label{what} {label}, so its AUC is undefined"
        )
    return found


def _sum(counts: torch.Tensor) -> torch.Tensor:
    counts = counts.clone()
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


def _entropy(rate: float) -> float:
    return -rate * math.log(rate) - (1 - rate) * math.log1p(-rate)
