"""Metrics of a model at each of the widths that it is trained at."""

import re
from collections.abc import Sequence

import torch

from mlet_dist.models.nested_widths import NestedWidths
from mlet_dist.training.label_metrics import LabelMetrics, metric_prefixes

Predicted = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Logits, labels, and weights if there are any, of the rows of a batch."""

_OF_WIDTH = re.compile(r"(auc|logloss)_dim\d+")


class WidthMetrics:
    """The metrics of ``LabelMetrics``, and of each smaller width AUC and LogLoss, as ``logloss_dim4``.

    Args:
        labels: the names of the labels.
        device: the device of the counts.
        widths: of the model; None if it is trained at one.
        weighted: whether rows have weights.
    """

    def __init__(
        self, labels: Sequence[str], device: torch.device, widths: NestedWidths | None, *, weighted: bool
    ) -> None:
        self._labels = labels
        self._smaller = () if widths is None else widths.widths[1:]
        self._metrics = [LabelMetrics(labels, device, weighted=weighted) for _ in (None, *self._smaller)]

    def update(self, predicted: Sequence[Predicted]) -> None:
        """Count the rows of a batch, predicted at each width, d first."""
        for metrics, of_width in zip(self._metrics, predicted, strict=True):
            metrics.update(*of_width)

    def compute(self) -> dict[str, float]:
        """Return the metrics of all rows over all ranks. A collective call."""
        found = self._metrics[0].compute()
        for width, metrics in zip(self._smaller, self._metrics[1:], strict=True):
            of_width = metrics.compute()
            for prefix in metric_prefixes(self._labels):
                found |= {f"{prefix}{name}_dim{width}": of_width[f"{prefix}{name}"] for name in ("auc", "logloss")}
        return found


def is_of_width(name: str) -> bool:
    """Return whether a metric is that of a smaller width."""
    return _OF_WIDTH.search(name) is not None
