"""Every kustomization of k8s/ renders to objects that a cluster accepts, with commands that mlet understands."""

import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from mlet_dist.cluster.nodes import parse_node_count
from mlet_dist.config.config_file import load_config
from tests.helpers.kubernetes_schemas import Object, check, fields, templates
from tests.helpers.rendered_manifests import (
    K8S,
    KINDS,
    RENDERED,
    TRAINING,
    needs_kubectl,
    node_count,
    of_kind,
    overlay,
    render,
    training_command,
    training_container,
    training_pod,
)

pytestmark = needs_kubectl


@pytest.mark.parametrize("name", RENDERED)
def test_schemas(name: str) -> None:
    things = render(name)
    assert things
    for thing in things:
        check(thing)


@pytest.mark.parametrize("name", RENDERED)
def test_selectors_match_pods_and_ports_are_open(name: str) -> None:
    pods = [template for thing in render(name) for _, template in templates(thing)]
    for service in of_kind(name, "Service"):
        chosen = [pod for pod in pods if service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()]
        assert chosen
        for pod in chosen:
            open_ports = {port["containerPort"] for each in pod["spec"]["containers"] for port in each["ports"]}
            assert {port["port"] for port in service["spec"]["ports"]} <= open_ports


@pytest.mark.parametrize("name", TRAINING)
def test_training_command(name: str, tmp_path: Path) -> None:
    container, nodes = training_container(name), node_count(name)
    parsed = training_command(name)
    smallest, largest = parse_node_count(parsed.nnodes)
    assert (parsed.name, parsed.config, parsed.once, largest, parsed.node_rank) == (
        "train",
        "/config/config.yaml",
        True,
        nodes,
        1,
    )
    assert parsed.nproc == int(container["resources"]["limits"].get("nvidia.com/gpu", 1))
    if not of_kind(name, "TrainJob"):
        assert {port["containerPort"] for port in container["ports"]} == {parsed.master_port}
    (configuration,) = of_kind(name, "ConfigMap")
    (tmp_path / "config.yaml").write_text(configuration["data"]["config.yaml"])
    config = load_config(tmp_path / "config.yaml", parsed.overrides)
    for number in range(smallest, largest + 1):
        config.check_world_size(number * parsed.nproc)
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"/storage", "/config", "/dev/shm", "/tmp"}
    for place in (config.run.dir, config.data.path, config.train.checkpoint_dir or "/storage/"):
        assert str(place).startswith(("/storage/", "s3://"))


@pytest.mark.parametrize("name", TRAINING)
def test_a_pod_has_time_to_save(name: str) -> None:
    assert_time_to_save(name)
    (shm,) = [volume for volume in training_pod(name)[1]["volumes"] if volume["name"] == "shm"]
    assert shm["emptyDir"]["medium"] == "Memory"


def assert_time_to_save(name: str) -> None:
    """Assert that a pod outlives its ranks, and these a checkpoint."""
    job, pod = training_pod(name)
    environment = {each["name"]: each.get("value") for each in training_container(name)["env"]}
    to_checkpoint = int(job["template"]["metadata"]["annotations"]["mlet/seconds-to-checkpoint"])
    shutdown = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert pod["terminationGracePeriodSeconds"] > shutdown > to_checkpoint > 0


@pytest.mark.parametrize("name", RENDERED)
def test_no_privileges(name: str) -> None:
    for thing in render(name):
        assert not {"privileged", "hostNetwork", "hostPath", "hostIPC", "hostPID"} & {key for key, _ in fields(thing)}
        for _, template in templates(thing):
            spec = template["spec"]
            assert spec["securityContext"]["runAsNonRoot"]
            assert spec["securityContext"]["runAsUser"] > 0
            assert spec["securityContext"]["seccompProfile"]["type"] == "RuntimeDefault"
            assert spec["automountServiceAccountToken"] is False
            for container in (*spec.get("initContainers", []), *spec["containers"]):
                own = container["securityContext"]
                assert own["readOnlyRootFilesystem"]
                assert own["allowPrivilegeEscalation"] is False
                assert own["capabilities"] == {"drop": ["ALL"]}
                if thing["kind"] != "TrainingRuntime":  # the TrainJob has the resources
                    assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
                    assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("name", RENDERED)
def test_only_an_init_container_has_a_token_and_it_may_patch_pods_alone(name: str) -> None:
    """Whoever connects to a port of a node can run code in its training container."""
    for thing in render(name):
        for _, template in templates(thing):
            spec = template["spec"]
            tokens = {each["name"] for each in spec["volumes"] if "serviceAccountToken" in str(each)}
            for container in spec["containers"]:
                assert not tokens & {mount["name"] for mount in container["volumeMounts"]}
            assert len(tokens) == ("serviceAccountName" in spec) == len(spec.get("initContainers", []))
    for role in of_kind(name, "Role"):
        assert role["rules"] == [{"apiGroups": [""], "resources": ["pods"], "verbs": ["patch"]}]
    assert not of_kind(name, "ClusterRole")


@pytest.mark.parametrize("name", [*RENDERED, "volcano/job with efa", "trainjob with infiniband"])
def test_quantities_are_text_as_servers_return_them(name: str, tmp_path: Path) -> None:
    """Servers make text of numbers, so that applying the same again would seem to change the object."""
    kind, _, component = name.partition(" with ")
    for thing in render(overlay(tmp_path, kind, components=[component]) if component else kind):
        for key, value in fields(thing):
            if key in ("requests", "limits", "capability") and isinstance(value, dict):
                assert {type(each) for each in value.values()} <= {str}


@pytest.mark.parametrize("name", ["jobset", "kueue/jobset", "spot"])
def test_a_job_set_has_what_its_webhook_would_set_in_lists(name: str) -> None:
    """`kubectl apply` of the same manifest would take it out of the lists again, which JobSet refuses as a change."""
    (job_set,) = of_kind(name, "JobSet")
    for each in job_set["spec"]["replicatedJobs"]:
        assert each["template"]["spec"]["completionMode"] == "Indexed"
        assert "restartPolicy" in each["template"]["spec"]["template"]["spec"]
    assert all("name" in rule for rule in job_set["spec"]["failurePolicy"]["rules"])


def test_training_pods_of_all_kinds_are_equal() -> None:
    def comparable(name: str) -> Object:
        job, pod = training_pod(name)
        (container,) = pod["containers"]
        own = {"name", "args", "command", "ports", "resources", "env"}
        environment = [each for each in container["env"] if not each["name"].startswith(("JOB", "NODES"))]
        volumes = [volume for volume in pod["volumes"] if volume["name"] not in ("config", "token")]  # its own
        own_fields = ("containers", "initContainers", "serviceAccountName", "subdomain", "volumes")
        return {
            "pod": {key: value for key, value in pod.items() if key not in own_fields},
            "volumes": volumes,
            "container": {key: value for key, value in container.items() if key not in own} | {"env": environment},
            "metadata": job["template"]["metadata"],
        }

    def arguments(name: str) -> list[str]:
        words = training_container(name)["args"]
        return [word for word in words if not word.startswith(("--n", "--master"))]

    for name in KINDS:
        assert comparable(name) == comparable("job")
        assert arguments(name) == arguments("job")
        assert training_container(name)["resources"] == training_container("job")["resources"]


@pytest.mark.parametrize("name", TRAINING)
def test_a_running_job_keeps_its_config(name: str) -> None:
    """The name of a ConfigMap contains a digest of its data, so that another config is another ConfigMap."""
    (configuration,) = of_kind(name, "ConfigMap")
    assert re.fullmatch(r"mlet-config(-\w+)?-\w{10}", configuration["metadata"]["name"])


@pytest.mark.parametrize("kind", KINDS)
def test_an_object_store_reaches_every_command(kind: str, tmp_path: Path) -> None:
    name = overlay(tmp_path, kind, components=["object-store"])
    commands, secrets = [], []
    for thing in render(name):
        check(thing)
        for _, template in templates(thing):
            for container in template["spec"]["containers"]:
                secrets.append(container["envFrom"][0]["secretRef"]["name"])
                commands += [container["args"]] if "args" in container else []
        if thing["kind"] == "TrainJob":
            commands.append(thing["spec"]["trainer"]["args"])
    assert len(commands) == len(secrets) == 2  # training and export
    for arguments in commands:
        assert arguments[-2:] == [
            "data.path=s3://BUCKET/data",
            "train.checkpoint_dir=s3://BUCKET/checkpoints/mlet-train",
        ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("component", "resource"), [("efa", "vpc.amazonaws.com/efa"), ("infiniband", "rdma/rdma_shared_device_a")]
)
def test_networks_reach_every_kind(kind: str, component: str, resource: str, tmp_path: Path) -> None:
    name = overlay(tmp_path, kind, components=[component])
    for thing in render(name):
        check(thing)
    container = training_container(name)
    resources = container["resources"]
    assert resources["limits"][resource] == resources["requests"][resource]
    environment = [each["name"] for each in container["env"]]
    assert "NCCL_SOCKET_IFNAME" in environment
    assert len(environment) == len(set(environment))
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" in environment


@pytest.mark.parametrize("name", RENDERED)
def test_nothing_keeps_machines_from_being_drained(name: str) -> None:
    assert of_kind(name, "PodDisruptionBudget") == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_against_drains_can_be_added(kind: str, tmp_path: Path) -> None:
    name = overlay(tmp_path, kind, components=["disruption-budget"])
    (budget,) = of_kind(name, "PodDisruptionBudget")
    check(budget)
    wanted = budget["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= training_pod(name)[0]["template"]["metadata"]["labels"].items()
    assert budget["spec"]["minAvailable"] > 1000 * node_count(name)  # of all jobs with that label


@pytest.mark.parametrize("kind", KINDS)
def test_a_placement_can_be_added(kind: str, tmp_path: Path) -> None:
    name = overlay(tmp_path, kind, components=["placement"])
    for thing in render(name):
        check(thing)
    job, pod = training_pod(name)
    assert {"nodeSelector", "priorityClassName", "imagePullSecrets", "affinity"} <= pod.keys()
    (near,) = pod["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    wanted = near["podAffinityTerm"]["labelSelector"]["matchLabels"]
    assert wanted.items() <= job["template"]["metadata"]["labels"].items()


@pytest.mark.parametrize("kind", KINDS)
def test_spot_machines_have_time_to_save(kind: str, tmp_path: Path) -> None:
    name = overlay(tmp_path, kind, components=["spot"])
    for thing in render(name):
        check(thing)
    assert_time_to_save(name)
    _, pod = training_pod(name)
    assert pod["terminationGracePeriodSeconds"] <= 25  # the shortest notice of the three clouds
    taints = {each["key"] for each in pod["tolerations"]}
    assert {"nvidia.com/gpu", "kubernetes.azure.com/scalesetpriority", "cloud.google.com/gke-spot"} == taints
    assert training_command(name).overrides == ["train.checkpoint_minutes=3"]


@pytest.mark.parametrize("kind", KINDS)
def test_components_do_not_disturb_one_another(kind: str, tmp_path: Path) -> None:
    components = sorted(path.parent.name for path in (K8S / "components").rglob("kustomization.yaml"))
    if kind == "volcano/job":
        components.remove("kueue")
    name = overlay(tmp_path, kind, components=components)
    for thing in render(name):
        check(thing)
    assert_time_to_save(name)
    limits = training_container(name)["resources"]["limits"]
    assert {"vpc.amazonaws.com/efa", "rdma/rdma_shared_device_a", "ephemeral-storage", "cpu"} <= limits.keys()
    assert "train.checkpoint_minutes=3" in training_command(name).overrides


@pytest.mark.parametrize("kind", KINDS)
def test_one_image_is_set_everywhere(kind: str, tmp_path: Path) -> None:
    images = [{"name": "mlet-dist", "newName": "elsewhere/mine", "newTag": "7"}]
    name = overlay(tmp_path, kind, images=images)
    found = {value for thing in render(name) for key, value in fields(thing) if key == "image"}
    assert found - {"mlet-dist-cpu:0.1.0"} == {"elsewhere/mine:7"}


@pytest.mark.parametrize(
    ("break_job", "error"),
    [
        (lambda job: job["spec"].update(paralelism=3), kubernetes_validate.ValidationError),
        (lambda job: job["spec"]["template"]["spec"].update(restartPolicy="Sometimes"), AssertionError),
        (lambda job: job["spec"]["podFailurePolicy"]["rules"][0].update(action="Fail"), AssertionError),
        (lambda job: job["spec"].update(completions="two"), kubernetes_validate.ValidationError),
    ],
)
def test_the_checks_find_errors(break_job: Any, error: type[Exception]) -> None:
    (job,) = yaml.safe_load_all(yaml.safe_dump(of_kind("job", "Job")[0]))
    check(job)
    break_job(job)
    with pytest.raises(error):
        check(job)


def test_the_checks_of_custom_resources_find_errors() -> None:
    (job_set,) = yaml.safe_load_all(yaml.safe_dump(of_kind("jobset", "JobSet")[0]))
    check(job_set)
    job_set["spec"]["replicatedJobs"][1]["dependsOn"][0]["status"] = "Completed"
    with pytest.raises(jsonschema.ValidationError, match="Completed"):
        check(job_set)
    job_set["spec"]["replicatedJobs"][1]["dependsOn"][0]["status"] = "Complete"
    job_set["spec"]["replicatedJobs"][0]["replica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="replica"):
        check(job_set)
