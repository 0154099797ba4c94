"""Each way to start all nodes of a job or none."""

from copy import deepcopy
from typing import Any

import pytest

from tests.helpers.kubernetes_schemas import Object
from tests.helpers.rendered_manifests import (
    needs_kubectl,
    node_count,
    of_kind,
    render,
    training_container,
    training_pod,
)  # fmt: skip

pytestmark = needs_kubectl


def volcano_jobs(name: str) -> list[Object]:
    return [thing for thing in of_kind(name, "Job") if thing["apiVersion"].startswith("batch.volcano.sh/")]


def without(thing: Any, *keys: str) -> Any:
    """Return an object without these keys, at any depth."""
    if isinstance(thing, dict):
        return {key: without(value, *keys) for key, value in thing.items() if key not in keys}
    return [without(each, *keys) for each in thing] if isinstance(thing, list) else thing


def test_a_volcano_job_starts_when_all_nodes_fit() -> None:
    (job,) = volcano_jobs("volcano/job")
    assert job["spec"]["minAvailable"] == node_count("volcano/job")
    assert job["spec"]["schedulerName"] == "volcano"
    assert {"env", "svc"} <= job["spec"]["plugins"].keys()
    assert "--publish-not-ready-addresses" in job["spec"]["plugins"]["svc"]


def test_a_pod_group_holds_all_nodes_of_a_job() -> None:
    (group,) = of_kind("volcano/podgroup", "PodGroup")
    job, pod = training_pod("volcano/podgroup")
    assert group["spec"]["minMember"] == node_count("volcano/podgroup")
    assert job["template"]["metadata"]["annotations"]["scheduling.k8s.io/group-name"] == group["metadata"]["name"]
    assert pod["schedulerName"] == "volcano"
    rest = [thing for thing in render("volcano/podgroup") if thing["kind"] != "PodGroup"]
    own = ("schedulerName", "scheduling.k8s.io/group-name")
    assert without(rest, *own) == without(render("job"), *own)


def test_kubeflow_trainer_makes_the_pod_group() -> None:
    (runtime,) = of_kind("volcano/trainjob", "TrainingRuntime")
    assert runtime["spec"]["podGroupPolicy"] == {"volcano": {}}
    assert training_pod("volcano/trainjob")[1]["schedulerName"] == "volcano"
    rest = deepcopy(render("volcano/trainjob"))
    for thing in rest:
        if thing["kind"] == "TrainingRuntime":
            assert list(thing["spec"]["template"].pop("metadata")) == ["annotations"]
    own = ("schedulerName", "podGroupPolicy")
    assert without(rest, *own) == without(render("trainjob"), *own)


def test_jobs_of_volcano_are_in_its_queue() -> None:
    (queue,) = of_kind("volcano", "Queue")
    (job,) = volcano_jobs("volcano/job")
    (group,) = of_kind("volcano/podgroup", "PodGroup")
    (runtime,) = of_kind("volcano/trainjob", "TrainingRuntime")
    annotations = runtime["spec"]["template"]["metadata"]["annotations"]  # of which Trainer takes the PodGroup's queue
    asked = [job["spec"]["queue"], group["spec"]["queue"], annotations["scheduling.volcano.sh/queue-name"]]
    assert asked == [queue["metadata"]["name"]] * 3
    needed = training_container("volcano/job")["resources"]["requests"]
    assert int(queue["spec"]["capability"]["nvidia.com/gpu"]) >= int(needed["nvidia.com/gpu"]) * node_count(
        "volcano/job"
    )


@pytest.mark.parametrize("kind", ["job", "jobset", "trainjob"])
def test_kueue_only_adds_its_label_and_not_to_the_export(kind: str) -> None:
    label = "kueue.x-k8s.io/queue-name"
    found = [thing for thing in render(f"kueue/{kind}") if label in thing["metadata"].get("labels", {})]
    assert [thing["kind"].lower() for thing in found] == [kind]
    assert found[0]["metadata"]["labels"].get("app.kubernetes.io/name") != "mlet-export"
    assert without(render(f"kueue/{kind}"), label) == without(render(kind), label)
