"""A real Kubernetes API server accepts every manifest, and a submission through TorchX.

These tests run if KUBECONFIG is set. They submit objects as a dry run, or create them in namespaces of their own, which
they delete. An API server is enough; the controllers of Jobs, JobSets and Kueue may run.
"""

import json
import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.helpers.kubernetes_schemas import Object
from tests.helpers.rendered_manifests import K8S, KINDS, RENDERED, STORAGE, TRAINING, names, overlay, render
from tests.helpers.torchx_cli import COMPONENTS, run_torchx

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif("KUBECONFIG" not in os.environ, reason="KUBECONFIG is not set"),
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed"),
]

OPTIONAL = ("JobSet", "PodGroup", "PodMonitor", "Queue", "TrainJob", "TrainingRuntime")  # custom resources
NEW = ("MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding")
IN_CLUSTER = [name for name in RENDERED if name in ("prompt-replacement", "volcano")]  # their objects have no namespace


def kubectl(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["kubectl", *arguments], capture_output=True, text=True, timeout=300, check=False)


def done(*arguments: str) -> str:
    """Run kubectl, which must succeed without a warning, and return its output."""
    found = kubectl(*arguments)
    assert found.returncode == 0, found.stderr
    assert "Warning" not in found.stderr
    return found.stdout


@cache
def served() -> frozenset[tuple[str, str]]:
    """Return version and kind of everything that the cluster knows."""
    lines = kubectl("api-resources", "--no-headers").stdout.splitlines()
    return frozenset((line.split()[-3], line.split()[-1]) for line in lines)


def need(things: list[Object]) -> None:
    """Skip the test if the cluster does not know a custom resource, or one that only new servers have."""
    for thing in things:
        kind = (thing["apiVersion"], thing["kind"])
        if kind not in served() and (thing["kind"] in OPTIONAL + NEW or kind[0].startswith("batch.volcano.sh/")):
            pytest.skip(f"the cluster does not know {kind[1]}: kubectl apply --server-side -f ../shared/crds")


@pytest.fixture
def restricted() -> Iterator[str]:
    """A namespace that refuses, and warns of, what Pod Security's level `restricted` does not allow."""
    name = f"mlet-test-{uuid.uuid4().hex[:8]}"
    done("create", "namespace", name)
    try:
        levels = [f"pod-security.kubernetes.io/{mode}=restricted" for mode in ("enforce", "warn", "audit")]
        done("label", "namespace", name, *levels)
        yield name
    finally:
        # A namespace deletes pods before Jobs, and a Job keeps failed pods until it has created others.
        kubectl("delete", "jobs", "--all", "--namespace", name, "--wait=false")
        kubectl("delete", "namespace", name, "--wait=false")


@pytest.mark.parametrize("name", RENDERED)
def test_server_accepts_every_manifest(name: str) -> None:
    need(render(name))
    output = done("apply", "--dry-run=server", "--validate=strict", "-k", str(K8S / name))
    assert len(re.findall(r"\(server dry run\)$", output, flags=re.MULTILINE)) == len(render(name))


@pytest.mark.parametrize("name", [name for name in RENDERED if name not in IN_CLUSTER])
def test_a_restricted_namespace_takes_every_manifest_under_other_names(
    name: str, tmp_path: Path, restricted: str
) -> None:
    need(render(name))
    renamed = overlay(tmp_path, name, namePrefix="team-", nameSuffix="-7", namespace=restricted)
    made = re.findall(r" created$", done("apply", "--validate=strict", "-k", renamed), flags=re.MULTILINE)
    assert len(made) == len(render(name))
    again = done("apply", "--validate=strict", "-k", renamed)
    # kubectl sees changes in lists of custom resources in which the server has filled in defaults.
    custom = r"^\w+\.[\w.]*(?:x-k8s\.io|kubeflow\.org|volcano\.sh|coreos\.com)/"
    assert [line for line in re.findall(r"^.* configured$", again, re.MULTILINE) if not re.match(custom, line)] == []


@pytest.mark.parametrize("name", TRAINING)
def test_deleting_a_job_keeps_the_storage_and_it_can_be_applied_again(
    name: str, tmp_path: Path, restricted: str
) -> None:
    need(render(name))
    (tmp_path / "job").mkdir()
    storage = overlay(tmp_path, *STORAGE, namespace=restricted)
    job = overlay(tmp_path / "job", name, namespace=restricted)
    done("apply", "-k", storage)
    claims = ("get", "pvc", "--namespace", restricted, "--output=jsonpath={.items[*].metadata.uid}")
    before = done(*claims)
    for _ in range(2):
        done("apply", "-k", job)
        # The finalizers of Jobs wait for a controller, unless their pods are orphaned.
        done("delete", "--cascade=orphan", "-k", job)
    assert done(*claims) == before
    assert len(before.split()) == len(STORAGE)


def test_all_kinds_can_be_in_one_namespace(tmp_path: Path, restricted: str) -> None:
    everything = [thing for kind in KINDS for thing in render(kind)]
    need(everything)
    made: set[tuple[str, str]] = set()
    for kind in KINDS:
        (tmp_path / kind).mkdir(parents=True)
        done("apply", "-k", overlay(tmp_path / kind, kind, namespace=restricted))
        made |= names(render(kind))
    found = json.loads(done("get", "--namespace", restricted, "jobs.batch", "--output=json"))["items"]
    applied = {each["metadata"]["name"] for each in found if "ownerReferences" not in each["metadata"]}
    jobs = {
        each["metadata"]["name"] for each in everything if (each["apiVersion"], each["kind"]) == ("batch/v1", "Job")
    }
    assert applied == jobs


def test_submission_through_torchx(torchx_environment: dict[str, str]) -> None:
    if ("batch.volcano.sh/v1alpha1", "Job") not in served():
        pytest.skip("the cluster does not know Volcano's Job: kubectl apply --server-side -f ../shared/crds")
    arguments = ["run", "-s", "kubernetes", "--workspace=", "-cfg", "queue=default,namespace=default"]
    arguments += [f"{COMPONENTS}:train", "--config", "/opt/mlet/configs/demo.yaml", "--data", "/storage/data"]
    arguments += ["--run", "/storage/runs/x", "-j", "2x1", "--image", "mlet-dist-cpu:0.1.0", "--port", "29500"]
    output = "".join(run_torchx(torchx_environment, *arguments))
    submitted = re.search(r"kubernetes://torchx/default:(mlet-train-\w+)", output)
    assert submitted, output
    try:
        found = kubectl("get", "jobs.batch.volcano.sh", submitted[1], "-o", "jsonpath={.spec.tasks[*].name}")
        assert found.stdout == "train-0 train-1", found.stderr
    finally:
        kubectl("delete", "jobs.batch.volcano.sh", submitted[1])
