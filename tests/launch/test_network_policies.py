"""Who connects to whom: an evaluation of the NetworkPolicies, as a network plugin makes it."""

import ipaddress
from pathlib import Path

import pytest

from tests.helpers.kubernetes_schemas import Object, check, templates
from tests.helpers.rendered_manifests import KINDS, TRAINING, needs_kubectl, of_kind, overlay, render, training_pod

pytestmark = needs_kubectl

STRANGER = {"app": "scanner"}


def matches(selector: Object, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(each["key"]) in each["values"] for each in selector.get("matchExpressions", [])
    )


def allowed(policies: list[Object], pod: dict[str, str], way: str, other: dict[str, str] | str, port: int) -> bool:
    """Return whether a pod with these labels may be reached by (Ingress) or reach (Egress) the other end.

    Args:
        policies: all of the pod's namespace.
        pod: its labels.
        way: Ingress or Egress.
        other: the labels of a pod in the same namespace; an address; or "namespace/NAME", for any pod there.
        port: of TCP, where the connection ends.
    """
    chosen = [each["spec"] for each in policies if matches(each["spec"]["podSelector"], pod)]
    chosen = [each for each in chosen if way in each["policyTypes"]]
    if not chosen:
        return True

    def is_peer(peer: Object) -> bool:
        if "ipBlock" in peer:
            if isinstance(other, dict) or other.startswith("namespace/"):
                return False
            address = ipaddress.ip_address(other)
            blocks = [ipaddress.ip_network(each) for each in peer["ipBlock"].get("except", [])]
            return address in ipaddress.ip_network(peer["ipBlock"]["cidr"]) and not any(
                address in each for each in blocks
            )
        if "namespaceSelector" in peer:
            name = other.removeprefix("namespace/") if isinstance(other, str) else "here"
            return matches(peer["namespaceSelector"], {"kubernetes.io/metadata.name": name})
        return isinstance(other, dict) and matches(peer["podSelector"], other)

    for rule in (rule for each in chosen for rule in each[way.lower()]):
        ports = [each["port"] for each in rule.get("ports", []) if each["protocol"] == "TCP"]
        peers = rule["from" if way == "Ingress" else "to"]
        if (not rule.get("ports") or port in ports) and any(map(is_peer, peers)):
            return True
    return False


def labels_of(name: str) -> dict[str, str]:
    labels: dict[str, str] = training_pod(name)[0]["template"]["metadata"]["labels"]
    return labels


@pytest.mark.parametrize("name", TRAINING)
def test_only_nodes_of_training_jobs_reach_a_node(name: str) -> None:
    policies, node = of_kind(name, "NetworkPolicy"), labels_of(name)
    for port in (29500, 29400, 41234):  # of node 0, and any that gloo and NCCL choose
        assert allowed(policies, node, "Ingress", node, port)
        assert not allowed(policies, node, "Ingress", STRANGER, port)
        assert not allowed(policies, node, "Ingress", "namespace/other", port)
        assert not allowed(policies, node, "Ingress", "10.0.0.7", port)


@pytest.mark.parametrize("name", KINDS)
def test_nodes_reach_only_one_another_and_dns_with_the_component_egress(name: str, tmp_path: Path) -> None:
    restricted = overlay(tmp_path, name, components=["egress"])
    policies, node = of_kind(restricted, "NetworkPolicy"), labels_of(restricted)
    for policy in policies:
        check(policy)
    for pod in (node, {"app.kubernetes.io/name": "mlet-export"}):
        assert allowed(policies, pod, "Egress", node, 41234)
        assert allowed(policies, pod, "Egress", "namespace/kube-system", 53)
        assert allowed(policies, pod, "Egress", "169.254.20.10", 53)
        assert not allowed(policies, pod, "Egress", "namespace/kube-system", 443)
        assert not allowed(policies, pod, "Egress", STRANGER, 443)
        assert not allowed(policies, pod, "Egress", "52.216.0.1", 443)
        assert not allowed(policies, pod, "Egress", "169.254.169.254", 80)


@pytest.mark.parametrize("name", KINDS)
def test_an_object_store_is_reached_with_its_component(name: str, tmp_path: Path) -> None:
    restricted = overlay(tmp_path, name, components=["object-store", "egress", "object-store-egress"])
    policies, node = of_kind(restricted, "NetworkPolicy"), labels_of(restricted)
    assert allowed(policies, node, "Egress", "52.216.0.1", 443)
    assert not allowed(policies, node, "Egress", "52.216.0.1", 80)
    assert not allowed(policies, node, "Egress", "10.96.0.1", 443), "the cluster's API server"
    assert allowed(policies, node, "Egress", node, 41234)


@pytest.mark.parametrize("name", [*TRAINING, "cpu/data"])
def test_no_proxy_is_injected(name: str) -> None:
    for thing in render(name):
        for _, template in templates(thing):
            assert template["metadata"]["labels"]["sidecar.istio.io/inject"] == "false"
