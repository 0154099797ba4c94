"""Pods are admitted by strict quotas and limit ranges, by the rules of Kubernetes's admission plugins.

A ResourceQuota refuses pods with a container that does not set what it limits. A LimitRange gives a container that has
no limit its default, which must not be below the request, and refuses ratios of limit to request above its own.
"""

from pathlib import Path

import pytest

from tests.helpers.kubernetes_schemas import Object, check, templates
from tests.helpers.quantities import quantity
from tests.helpers.rendered_manifests import (
    RENDERED,
    WITHOUT_PODS,
    needs_kubectl,
    of_kind,
    overlay,
    render,
    training_container,
)

pytestmark = needs_kubectl

WITH_PODS = [name for name in RENDERED if name not in WITHOUT_PODS]
QUOTA = [f"{kind}.{what}" for kind in ("requests", "limits") for what in ("cpu", "memory", "ephemeral-storage")]
DEFAULT_LIMITS = {"cpu": "1", "memory": "2Gi", "ephemeral-storage": "1Gi"}  # small, as administrators choose them


def resources(name: str) -> list[Object]:
    """Return the resources of every container that is started."""
    found = [thing["spec"]["trainer"]["resourcesPerNode"] for thing in of_kind(name, "TrainJob")]
    for thing in render(name):
        if thing["kind"] != "TrainingRuntime":  # the TrainJob has the resources
            for _, pod in templates(thing):
                containers = (*pod["spec"].get("initContainers", []), *pod["spec"]["containers"])
                found += [each["resources"] for each in containers]
    return found


def refusals(container: Object, quota: list[str], default_limits: dict[str, str], ratio: float) -> list[str]:
    """Return why a namespace with this quota, and a limit range with these defaults and ratio, refuses a container."""
    requests, limits = container.get("requests", {}), default_limits | container.get("limits", {})
    requests = limits | requests
    found = []
    for entry in quota:
        kind, _, what = entry.partition(".")
        if what not in (requests if kind == "requests" else limits):
            found.append(f"must specify {entry}")
    for what, limit in limits.items():
        if quantity(requests[what]) > quantity(limit):
            found.append(f"{what}: the request must be less than or equal to the limit")
        elif quantity(limit) > ratio * quantity(requests[what]):
            found.append(f"{what}: max limit to request ratio is {ratio}")
    return found


@pytest.mark.parametrize("name", WITH_PODS)
def test_memory_and_gpus_have_limits_that_are_their_requests(name: str) -> None:
    for container in resources(name):
        assert {"cpu", "memory"} <= container["requests"].keys()
        for what, limit in container["limits"].items():
            assert container["requests"][what] == limit
        assert refusals(container, ["requests.cpu", "requests.memory", "limits.memory"], {}, ratio=1) == []


@pytest.mark.parametrize("name", WITH_PODS)
def test_strict_namespaces_take_the_pods_with_the_component_quota(name: str, tmp_path: Path) -> None:
    strict = overlay(tmp_path, name, components=["quota"])
    for thing in render(strict):
        check(thing)
    assert len(resources(strict)) == len(resources(name)) >= 1
    for container in resources(strict):
        assert refusals(container, QUOTA, {}, ratio=1) == []
        assert refusals(container, QUOTA, DEFAULT_LIMITS, ratio=1) == []


def test_the_rules_refuse_what_lacks_limits() -> None:
    container = training_container("job")["resources"]
    assert "must specify limits.cpu" in refusals(container, QUOTA, {}, ratio=1)
    assert "cpu: the request must be less than or equal to the limit" in refusals(
        container, [], DEFAULT_LIMITS, ratio=1
    )
    container = {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"cpu": "1", "memory": "1Gi"}}
    assert refusals(container, [], {}, ratio=1) == ["cpu: max limit to request ratio is 1"]
