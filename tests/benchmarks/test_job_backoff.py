"""benchmarks/job_backoff.py gives the waits of a real Job controller, and the table that the report shows."""

import pytest

from benchmarks.job_backoff import JobController, Seconds, table
from tests.helpers.mlet_command import ROOT


@pytest.mark.parametrize(
    ("per_index", "nodes", "measured"),
    [
        (False, 2, [20, 80, 320, 600]),
        (False, 8, [600, 600]),
        (True, 8, [10, 20]),
    ],
)
def test_delays_are_those_of_a_controller_of_kubernetes_1_36(
    per_index: bool, nodes: int, measured: list[float]
) -> None:
    controller = JobController(per_index)
    assert [controller.delay(range(nodes)) for _ in measured] == measured


def test_another_index_does_not_wait_longer() -> None:
    controller = JobController(per_index=True)
    assert [controller.delay([index]) for index in (0, 0, 1, 0, 1)] == [10, 20, 10, 40, 20]


def test_the_report_shows_what_the_script_prints() -> None:
    (report,) = (ROOT / "benchmarks" / "results").glob("*-job-backoff.md")
    assert table([2, 8, 64], 10, 1000, Seconds(ranks=13, pod=5)) in report.read_text()
