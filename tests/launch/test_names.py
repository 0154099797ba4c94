"""Names of objects that refer to one another follow a prefix, a suffix and a namespace; two jobs do not collide."""

from pathlib import Path

import pytest

from tests.helpers.kubernetes_schemas import Object, templates
from tests.helpers.rendered_manifests import (
    K8S,
    KINDS,
    RENDERED,
    STORAGE,
    TRAINING,
    names,
    needs_kubectl,
    of_kind,
    overlay,
    render,
    training_command,
    training_pod,
)  # fmt: skip

pytestmark = needs_kubectl

RENAMED = {"namePrefix": "team-", "nameSuffix": "-7", "namespace": "elsewhere"}


def stores() -> set[tuple[str, str]]:
    """Return the claims that the kustomizations of storage make."""
    return {each for name in STORAGE for each in names(render(name)) if each[0] == "PersistentVolumeClaim"}


def unresolved(things: list[Object], given: set[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return kind and name of what the objects refer to that is neither among them nor given."""
    wanted = []
    for thing in things:
        for _, template in templates(thing):
            pod = template["spec"]
            for volume in pod["volumes"]:
                wanted += [("ConfigMap", volume["configMap"]["name"])] if "configMap" in volume else []
                claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                wanted += [("PersistentVolumeClaim", claim)] if claim else []
            wanted += [("Service", pod["subdomain"])] if "subdomain" in pod else []
            wanted += [("ServiceAccount", pod["serviceAccountName"])] if "serviceAccountName" in pod else []
            group = template["metadata"].get("annotations", {}).get("scheduling.k8s.io/group-name")
            wanted += [("PodGroup", group)] if group else []
        if thing["kind"] == "TrainJob":
            wanted.append((thing["spec"]["runtimeRef"]["kind"], thing["spec"]["runtimeRef"]["name"]))
        if thing["kind"] == "RoleBinding":
            wanted.append((thing["roleRef"]["kind"], thing["roleRef"]["name"]))
            wanted += [(each["kind"], each["name"]) for each in thing["subjects"]]
        if thing["kind"] == "MutatingAdmissionPolicyBinding":
            wanted.append(("MutatingAdmissionPolicy", thing["spec"]["policyName"]))
    return [each for each in wanted if each not in names(things) | given]


def assert_node_0_is_found(name: str) -> None:
    """Assert that --master-addr is the name that DNS gives to the pod of the first node."""
    host, _, domain = training_command(name).master_addr.partition(".")
    for thing in render(name):
        own = thing["metadata"]["name"]
        match thing["kind"], thing["apiVersion"].partition("/")[0]:
            case "Service", _:
                (job,) = [
                    each["metadata"]["name"]
                    for each in of_kind(name, "Job")
                    if each["spec"]["template"]["spec"].get("subdomain") == own
                ]
                assert (host, domain) == (f"{job}-0", own)
                assert training_pod(name)[1]["subdomain"] == own
            case "JobSet", _:
                assert "subdomain" not in thing["spec"]["network"]  # it is the name of the JobSet then
                assert (host, domain) == (f"{own}-train-0-0", own)
            case "Job", "batch.volcano.sh":
                assert [task["name"] for task in thing["spec"]["tasks"]] == ["node"]
                assert (host, domain) == (f"{own}-node-0", own)


@pytest.mark.parametrize("name", RENDERED)
def test_references_lead_to_the_rendered_objects_or_the_storage(name: str) -> None:
    things = render(name)
    assert len(names(things)) == len(things)
    assert unresolved(things, stores()) == []
    if name in TRAINING:
        assert_node_0_is_found(name)


@pytest.mark.parametrize("name", RENDERED)
def test_references_follow_a_prefix_a_suffix_and_a_namespace(name: str, tmp_path: Path) -> None:
    renamed = overlay(tmp_path, name, **RENAMED)
    things = render(renamed)
    before = sorted(f"team-{each['metadata']['name']}-7" for each in render(name) if each["kind"] != "ConfigMap")
    assert sorted(each["metadata"]["name"] for each in things if each["kind"] != "ConfigMap") == before
    for thing in things:
        if thing["kind"] not in (
            "Queue",
            "MutatingAdmissionPolicy",
            "MutatingAdmissionPolicyBinding",
        ):  # of the cluster
            assert thing["metadata"]["namespace"] == "elsewhere"
    # The storage is not among these objects, and keeps the name by which they know it.
    assert unresolved(things, stores()) == []
    if name in TRAINING:
        assert_node_0_is_found(renamed)


@pytest.mark.parametrize("name", [name for name in TRAINING if not name.startswith("cpu")])
def test_references_follow_the_storage_if_it_is_renamed_with_the_job(name: str, tmp_path: Path) -> None:
    renamed = overlay(tmp_path, name, "storage", **RENAMED)
    assert ("PersistentVolumeClaim", "team-mlet-storage-7") in names(render(renamed))
    assert unresolved(render(renamed), set()) == []


def test_jobs_of_all_kinds_can_be_in_one_namespace() -> None:
    """Also with what their controllers make: a TrainJob a JobSet of its name, a JobSet Jobs and a Service."""
    found: list[tuple[str, str]] = []
    for name in ("storage", *KINDS, "cpu/storage", "cpu/data", "cpu"):
        found += names(render(name))
        for thing in render(name):
            own = thing["metadata"]["name"]
            if thing["kind"] == "JobSet":
                found += [("Job", f"{own}-{each['name']}-0") for each in thing["spec"]["replicatedJobs"]]
                found.append(("Service", own))
            if thing["apiVersion"].startswith("batch.volcano.sh/"):
                found.append(("Service", own))
            if thing["kind"] == "TrainJob":
                found += [("JobSet", own), ("Job", f"{own}-node-0"), ("Service", own)]
    assert sorted(set(found)) == sorted(found)


@pytest.mark.parametrize("name", [name for name in RENDERED if name not in STORAGE])
def test_deleting_a_job_keeps_the_storage(name: str) -> None:
    assert of_kind(name, "PersistentVolumeClaim") == []


@pytest.mark.parametrize("name", STORAGE)
def test_storage_is_kept_by_those_who_delete_what_their_source_lacks(name: str) -> None:
    (claim,) = render(name)
    annotations = claim["metadata"]["annotations"]
    assert annotations["argocd.argoproj.io/sync-options"] == "Prune=false,Delete=false"
    assert annotations["kustomize.toolkit.fluxcd.io/prune"] == "disabled"


@pytest.mark.parametrize("name", TRAINING)
def test_finished_jobs_are_deleted_after_a_week(name: str) -> None:
    """Except those of a TrainJob, which would create its JobSet again."""
    for thing in render(name):
        if thing["kind"] in ("Job", "JobSet"):
            assert thing["spec"]["ttlSecondsAfterFinished"] == 7 * 24 * 3600
        if thing["kind"] == "TrainingRuntime":
            assert "ttlSecondsAfterFinished" not in thing["spec"]["template"]["spec"]


def test_every_kustomization_is_rendered() -> None:
    assert {str(path.parent.relative_to(K8S)) for path in K8S.rglob("kustomization.yaml")} == {
        *RENDERED,
        *(str(path.parent.relative_to(K8S)) for path in (K8S / "base").rglob("kustomization.yaml")),
        *(str(path.parent.relative_to(K8S)) for path in (K8S / "components").rglob("kustomization.yaml")),
    }
