"""`make cluster-test` with a kubectl that takes the place of a cluster: what is done, and what is reported as failed.

No cluster runs here; what one does is in tests/helpers/fake_kubectl.py.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.mlet_command import ROOT
from tests.helpers.rendered_manifests import needs_kubectl
from tests.kubernetes_trial.kubectl import TrialError, end_of, last_result
from tests.kubernetes_trial.run_trial import main

KILLED = "mlet-train-cpu-killed"


class Cluster:
    """The state of a cluster, and a kubectl that knows no other."""

    def __init__(self, folder: Path, *faults: str) -> None:
        self.file, self.kubectl = folder / "cluster.json", folder / "kubectl"
        empty: dict[str, Any] = {"namespaces": [], "claims": [], "commands": [], "jobs": {}, "pods": {}, "asked": {}}
        self.file.write_text(json.dumps(empty | {"uids": 0, "kills": 0, "step": 0, "faults": faults}))
        program = f"import runpy, sys; sys.path.insert(0, {str(ROOT)!r}); "
        program += "runpy.run_module('tests.helpers.fake_kubectl', run_name='__main__')"
        self.kubectl.write_text(f"#!{sys.executable}\n{program}\n")
        self.kubectl.chmod(0o755)

    def trial(self, monkeypatch: pytest.MonkeyPatch) -> int:
        monkeypatch.setenv("FAKE_CLUSTER", str(self.file))
        return main(["--image", "registry:5000/mine:7", "--kubectl", str(self.kubectl), "--poll", "0.001"])

    @property
    def state(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found


@needs_kubectl
def test_a_cluster_that_does_everything_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = Cluster(tmp_path)
    assert cluster.trial(monkeypatch) == 0
    output = capsys.readouterr().out
    assert "FAILED" not in output
    assert "14 of 14 steps succeeded" in output
    commands = [" ".join(words) for words in cluster.state["commands"]]
    assert [each for each in commands if each.startswith("delete pod")] == [
        f"delete pod {KILLED}-1 --wait=false",
        f"delete pod {KILLED}-1 --wait=false --grace-period=0 --force",
    ]
    assert cluster.state["namespaces"] == [], "the namespace is deleted"
    containers = [job["spec"]["template"]["spec"]["containers"][0] for job in cluster.state["deleted_jobs"].values()]
    assert {each["image"] for each in containers} == {"registry:5000/mine:7"}
    runs = {word for each in containers for word in each["args"] if word.startswith("run.dir=")}
    assert runs == {f"run.dir=/storage/runs/{name}" for name in ("quiet", "killed", "wrong")}


@needs_kubectl
@pytest.mark.parametrize(
    ("fault", "failed", "message"),
    [
        ("mlet-data fails", "data: a Job makes the data set", "job/mlet-data failed: MaxFailedIndexesExceeded"),
        (f"{KILLED} fails", "killed: the Job completes", f"job/{KILLED} failed: MaxFailedIndexesExceeded"),
        (
            "the pod ends with its rank",
            "killed: a rank is killed (SIGKILL); no pod ends",
            "a pod ended; the ranks should",
        ),
        (
            "other weights",
            "killed: the weights are those of the undisturbed Job",
            "bbbbbbbbbbbb, undisturbed aaaaaaaaaaaa",
        ),
        ("verify differs", "export: a Job without training exports and verifies", "verify found differences"),
    ],
)
def test_a_fault_is_reported(
    fault: str, failed: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    cluster = Cluster(tmp_path, fault)
    assert cluster.trial(monkeypatch) == 1
    output = capsys.readouterr().out
    assert f"failed: {failed}" in output
    assert message in output
    assert cluster.state["namespaces"] == []


@needs_kubectl
def test_training_that_does_not_go_on_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.kubernetes_trial.run_trial._KILL_S", 0.5)
    monkeypatch.setattr("tests.kubernetes_trial.run_trial._JOB_S", 0.5)
    assert Cluster(tmp_path, "training stops").trial(monkeypatch) == 1
    assert "not within 0 s" in capsys.readouterr().out


def test_no_cluster_is_said_in_two_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert Cluster(tmp_path, "no cluster").trial(monkeypatch) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0].startswith("cluster-test: no cluster answers, nothing was tested: kubectl version")
    assert "The connection to the server localhost:8080 was refused" in errors[0]
    assert main(["--image", "x", "--kubectl", str(tmp_path / "none")]) == 2
    assert "is not installed" in capsys.readouterr().err


def test_ends_and_results_are_read() -> None:
    assert end_of({}) is None
    conditions = [{"type": "Suspended", "status": "False"}, {"type": "FailureTarget", "status": "True"}]
    assert end_of({"status": {"conditions": conditions}}) is None
    conditions.append({"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": "code 2"})
    assert end_of({"status": {"conditions": conditions}}) == ("Failed", "PodFailurePolicy: code 2")
    logs = ['{"export": 1}\nnoise {\n{"other": 2}', "[1]\nnull"]
    assert last_result(logs, "export") == {"export": 1}
    with pytest.raises(TrialError, match="no pod printed a result with weights"):
        last_result(logs, "weights")
