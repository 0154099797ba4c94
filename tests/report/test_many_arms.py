"""The charts of a report with many arms show which mark and line is whose."""

import dataclasses
import re
from pathlib import Path

import pytest

from mlet_dist.pages import series_looks
from mlet_dist.report import run_report as module
from mlet_dist.report.run_report import report
from tests.report.arms_on_disk import MadeUpArms


@pytest.mark.parametrize(("count", "numbered"), [(17, False), (4, True)])
def test_the_key_has_a_mark_of_its_own_for_each_arm(
    count: int, numbered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = MadeUpArms(tmp_path / "runs", rows=60)
    (single,) = made.arm("single", "single", 0.1, {"dcp": 1000}, seeds=(0,))
    runs = [single, *(dataclasses.replace(single, arm=f"arm {index}", kind="mlet") for index in range(2, count + 1))]
    monkeypatch.setattr(module, "measured_runs", lambda directories: runs)
    if numbered:
        monkeypatch.setattr(series_looks, "LOOKS", count - 1)
    report([Path("x")], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    (key,) = re.findall(r'<p class="key">(.*?)</p>', page)
    entries = re.findall(r"<span>(<svg.*?</svg>)(.*?)</span>", key)
    assert len({mark for mark, _ in entries}) == len(entries) == count
    number = f"{count}: " if numbered else ""
    assert entries[-1][1] == f"{number}arm {count}"
    # In the charts of the two sizes and of calibration.
    assert len(re.findall(rf">{count}</text>", page[page.index('class="charts"') :])) == (3 if numbered else 0)
