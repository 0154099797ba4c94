"""Validate objects as an API server would: core types strictly, custom ones by their CustomResourceDefinitions."""

import copy
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

CRDS = Path(__file__).parents[3] / "shared" / "crds"
VERSION, NEWEST_VERSION = "1.33", "1.36"  # the second one for k8s/prompt-replacement, which needs it
Object = dict[str, Any]

# The values that servers accept for fields whose schemas do not list them, wherever the field occurs.
ENUMS = {
    "accessModes": {"ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod"},
    "clusterIP": {"None"},
    "completionMode": {"Indexed", "NonIndexed"},
    "drop": {"ALL"},
    "fsGroupChangePolicy": {"OnRootMismatch", "Always"},
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "medium": {"", "Memory", "HugePages"},
    "podReplacementPolicy": {"Failed", "TerminatingOrFailed"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "restartPolicy": {"Never", "OnFailure"},
}
JOB_FAILURE_REASONS = {
    "BackoffLimitExceeded",
    "DeadlineExceeded",
    "FailedIndexes",
    "MaxFailedIndexesExceeded",
    "PodFailurePolicy",
}
_CORE = ("v1", "batch", "policy", "apps", "networking.k8s.io", "rbac.authorization.k8s.io")
VOLCANO_ACTIONS = {"AbortJob", "RestartJob", "RestartTask", "TerminateJob", "CompleteJob", "ResumeJob"}
RULE_ACTIONS = {"FailJob", "FailIndex", "Ignore", "Count"}


def check(thing: Object) -> None:
    """Raise an error if a server would reject the object, as far as that can be found without a server."""
    if thing["apiVersion"].partition("/")[0] in _CORE:
        kubernetes_validate.validate(thing, VERSION, strict=True)
    elif thing["apiVersion"].startswith("admissionregistration.k8s.io/"):
        kubernetes_validate.validate(thing, NEWEST_VERSION, strict=True)
    elif thing["kind"] != "PodMonitor":  # of which tests have no schema
        jsonschema.Draft202012Validator(_schema(thing["apiVersion"], thing["kind"])).validate(thing)
    for path, template in templates(thing):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod", **template.get("metadata", {})}}
        kubernetes_validate.validate(pod | {"spec": template["spec"]}, VERSION, strict=True), path
    for key, value in fields(thing):
        for each in value if isinstance(value, list) else [value]:
            if key in ENUMS and isinstance(each, str):
                assert each in ENUMS[key], f"{key}: {each}"
        if key == "podFailurePolicy":
            for rule in value["rules"]:
                assert rule["action"] in RULE_ACTIONS
                assert rule.get("onExitCodes", {"operator": "In"})["operator"] in ("In", "NotIn")
                assert 0 not in rule.get("onExitCodes", {}).get("values", [])
                assert ("onExitCodes" in rule) != ("onPodConditions" in rule)
                codes = rule.get("onExitCodes", {}).get("values", [])
                assert codes == sorted(set(codes)), "exit codes must be in order, each once"
    for _, job in jobs(thing):
        if "backoffLimitPerIndex" in job:
            assert job["completionMode"] == "Indexed"
            assert job["template"]["spec"]["restartPolicy"] == "Never"
            assert job.get("maxFailedIndexes", 0) <= job["completions"]
        else:
            assert "maxFailedIndexes" not in job
            assert "FailIndex" not in [rule["action"] for rule in job.get("podFailurePolicy", {}).get("rules", [])]
    if thing["apiVersion"].startswith("batch.volcano.sh/"):
        for policy in [each for key, value in fields(thing) if key == "policies" for each in value]:
            assert len({"event", "events", "exitCode"} & policy.keys()) == 1
            assert policy.get("exitCode", 1) != 0
            assert policy["action"] in VOLCANO_ACTIONS
        assert thing["spec"].get("minAvailable", 0) <= sum(task["replicas"] for task in thing["spec"]["tasks"])
    for policy in [value for key, value in fields(thing) if key == "failurePolicy" and isinstance(value, dict)]:
        for rule in policy["rules"]:
            assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
            assert JOB_FAILURE_REASONS >= set(rule.get("onJobFailureReasons", []))


def fields(thing: Any) -> Iterator[tuple[str, Any]]:
    """Yield all keys with their values, at any depth."""
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield key, value
            yield from fields(value)
    elif isinstance(thing, list):
        for each in thing:
            yield from fields(each)


def jobs(thing: Object) -> Iterator[tuple[str, Object]]:
    """Yield the name and spec of every Job that an object is or creates."""
    match thing["kind"], thing["apiVersion"].partition("/")[0]:
        case "Job", "batch":
            yield thing["metadata"]["name"], thing["spec"]
        case "JobSet", _:
            for each in thing["spec"]["replicatedJobs"]:
                yield each["name"], each["template"]["spec"]
        case (("TrainingRuntime" | "ClusterTrainingRuntime"), _):
            for each in thing["spec"]["template"]["spec"]["replicatedJobs"]:
                yield each["name"], each["template"]["spec"]
        case "Job", "batch.volcano.sh":
            for each in thing["spec"]["tasks"]:
                yield each["name"], each


def templates(thing: Object) -> Iterator[tuple[str, Object]]:
    """Yield the name and template of every kind of pod that an object creates."""
    for name, job in jobs(thing):
        yield name, job["template"]
    if thing["kind"] == "Deployment":
        yield thing["metadata"]["name"], thing["spec"]["template"]


@cache
def _schema(api_version: str, kind: str) -> Object:
    if not CRDS.exists():
        pytest.skip("there are no CustomResourceDefinitions in ../shared/crds")
    group, _, version = api_version.partition("/")
    for file in sorted(CRDS.glob("*.yaml")):
        for crd in yaml.safe_load_all(file.read_text()):
            if crd["spec"]["group"] == group and crd["spec"]["names"]["kind"] == kind:
                (found,) = [each for each in crd["spec"]["versions"] if each["name"] == version and each["served"]]
                strict: Object = _strict(copy.deepcopy(found["schema"]["openAPIV3Schema"]))
                strict["properties"]["metadata"] = {"type": "object"}
                return strict
    raise AssertionError(f"no CustomResourceDefinition of {api_version} {kind}")


def _strict(schema: Any) -> Any:
    """Return a CRD's schema as a JSON schema in which an unknown key, which a server would drop, is an error."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    schema = {
        key: {name: _strict(each) for name, each in value.items()} if key == "properties" else _strict(value)
        for key, value in schema.items()
    }
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema
