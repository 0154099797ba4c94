"""A real Kubernetes API server accepts every manifest, and a submission through TorchX.

These tests run if KUBECONFIG is set. All objects are submitted as a dry run, except one Volcano Job, which is deleted.
"""

import os
import re
import shutil
import subprocess

import pytest

from tests.helpers.rendered_manifests import K8S, RENDERED, render
from tests.helpers.torchx_cli import COMPONENTS, run_torchx

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif("KUBECONFIG" not in os.environ, reason="KUBECONFIG is not set"),
    pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed"),
]


def kubectl(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["kubectl", *arguments], capture_output=True, text=True, timeout=60, check=False)


def need(*definitions: str) -> None:
    """Skip the test if the cluster does not have these custom resources."""
    for definition in definitions:
        if kubectl("get", "crd", definition).returncode:
            pytest.skip(f"the cluster has no {definition}: kubectl apply --server-side -f ../shared/crds")


@pytest.mark.parametrize("name", RENDERED)
def test_server_accepts_every_manifest(name: str) -> None:
    groups = ("jobset.x-k8s.io", "scheduling.volcano.sh", "batch.volcano.sh", "trainer.kubeflow.org")
    used = [(thing["kind"], thing["apiVersion"].partition("/")[0]) for thing in render(name)]
    need(*sorted({f"{kind.lower()}s.{group}" for kind, group in used if group in groups}))
    done = kubectl("apply", "--dry-run=server", "--validate=strict", "-k", str(K8S / name))
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"\(server dry run\)$", done.stdout, flags=re.MULTILINE)) == len(render(name))


def test_submission_through_torchx(torchx_environment: dict[str, str]) -> None:
    need("jobs.batch.volcano.sh")
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
