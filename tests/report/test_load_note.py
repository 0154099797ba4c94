"""A report says with how many runs at a time step times were measured."""

import pytest

from mlet_dist.report.arm_details import ArmDetails, Details
from mlet_dist.report.learning import Cost
from mlet_dist.report.report_text import load_note


def note_of(**runs_at_once: int | None) -> str:
    costs = {arm: Cost(1.0, 1.0, 1, "cpu", 1, number) for arm, number in runs_at_once.items()}
    arms = {arm: ArmDetails(None, None, [], {}, None, cost, None) for arm, cost in costs.items()}
    without = ArmDetails(None, None, [], {}, None, None, None)
    return " ".join(load_note(Details(arms | {"without times": without}, {})))


def test_arms_that_shared_the_machine_with_as_many_runs() -> None:
    assert note_of(single=4, mlet=4).startswith("Step times were measured with up to 4 runs at a time on one machine;")


@pytest.mark.parametrize("number", [1, None])
def test_of_runs_that_had_it_to_themselves_and_of_earlier_versions_nothing_is_said(number: int | None) -> None:
    assert note_of(single=number, mlet=number) == ""
    assert note_of(single=1, mlet=None) == ""


def test_arms_that_shared_it_with_other_numbers_of_runs_do_not_compare() -> None:
    note = note_of(single=1, mlet=4, control=4, own=None)
    assert "so that they do not compare" in note
    assert note.endswith("at most 1 (single); 4 (mlet, control); not known (own).")
