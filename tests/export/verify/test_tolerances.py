"""A comparison passes exactly within its tolerances."""

import math

import pytest
import torch

from mlet_dist.export.verify.compared_models import ExportedModel
from mlet_dist.export.verify.table_check import TableError
from mlet_dist.export.verify.tolerances import DEFAULT_TOLERANCES, Comparison, Tolerances

LABELS = torch.tensor([0.0, 1.0, 0.0, 1.0])
LOGITS = torch.tensor([-1.0, -2.0, 1.0, 2.0])  # two of four pairs are in order
OF_RUN = {"auc": 0.5, "logloss": 0.7}


def _result(
    encoding: str, unit: str, found: torch.Tensor, error: float = 0.0, tolerances: Tolerances = DEFAULT_TOLERANCES
) -> dict[str, object]:
    comparison = Comparison(ExportedModel(encoding, encoding, unit, lambda batch, bags: found))
    for rows in (slice(0, 1), slice(1, 4)):
        comparison.add(LOGITS[rows], found[rows], LABELS[rows])
    return comparison.result(OF_RUN, {"t": TableError(max_abs_error=error, largest=100.0)}, tolerances)


def test_float32_outputs_are_compared_by_logits_and_by_tables() -> None:
    for above, ok in ((0.9e-5, True), (1.2e-5, False), (math.nan, False)):
        result = _result("fp32", "logit", LOGITS.double() + torch.tensor([0, 0, above, 0]))
        assert result["ok"] is ok
        assert result["worst_row"] == 2
    assert result["max_abs_logit_diff"] == math.inf
    assert _result("fp32", "logit", LOGITS, error=0.9e-3)["ok"] is True  # relative to the largest value, 100
    assert _result("fp32", "logit", LOGITS, error=1.1e-3)["ok"] is False
    assert _result("fp32", "logit", LOGITS + 1e-4, error=1e-3, tolerances=Tolerances(2e-4))["ok"] is True


@pytest.mark.parametrize(("found", "change"), [([-2.0, -1.0, 1.0, 2.0], 0.25), ([1.0, -2.0, 1.1, 2.0], 0.0)])
def test_quantised_outputs_are_compared_by_the_absolute_change_of_auc(found: list[float], change: float) -> None:
    logits = torch.tensor(found)
    for of_run in (0.5, 0.75, 1.0):
        comparison = Comparison(ExportedModel("int8", "int8", "logit", lambda batch, bags: logits))
        comparison.add(LOGITS, logits, LABELS)
        result = comparison.result({"auc": of_run, "logloss": 0.7}, {"t": TableError()}, Tolerances())
        assert result["auc"] == 0.5 + change
        assert result["auc_change"] == 0.5 + change - of_run
        assert result["ok"] is (of_run == 0.5 + change)
    assert _result("int8", "logit", logits, error=math.inf, tolerances=Tolerances(auc={"int8": 1.0}))["ok"] is False


def test_a_probability_that_float32_rounds_to_one_has_a_finite_loss() -> None:
    sure = torch.tensor([0.0, 0.5, 0.0, 1.0])
    result = _result("int4", "probability", sure, tolerances=Tolerances(auc={"int4": 1.0}))
    assert result["logloss"] == pytest.approx(math.log(2) / 4, abs=1e-6)
    assert result["auc"] == 1.0
    assert "max_abs_probability_diff" in result
