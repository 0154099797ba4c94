"""Compare the predictions of an exported model with those of the trained model, within tolerances."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mlet_dist.export.verify.compared_models import ExportedModel
from mlet_dist.export.verify.table_check import TableError
from mlet_dist.training.label_metrics import LabelMetrics, metric_prefixes


@dataclass(frozen=True)
class Tolerances:
    """The largest differences with which an output passes.

    Attributes:
        difference: for float32 tables, of a logit (of a probability for a package), and of a value in a table relative
            to the table's largest value.
        auc: for quantised tables, the absolute change of AUC by encoding.
    """

    difference: float = 1e-5
    auc: Mapping[str, float] = field(default_factory=lambda: {"fp16": 5e-4, "int8": 5e-4, "int4": 2e-3})


DEFAULT_TOLERANCES = Tolerances()


class Comparison:
    """Accumulates the differences between an exported model and the trained model batch by batch."""

    def __init__(self, model: ExportedModel, labels: Sequence[str] = ("label",), *, weighted: bool = False) -> None:
        self.model, self._labels = model, labels
        self._metrics = LabelMetrics(labels, torch.device("cpu"), weighted=weighted)
        self._worst, self._worst_row, self._rows = -1.0, -1, 0

    def add(
        self, logits: torch.Tensor, found: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add rows with the ``logits`` of the trained model and the predictions ``found`` of the exported model.

        Args:
            weights: the rows' weights in AUC and LogLoss, if they have any.

        Returns:
            The logits of the exported model.
        """
        is_logit = self.model.unit == "logit"
        expected = logits.double() if is_logit else logits.double().sigmoid()
        # NaN counts as an infinite difference, so that a damaged table cannot pass.
        difference = (expected - found.double()).abs().nan_to_num(nan=math.inf).reshape(len(labels), -1).amax(dim=1)
        largest, index = difference.max(dim=0)
        if float(largest) > self._worst:
            self._worst, self._worst_row = float(largest), self._rows + int(index)
        self._rows += len(labels)
        of_model = found if is_logit else _to_logits(found)
        self._metrics.update(of_model, labels, weights)
        return of_model

    def result(
        self, of_run: Mapping[str, float], errors: Mapping[str, TableError], tolerances: Tolerances
    ) -> dict[str, Any]:
        """Return the entry of an output in the result of ``verify_export``."""
        found, key = self._metrics.compute(), f"max_abs_{self.model.unit}_diff"
        prefixes = metric_prefixes(self._labels)
        changes = [found[f"{prefix}auc"] - of_run[f"{prefix}auc"] for prefix in prefixes]
        finite = all(math.isfinite(error.max_abs_error) for error in errors.values()) and math.isfinite(self._worst)
        if self.model.encoding == "fp32":
            tolerance = {key: tolerances.difference}
            exact = all(error.max_abs_error <= tolerances.difference * error.largest for error in errors.values())
            ok = exact and self._worst <= tolerances.difference
        else:
            tolerance = {"auc_change": tolerances.auc[self.model.encoding]}
            ok = finite and all(abs(change) <= tolerance["auc_change"] for change in changes)
        return {
            "ok": ok,
            "encoding": self.model.encoding,
            key: self._worst,
            "worst_row": self._worst_row,
            **{
                f"{prefix}{name}": value
                for prefix, change in zip(prefixes, changes, strict=True)
                for name, value in (
                    ("auc", found[f"{prefix}auc"]),
                    ("auc_change", change),
                    ("logloss", found[f"{prefix}logloss"]),
                    ("logloss_change", found[f"{prefix}logloss"] - of_run[f"{prefix}logloss"]),
                )
            },
            "tolerance": tolerance,
            "tables": {name: error.to_dict() for name, error in errors.items()},
        }


def _to_logits(probabilities: torch.Tensor) -> torch.Tensor:
    """Return the float64 logits of float32 probabilities; 0 and 1 are replaced by the next value, so all are finite."""
    return probabilities.double().clamp(torch.finfo(torch.float32).tiny, 1 - 2.0**-24).logit()
