import json
import math

import pytest

from mlet_dist.formatting import signed, to_json


def test_values_that_json_does_not_have_become_null() -> None:
    value = {"auc": math.nan, "worst": [math.inf, 1.5, {"deep": -math.inf}], "rows": 3, "ok": True, "none": None}
    text = to_json(value)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "auc": None,
        "worst": [None, 1.5, {"deep": None}],
        "rows": 3,
        "ok": True,
        "none": None,
    }


@pytest.mark.parametrize(
    ("value", "text"), [(0.00123, "+0.0012"), (-0.00005001, "-0.0001"), (-0.00004, "0.0000"), (0.0, "0.0000")]
)
def test_a_difference_that_rounds_to_zero_has_no_sign(value: float, text: str) -> None:
    assert signed(value) == text
