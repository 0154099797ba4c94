"""What Kubernetes does with pods that end: the rules of Jobs and JobSets for mlet's exit codes, and for lost pods."""

import re
from pathlib import Path

import pytest

from benchmarks.job_backoff import MOST_S
from mlet_dist.cluster import lost_pods
from tests.helpers.kubernetes_schemas import Object
from tests.helpers.rendered_manifests import TRAINING, needs_kubectl, of_kind, training_command, training_pod

pytestmark = needs_kubectl

JOB_SETS = [name for name in TRAINING if {"jobset", "trainjob", "spot"} & set(name.split("/"))]
VOLCANO = ["volcano/job"]
JOBS = [name for name in TRAINING if name not in (*JOB_SETS, *VOLCANO)]


def action(job: Object, container: str, code: int, disrupted: bool) -> tuple[str, str]:
    """Return what the Job controller does with a pod that failed, and its message if it fails the Job."""
    for index, rule in enumerate(job["podFailurePolicy"]["rules"]):
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container
            matches = code in rule["onExitCodes"]["values"]
            cause = f"Container {container} for pod space/pod failed with exit code {code}"
        else:
            matches = disrupted and {"type": "DisruptionTarget", "status": "True"} in rule["onPodConditions"]
            cause = "Pod space/pod has condition DisruptionTarget"
        if matches:
            return rule["action"], f"{cause} matching {rule['action']} rule at index {index}"
    return "Count", ""


def failure_policy(name: str) -> Object:
    """Return the failure policy of the JobSet, which a TrainingRuntime holds for the JobSets of its TrainJobs."""
    found: list[Object] = [thing["spec"]["failurePolicy"] for thing in of_kind(name, "JobSet")]
    found += [thing["spec"]["template"]["spec"]["failurePolicy"] for thing in of_kind(name, "TrainingRuntime")]
    (policy,) = found
    return policy


def job_set_action(policy: Object, replicated_job: str, reason: str, message: str) -> str:
    """Return what JobSet does when a Job has failed: the first rule that matches, else a restart that counts."""
    for rule in policy["rules"]:
        if (
            replicated_job in rule.get("targetReplicatedJobs", [replicated_job])
            and reason in rule.get("onJobFailureReasons", [reason])
            and any(re.search(pattern, message) for pattern in rule.get("onJobFailureMessagePatterns", [""]))
        ):
            return str(rule["action"])
    return "RestartJobSet"


@pytest.mark.parametrize("name", TRAINING)
def test_ranks_restart_in_their_pods(name: str) -> None:
    parsed = training_command(name)
    elastic = ":" in parsed.nnodes  # torch elastic restarts the ranks of such a job
    assert (parsed.max_restarts >= 1) is not elastic
    job, pod = training_pod(name)
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy requires this
    if name not in VOLCANO:
        assert job["podReplacementPolicy"] == "Failed"


@pytest.mark.parametrize("name", JOBS)
def test_a_job_waits_for_the_failures_of_one_index_only(name: str) -> None:
    """`backoffLimit` delays new pods by the failures of all nodes, see benchmarks/job_backoff.py."""
    job, _ = training_pod(name)
    assert "backoffLimit" not in job
    assert job["backoffLimitPerIndex"] >= 1
    assert job["maxFailedIndexes"] == 0, "the other nodes would wait for a node that does not come again"
    assert training_command(name).wait > MOST_S, "the others would end before the Job replaces a pod"


@pytest.mark.parametrize("name", JOBS)
def test_a_job_counts_crashes_alone_and_fails_on_input_errors(name: str) -> None:
    job, pod = training_pod(name)
    (container,) = pod["containers"]
    found = {code: action(job, container["name"], code, disrupted=False)[0] for code in (1, 2, 69, 75, 137)}
    assert found == {1: "Count", 2: "FailJob", 69: "Ignore", 75: "Ignore", 137: "Count"}
    assert {action(job, container["name"], code, disrupted=True)[0] for code in (1, 75, 137, 143)} == {"Ignore"}


@pytest.mark.parametrize("name", JOBS)
def test_a_lost_pod_of_a_job_is_replaced_as_soon_as_the_first(name: str) -> None:
    """The init container removes what the controller computes a longer wait from; tests/cluster/test_lost_pods.py."""
    _, pod = training_pod(name)
    (container,) = pod["initContainers"]
    assert container["command"] == ["python", "-m", lost_pods.__name__]
    given = {each["name"]: each["valueFrom"]["fieldRef"]["fieldPath"] for each in container["env"]}
    assert given == {
        "LOST_PODS": f"metadata.annotations['{lost_pods.ANNOTATION}']",
        "POD_NAME": "metadata.name",
        "POD_NAMESPACE": "metadata.namespace",
    }
    (mount,) = container["volumeMounts"]
    (volume,) = [each for each in pod["volumes"] if each["name"] == mount["name"]]
    assert Path(mount["mountPath"]) == lost_pods.SECRETS
    token, certificate = volume["projected"]["sources"]
    assert token["serviceAccountToken"]["path"] == "token"
    assert certificate["configMap"]["items"] == [{"key": "ca.crt", "path": "ca.crt"}]


@pytest.mark.parametrize("name", JOB_SETS)
def test_a_job_set_restarts_at_once_and_counts_crashes_alone(name: str) -> None:
    job, pod = training_pod(name)
    assert job["backoffLimit"] == 0, "the Job itself would replace pods, after a wait that grows"
    (container,) = pod["containers"]
    policy = failure_policy(name)
    replicated_job = "node" if of_kind(name, "TrainingRuntime") else "train"

    def found(code: int, disrupted: bool) -> str:
        taken, message = action(job, container["name"], code, disrupted)
        assert taken in ("FailJob", "Count")  # with a backoffLimit of 0, one failure fails the Job
        reason = "PodFailurePolicy" if taken == "FailJob" else "BackoffLimitExceeded"
        return job_set_action(policy, replicated_job, reason, message)

    assert {code: found(code, disrupted=False) for code in (1, 2, 69, 75, 137)} == {
        1: "RestartJobSet",
        2: "FailJobSet",
        69: "RestartJobSetAndIgnoreMaxRestarts",
        75: "RestartJobSetAndIgnoreMaxRestarts",
        137: "RestartJobSet",
    }
    assert {found(code, disrupted=True) for code in (1, 75, 137, 143)} == {"RestartJobSetAndIgnoreMaxRestarts"}
    assert policy["maxRestarts"] >= 1


def test_the_export_of_a_jobset_waits_for_training() -> None:
    (job_set,) = of_kind("jobset", "JobSet")
    train, export = job_set["spec"]["replicatedJobs"]
    assert export["dependsOn"] == [{"name": train["name"], "status": "Complete"}]
    for reason in ("BackoffLimitExceeded", "PodFailurePolicy"):
        message = "matching FailJob rule at index 1"
        assert job_set_action(job_set["spec"]["failurePolicy"], export["name"], reason, message) == "FailJobSet"


@pytest.mark.parametrize("name", VOLCANO)
def test_volcano_restarts_all_nodes_but_stops_at_an_input_error(name: str) -> None:
    (job,) = (thing for thing in of_kind(name, "Job") if thing["apiVersion"].startswith("batch.volcano.sh/"))

    def found(event: str, code: int) -> str:
        for policy in job["spec"]["policies"]:  # the first that matches, as Volcano's controller takes
            if event in policy.get("events", []) or policy.get("exitCode") == code:
                return str(policy["action"])
        return ""

    assert {code: found("PodFailed", code) for code in (1, 2, 69, 75)} == {
        1: "RestartJob", 2: "AbortJob", 69: "RestartJob", 75: "RestartJob",
    }  # fmt: skip
    assert found("PodEvicted", 75) == "RestartJob"
    assert job["spec"]["maxRetry"] >= 100, "lost pods count, too"
