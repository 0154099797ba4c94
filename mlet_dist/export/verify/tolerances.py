"""What a model of an export loses against the factorised one, and how much it may."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mlet_dist.export.verify.compared_models import Candidate
from mlet_dist.export.verify.table_check import TableError
from mlet_dist.training.evaluation import BinaryMetrics


@dataclass(frozen=True)
class Tolerances:
    """What an output may lose.

    Attributes:
        difference: of float32 tables: between two logits (of a package: two probabilities), and in a table as a share
            of its largest value.
        auc: of quantised tables, by encoding: the change of AUC, up or down.
    """

    difference: float = 1e-5
    auc: Mapping[str, float] = field(default_factory=lambda: {"fp16": 5e-4, "int8": 5e-4, "int4": 2e-3})


DEFAULT_TOLERANCES = Tolerances()


class Comparison:
    """What is found of a candidate, batch by batch."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self._metrics = BinaryMetrics(torch.device("cpu"))
        self._worst, self._worst_row, self._rows = -1.0, -1, 0

    def add(self, logits: torch.Tensor, found: torch.Tensor, labels: torch.Tensor) -> None:
        """Count rows in; ``logits`` are the factorised model's, ``found`` the candidate's predictions."""
        is_logit = self.candidate.unit == "logit"
        expected = logits.double() if is_logit else logits.double().sigmoid()
        # NaN counts as infinitely far, so that a broken table cannot pass.
        difference = (expected - found.double()).abs().nan_to_num(nan=math.inf)
        largest, index = difference.max(dim=0)
        if float(largest) > self._worst:
            self._worst, self._worst_row = float(largest), self._rows + int(index)
        self._rows += len(labels)
        self._metrics.update(found if is_logit else _logits(found), labels)

    def result(
        self, of_run: Mapping[str, float], errors: Mapping[str, TableError], tolerances: Tolerances
    ) -> dict[str, Any]:
        """What ``verify_export`` returns of an output."""
        found, key = self._metrics.compute(), f"max_abs_{self.candidate.unit}_diff"
        change = found["auc"] - of_run["auc"]
        finite = all(math.isfinite(error.max_abs_error) for error in errors.values()) and math.isfinite(self._worst)
        if self.candidate.encoding == "fp32":
            tolerance = {key: tolerances.difference}
            exact = all(error.max_abs_error <= tolerances.difference * error.largest for error in errors.values())
            ok = exact and self._worst <= tolerances.difference
        else:
            tolerance = {"auc_change": tolerances.auc[self.candidate.encoding]}
            ok = finite and abs(change) <= tolerance["auc_change"]
        return {
            "ok": ok,
            "encoding": self.candidate.encoding,
            key: self._worst,
            "worst_row": self._worst_row,
            "auc": found["auc"],
            "auc_change": change,
            "logloss": found["logloss"],
            "logloss_change": found["logloss"] - of_run["logloss"],
            "tolerance": tolerance,
            "tables": {name: error.to_dict() for name, error in errors.items()},
        }


def _logits(probabilities: torch.Tensor) -> torch.Tensor:
    """Of float32 probabilities, in float64; one that float32 rounds to 0 or 1 is the nearest other, so finite."""
    return probabilities.double().clamp(torch.finfo(torch.float32).tiny, 1 - 2.0**-24).logit()
