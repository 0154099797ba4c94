import json
import math

import pytest

from mlet_dist.formatting import to_json


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
