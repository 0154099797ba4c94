"""The kustomizations of k8s/, rendered as `kubectl apply -k` would submit them, and what the tests look up in them."""

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
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
STORAGE = [name for name in RENDERED if Path(name).name == "storage"]
WITHOUT_PODS = ["prompt-replacement", "volcano", *STORAGE]
TRAINING = [name for name in RENDERED if name not in ("cpu/data", "monitoring", *WITHOUT_PODS)]
KINDS = ["job", "jobset", "trainjob", "volcano/job"]  # the others are made of these
KUBECTL = shutil.which("kubectl")
COMMAND = ["env", "--block-signal=TERM", "--block-signal=USR1", "mlet"]
"""Signals that arrive before mlet handles them are kept for it: the first process of a container would lose them."""

needs_kubectl = pytest.mark.skipif(KUBECTL is None, reason="kubectl, which renders the manifests, is not installed")


@cache
def render(name: str) -> list[Object]:
    done = subprocess.run([str(KUBECTL), "kustomize", str(K8S / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [thing for thing in yaml.safe_load_all(done.stdout) if thing is not None]


def overlay(folder: Path, *kinds: str, components: Sequence[str] = (), **more: Any) -> str:
    """Write a kustomization on top of each k8s/KIND, with components, into ``folder``, and return its name."""
    kustomization = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization", **more}
    kustomization["resources"] = [os.path.relpath(K8S / kind, folder) for kind in kinds]
    kustomization["components"] = [os.path.relpath(K8S / "components" / each, folder) for each in components]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return str(folder)


def of_kind(name: str, kind: str) -> list[Object]:
    return [thing for thing in render(name) if thing["kind"] == kind]


def training_pod(name: str) -> tuple[Object, Object]:
    """Return the spec of the training Job, and of its pod."""
    found = [
        job
        for thing in render(name)
        for _, job in jobs(thing)
        if job["template"]["metadata"]["labels"]["app.kubernetes.io/name"] == "mlet-train"
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
    if "replicas" in job:  # a task of Volcano
        return int(job["replicas"])
    assert job["parallelism"] == job["completions"]
    return int(job["parallelism"])


def names(things: list[Object]) -> set[tuple[str, str]]:
    """Return kind and name of each object."""
    return {(thing["kind"], thing["metadata"]["name"]) for thing in things}


def command(container: Object, thing: Object) -> Any:
    """Parse a container's command as mlet does, with the variables that Kubernetes substitutes.

    Args:
        container: of a pod that ``thing`` creates, for node 1 of 2.
        thing: a Job, JobSet, TrainingRuntime or TrainJob.
    """
    own = thing["metadata"]["name"]
    labels = {"batch.kubernetes.io/job-name": own, "jobset.sigs.k8s.io/jobset-name": own, "volcano.sh/job-name": own}
    known = {"JOB_COMPLETION_INDEX": "1", "VC_TASK_INDEX": "1"}
    if thing["kind"] == "TrainJob":
        known |= {"PET_NPROC_PER_NODE": "8", "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_PORT": "29400"}
        known |= {"PET_MASTER_ADDR": f"{own}-node-0-0.{own}"}
    for variable in container.get("env", []):
        if "value" in variable:
            known[variable["name"]] = variable["value"]
        else:
            (label,) = re.findall(r"metadata\.labels\['(.+)'\]", variable["valueFrom"]["fieldRef"]["fieldPath"])
            known[variable["name"]] = labels[label]
    assert container["command"] == COMMAND
    return parse([re.sub(r"\$\((\w+)\)", lambda match: known[match[1]], word) for word in container["args"]])


def training_command(name: str) -> Any:
    """Parse the command of the second node of a job."""
    things = [thing for thing in render(name) if thing["kind"] in ("Job", "JobSet", "TrainJob")]
    (thing,) = [each for each in things if each["metadata"]["labels"]["app.kubernetes.io/name"] != "mlet-export"]
    return command(training_container(name), thing)
