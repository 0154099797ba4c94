"""The kustomizations of k8s/, rendered as `kubectl apply -k` would submit them, and what the tests look up in them."""

import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlet_dist.cli.main import parse
from tests.helpers.kubernetes_schemas import Object, jobs
from tests.helpers.mlet_command import ROOT

K8S = ROOT / "k8s"
RENDERED = sorted(
    str(path.parent.relative_to(K8S))
    for path in K8S.rglob("kustomization.yaml")
    if path.relative_to(K8S).parts[0] not in ("base", "components")
)
TRAINING = [name for name in RENDERED if name not in ("volcano", "cpu/data")]
KUBECTL = shutil.which("kubectl")

needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl, which renders the manifests, is not installed")


@cache
def render(name: str) -> list[Object]:
    done = subprocess.run([str(KUBECTL), "kustomize", str(K8S / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [thing for thing in yaml.safe_load_all(done.stdout) if thing is not None]


def overlay(folder: Path, kind: str, **more: Any) -> str:
    """Write a kustomization on top of k8s/KIND into ``folder``, and return its name."""
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **more}
    kustomization["resources"] = [os.path.relpath(K8S / kind, folder)]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return str(folder)


def of_kind(name: str, kind: str) -> list[Object]:
    return [thing for thing in render(name) if thing["kind"] == kind]


def training_pod(name: str) -> tuple[Object, Object]:
    """Return the spec of the training Job, and of its pod."""
    found = [
        job for thing in render(name) for job_name, job in jobs(thing) if job_name in ("mlet-train", "train", "node")
    ]
    (job,) = found
    return job, job["template"]["spec"]


def training_container(name: str) -> Object:
    """Return the container that trains, with the fields of a TrainJob that replace those of its runtime."""
    container = dict(training_pod(name)[1]["containers"][0])
    for train_job in of_kind(name, "TrainJob"):
        trainer = train_job["spec"]["trainer"]
        container |= {"image": trainer["image"], "command": trainer["command"], "args": trainer["args"]}
        container["resources"] = trainer["resourcesPerNode"]
        container["env"] = [*container["env"], *trainer.get("env", [])]
    return container


def node_count(name: str) -> int:
    for train_job in of_kind(name, "TrainJob"):
        return int(train_job["spec"]["trainer"]["numNodes"])
    job = training_pod(name)[0]
    assert job["parallelism"] == job["completions"]
    return int(job["parallelism"])


def command(container: Object) -> Any:
    """Parse a container's command as mlet does, with the variables that Kubernetes substitutes."""
    known = {"JOB_COMPLETION_INDEX": "1", "JOB_NAME": "mlet-train"}
    known |= {"PET_NPROC_PER_NODE": "8", "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_PORT": "29400"}
    known |= {"PET_MASTER_ADDR": "mlet-train-node-0-0.mlet-train"}
    own = {each["name"] for each in container.get("env", [])}

    def fill(match: re.Match[str]) -> str:
        assert match[1] in own | (known.keys() - {"JOB_NAME"}), match[0]
        return known[match[1]]

    assert container["command"] == ["mlet"]
    return parse([re.sub(r"\$\((\w+)\)", fill, word) for word in container["args"]])
