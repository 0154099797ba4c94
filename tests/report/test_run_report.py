"""The page, the charts and the plain data of a report say the same, and are about the runs that were named."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from mlet_dist.errors import UserError
from mlet_dist.pages.page_shell import SERIES
from mlet_dist.quality.scores_file import read_scores
from mlet_dist.report import run_report as module
from mlet_dist.report.measured_runs import MeasuredRun, measured_runs
from mlet_dist.report.run_report import report
from tests.report.arms_on_disk import MadeUpArms


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[MeasuredRun]:
    made = MadeUpArms(tmp_path_factory.mktemp("runs"))
    own = made.arm("single <16>", "single", 0.1, {"dcp": 1000, "int8": 300})
    own += made.arm("mlet", "mlet", 0.1, {"dcp": 250, "int8": 70}, training_bytes=9000)
    return [*own, dataclasses.replace(own[0], arm="dead", fault="the dense arch returns the same for all rows")]


@pytest.fixture
def reported(
    runs: list[MeasuredRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, dict]:
    monkeypatch.setattr(module, "measured_runs", lambda directories: runs)
    out = tmp_path / "out"
    report([Path("x")], out, margin=0.004)
    # There are neither tables nor a data set behind these runs, which is said.
    warnings = capsys.readouterr().err
    assert "no spectrum of" in warnings
    assert "no metrics of rare and frequent ids" in warnings
    return out, json.loads((out / "report.json").read_text())


def test_figures_are_those_of_scikit_learn_from_the_predictions(
    reported: tuple[Path, dict], runs: list[MeasuredRun]
) -> None:
    _, result = reported
    checked = 0
    for output in result["outputs"]:
        for split in ("valid", "test"):
            expected = {"logloss": [], "auc": []}
            for run in runs:
                if run.arm == output["arm"]:
                    scores = read_scores(run.scores_of(split, output["output"]))
                    probabilities = 1 / (1 + np.exp(-scores.logits))
                    expected["logloss"].append(log_loss(scores.labels, probabilities))
                    expected["auc"].append(roc_auc_score(scores.labels, scores.logits))
            for metric, values in expected.items():
                found = output[split][metric]
                assert list(found["by_seed"].values()) == pytest.approx(values, abs=1e-9)
                assert found["mean"] == pytest.approx(np.mean(values), abs=1e-9)
                assert found["spread"] == pytest.approx(np.std(values, ddof=1), abs=1e-9)
                checked += 1
    assert checked == 4 * 4
    of = {(each["arm"], each["output"]): each["test"]["logloss"] for each in result["outputs"]}
    difference = of["mlet", "int8"]["mean"] - of["single <16>", "dcp"]["mean"]
    assert of["mlet", "int8"]["difference"]["value"] == pytest.approx(difference, abs=1e-12)


def test_the_page_has_all_figures_and_is_one_file(reported: tuple[Path, dict]) -> None:
    out, result = reported
    page = (out / "report.html").read_text()
    assert "single &lt;16&gt;" in page
    assert "single <16>" not in page
    for output in result["outputs"]:
        assert f"{output['test']['logloss']['mean']:.4f} ± {output['test']['logloss']['spread']:.4f}" in page
    assert result["advice"][0].startswith("Serve mlet, int8")
    assert result["advice"][0].replace("<", "&lt;").replace(">", "&gt;") in page
    assert "dead, seed 0: the dense arch returns the same for all rows" in page
    # Nothing is loaded from elsewhere, and colours are those of the reader's scheme.
    assert not any(text in page for text in ("<script", "<link", "src=", "url(http", "@import"))
    body = page[page.index("<body>") :]
    assert not any(colour in body for colour in SERIES)
    assert "var(--s0)" in body
    assert "<title>mlet, int8: 70 B, LogLoss" in body
    pictures = {path.name for path in (out / "figures").iterdir()}
    assert pictures == {"served_bytes.png", "training_bytes.png", "calibration.png"}
    tables = (out / "report.md").read_text()
    assert tables.startswith(f"- {result['advice'][0].replace('<', '&lt;')}")
    assert "\n| mlet | int8 | 70 B | 14.3 |" in tables


def test_a_report_is_not_written_over_another(runs: list[MeasuredRun], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(UserError, match="exists and is not empty"):
        report([Path("x")], tmp_path / "out")


def test_a_directory_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"neither of results\.parquet of `mlet sweep`, comparison\.json of"):
        measured_runs([tmp_path])
    with pytest.raises(UserError, match="nothing: no such directory; expected one that `mlet sweep`, `compare` or"):
        measured_runs([tmp_path / "nothing"])
    (tmp_path / "results.parquet").write_text("no")
    with pytest.raises(UserError, match=r"results\.parquet: cannot be read"):
        measured_runs([tmp_path])
