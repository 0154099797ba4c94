"""What pods request fits the machines that the documentation names, less what their kubelets and daemons need."""

import re

import pytest

from launch import resources
from tests.helpers.allocatable_nodes import NODES, Node
from tests.helpers.mlet_command import ROOT
from tests.helpers.quantities import quantity
from tests.helpers.rendered_manifests import TRAINING, needs_kubectl, training_container, training_pod

ON_GPUS = [name for name in TRAINING if name.split("/")[0] != "cpu"]
WITH = {gpu: [node for node in NODES if node.gpu == gpu] for gpu in ("A100", "H100", "H200")}


def named(node: Node) -> str:
    return node.name


def test_what_is_left_of_a_machine_is_what_the_clouds_publish() -> None:
    left = {node.name: (round(node.cpu, 2), round(node.memory_gib)) for node in NODES}
    assert left["AWS p4d.24xlarge"] == (95.69, 1109)
    assert left["Azure ND96asr_v4"] == (94.6, 847)
    assert left["Google a2-highgpu-8g"] == (95.69, 639)


@needs_kubectl
@pytest.mark.parametrize("node", NODES, ids=named)
@pytest.mark.parametrize("name", ON_GPUS)
def test_a_training_pod_fits(name: str, node: Node) -> None:
    requests = training_container(name)["resources"]["requests"]
    assert quantity(requests["nvidia.com/gpu"]) == 8
    assert quantity(requests["cpu"]) <= node.free_cpu
    assert quantity(requests["memory"]) <= node.free_gib * 2**30


@needs_kubectl
@pytest.mark.parametrize("name", ON_GPUS)
def test_a_training_pod_tolerates_the_taint_of_gpu_nodes(name: str) -> None:
    tolerations = training_pod(name)[1]["tolerations"]
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in tolerations


@pytest.mark.parametrize("node", NODES, ids=named)
def test_a_named_resource_fits_every_machine_with_its_gpus(node: Node) -> None:
    resource = {"A100": resources.a100x8, "H100": resources.h100x8, "H200": resources.h200x8}[node.gpu]()
    one = resources.gpu()
    for each, times in ((resource, 1), (one, 8)):
        assert each.gpu * times == 8
        assert each.cpu * times <= node.free_cpu
        assert each.memMB * times <= node.free_gib * 1024
        assert each.cpu * times >= 0.7 * min(other.free_cpu for other in WITH[node.gpu]), "wastes cores"


def test_the_documentation_names_the_machines() -> None:
    pages = "\n".join(page.read_text() for page in (ROOT / "docs").glob("**/*.md"))
    for node in NODES:
        assert re.search(rf"`{re.escape(node.name.partition(' ')[2])}`", pages), node.name
