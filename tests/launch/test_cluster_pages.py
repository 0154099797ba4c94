"""The pages of docs/clusters say the same of each way, and name kustomizations and objects that exist."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.mlet_command import ROOT
from tests.helpers.quantities import quantity
from tests.helpers.rendered_manifests import KINDS, RENDERED, names, needs_kubectl, of_kind, render

FOLDER = ROOT / "docs" / "clusters"
PAGES = [ROOT / "docs" / "cluster.md", *sorted(FOLDER.glob("*.md"))]
WAYS = ["slurm", "job", "jobset", "trainjob", "kueue", "volcano"]
SECTIONS = ["Apply", "Watch", "Stop", "Resume", "Upgrade", "Read metrics", "Clean up"]


@pytest.mark.parametrize("way", WAYS)
def test_a_page_says_what_a_user_does_from_apply_to_clean_up(way: str) -> None:
    headings = re.findall(r"^## (.+)$", (FOLDER / f"{way}.md").read_text(), flags=re.MULTILINE)
    found = [section for heading in headings for section in SECTIONS if heading.startswith(section)]
    assert found == SECTIONS


def test_every_kustomization_is_documented() -> None:
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(re.findall(r"k8s/([\w/-]+)", text)) >= {*RENDERED, *KINDS}
    components = {path.parent.name for path in (ROOT / "k8s" / "components").rglob("kustomization.yaml")}
    assert set(re.findall(r"k8s/components/([\w-]+)", text)) == components


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_kustomizations_that_are_applied_exist(page: Path) -> None:
    assert set(re.findall(r"(?:apply|delete) -k k8s/([\w/-]+)", page.read_text())) <= set(RENDERED)


@needs_kubectl
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_objects_of_commands_exist(page: Path) -> None:
    kinds = {"job": "Job", "jobset": "JobSet", "trainjob": "TrainJob", "vcjob": "Job"}
    existing = {each for name in RENDERED for each in names(render(name))}
    # A TrainJob makes a JobSet of its name.
    existing |= {("JobSet", name) for kind, name in existing if kind == "TrainJob"}
    for kind, name in re.findall(r"\b(job|jobset|trainjob|vcjob)[ /](mlet-[\w-]+)", page.read_text()):
        assert (kinds[kind], name) in existing, f"{kind} {name}"


def test_the_fields_that_pages_explain_have_these_values() -> None:
    manifests = "\n".join(path.read_text() for path in (ROOT / "k8s").rglob("*.yaml"))
    for page in PAGES:
        fields = r"`((?:maxRetry|maxRestarts|maxFailedIndexes|backoffLimit\w*): \d+)`"
        for field in re.findall(fields, page.read_text()):
            assert field in manifests, f"{page.name}: {field}"


def test_drains_may_delete_the_volumes_of_pods() -> None:
    """`kubectl drain` refuses to evict pods that have emptyDir volumes, as these have, without that option."""
    commands = [each for page in PAGES for each in re.findall(r"`(kubectl drain [^`]+)`", page.read_text())]
    assert commands
    assert [each for each in commands if "--delete-emptydir-data" not in each] == []


@needs_kubectl
def test_pages_do_not_advise_to_delete_pods_of_lost_machines_by_force() -> None:
    """A pod is replaced when it has ended, which nobody reports of a machine that has vanished, whatever is deleted."""
    assert {job["spec"]["podReplacementPolicy"] for job in of_kind("job", "Job")} == {"Failed"}
    for page in PAGES:
        text = " ".join(page.read_text().split())
        for found in re.finditer(r"kubectl delete pod\b[^`]*--force[^`]*`", text):
            assert text[found.end() :].startswith(" does not help"), page.name


@needs_kubectl
def test_the_quota_that_a_job_set_needs_in_kueue_is_documented() -> None:
    """Kueue takes the pods of all replicated Jobs together, also of those that wait for another one."""
    (job_set,) = of_kind("kueue/jobset", "JobSet")
    cores, gib = 0.0, 0.0
    for each in job_set["spec"]["replicatedJobs"]:
        job = each["template"]["spec"]
        (container,) = job["template"]["spec"]["containers"]
        pods, requests = job.get("parallelism", 1), container["resources"]["requests"]
        cores += pods * quantity(requests["cpu"])
        gib += pods * quantity(requests["memory"]) / 2**30
    assert f"room for {cores:.0f} cores and {gib:,.0f} GiB" in (FOLDER / "kueue.md").read_text()


@pytest.mark.parametrize(
    ("conditions", "ends"),
    [
        ("Suspended SuccessCriteriaMet Complete", True),
        ("FailureTarget Failed", True),
        ("Suspended FailureTarget", False),
    ],
)
def test_the_documented_wait_ends_when_a_job_has_completed_or_failed(
    conditions: str, ends: bool, tmp_path: Path
) -> None:
    script = re.search(r"^    until kubectl get job .*\n    do sleep 30; done$", (FOLDER / "job.md").read_text(), re.M)
    assert script
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\necho {conditions}\n")
    kubectl.chmod(0o755)
    command = script[0].replace("sleep 30", "exit 7")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    assert subprocess.run(["sh", "-c", command], env=environment, timeout=30, check=False).returncode == (
        0 if ends else 7
    )
