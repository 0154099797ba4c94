"""What watches jobs fits them: ports, labels, and the metrics that a dashboard shows."""

import json
import re
import socket
from pathlib import Path

import pytest
from prometheus_client import generate_latest

from mlet_dist.cli.main import parse
from mlet_dist.config.config_file import load_config
from mlet_dist.training.metrics_endpoint import MetricsEndpoint
from tests.conftest import TrainedRun
from tests.helpers.kubernetes_schemas import check, templates
from tests.helpers.mlet_command import ROOT
from tests.helpers.rendered_manifests import (
    K8S,
    KINDS,
    needs_kubectl,
    of_kind,
    overlay,
    render,
    training_command,
    training_container,
    training_pod,
)

_PORT = 9400


@needs_kubectl
@pytest.mark.parametrize("kind", KINDS)
def test_node_0_of_every_kind_serves_metrics(kind: str, tmp_path: Path) -> None:
    name = overlay(tmp_path, kind, components=["metrics"])
    for thing in render(name):
        check(thing)
    (configuration,) = of_kind(name, "ConfigMap")
    (tmp_path / "config.yaml").write_text(configuration["data"]["config.yaml"])
    config = load_config(tmp_path / "config.yaml", training_command(name).overrides)
    assert config.train.metrics_port == _PORT
    ports = {port["name"]: port["containerPort"] for port in training_container(name)["ports"]}
    assert ports["metrics"] == _PORT
    labels = training_pod(name)[0]["template"]["metadata"]
    assert labels["annotations"]["prometheus.io/scrape"] == "true"
    assert labels["annotations"]["prometheus.io/port"] == str(_PORT)
    (policy,) = (each for each in of_kind(name, "NetworkPolicy") if each["metadata"]["name"] == "mlet-metrics")
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels["labels"].items()
    (rule,) = policy["spec"]["ingress"]
    assert [port["port"] for port in rule["ports"]] == [_PORT]
    for thing in render(name):  # an export completes a run of the same settings only
        for _, template in templates(thing):
            for container in template["spec"]["containers"]:
                arguments = container.get("args", [])
                if arguments[:1] == ["train"]:
                    parsed = parse([re.sub(r"\$\(.*\)", "1", each) for each in arguments])
                    assert f"train.metrics_port={_PORT}" in parsed.overrides


@needs_kubectl
def test_what_watches_jobs_finds_their_pods() -> None:
    (monitor,) = of_kind("monitoring", "PodMonitor")
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    assert wanted <= training_pod("job")[0]["template"]["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert endpoint["port"] == "metrics"
    (claim,) = (
        volume["persistentVolumeClaim"]["claimName"]
        for thing in of_kind("monitoring", "Deployment")
        for volume in thing["spec"]["template"]["spec"]["volumes"]
        if "persistentVolumeClaim" in volume
    )
    assert claim == of_kind("storage", "PersistentVolumeClaim")[0]["metadata"]["name"]


def test_the_dashboard_shows_metrics_that_exist(trained: TrainedRun) -> None:
    dashboard = json.loads((K8S / "monitoring" / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    shown = {name for each in expressions for name in re.findall(r"mlet_\w+", each)}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    endpoint = MetricsEndpoint(port, "run", 1, 0, 0)
    try:
        for line in (trained.path / "metrics.jsonl").read_text().splitlines():
            record = json.loads(line)
            endpoint.record(record.pop("split"), record.pop("step"), record)
        endpoint.record("compression", 1, {"moves": 1, "kept_C1": 1.0})  # of runs with adaptive compression
        found = set(re.findall(r"^(mlet_\w+)", generate_latest(endpoint.registry).decode(), re.MULTILINE))
    finally:
        endpoint.close()
    assert shown <= found
    assert len(shown) > 15
    assert [panel["id"] for panel in dashboard["panels"]] == list(range(1, len(dashboard["panels"]) + 1))


def test_the_image_contains_what_metrics_and_tensorboard_need() -> None:
    lines = (ROOT / "Dockerfile").read_text()
    assert "[cuda,metrics]" in lines
    assert "[cpu,metrics]" in lines
