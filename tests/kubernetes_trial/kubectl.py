"""Calls kubectl in one namespace of the cluster that the environment names, and reads its answers."""

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Object = dict[str, Any]


class TrialError(Exception):
    """A step of the trial did not do what it should; the message says what was found."""


@dataclass(frozen=True)
class Kubectl:
    """kubectl with a namespace.

    Attributes:
        namespace: of all objects of the trial.
        poll_s: seconds between two questions about the same object.
        executable: kubectl, or a program that takes its place in tests.
    """

    namespace: str
    poll_s: float = 2.0
    executable: str = "kubectl"

    def run(self, *arguments: str, timeout: float = 120, stdin: str | None = None) -> str:
        """Return what kubectl prints; raise TrialError with its error."""
        words = [self.executable, "--namespace", self.namespace, *arguments]
        try:
            done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=timeout, check=False)
        except FileNotFoundError:
            raise TrialError(f"{self.executable} is not installed") from None
        except subprocess.TimeoutExpired:
            raise TrialError(f"kubectl {' '.join(arguments[:3])} took more than {timeout:.0f} s") from None
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise TrialError(f"kubectl {' '.join(arguments[:3])}: {lines[-1]}")
        return done.stdout

    def get(self, *arguments: str) -> Object:
        found: Object = json.loads(self.run("get", *arguments, "--output=json"))
        return found

    def version(self) -> str:
        """Return the version of the server; raise TrialError if there is none."""
        found = json.loads(self.run("version", "--output=json", "--request-timeout=10s", timeout=30))
        if "serverVersion" not in found:
            raise TrialError("kubectl version names no server")
        return str(found["serverVersion"]["gitVersion"])

    def pods(self, job: str, *, ending: bool = False) -> list[Object]:
        """Return the pods of a Job that run, by their index; with ``ending`` also those that are being deleted."""
        found = self.get("pods", f"--selector=batch.kubernetes.io/job-name={job}")["items"]
        return sorted(
            (pod for pod in found if pod["status"].get("phase") == "Running" and (ending or not _is_deleted(pod))),
            key=lambda pod: str(pod["metadata"]["name"]),
        )

    def evict(self, pod: str) -> None:
        """Evict a pod as `kubectl drain` does, but none beside it."""
        about = {"name": pod, "namespace": self.namespace}
        eviction = json.dumps({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": about})
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}/eviction"
        self.run("create", f"--raw={path}", "--filename=-", stdin=eviction)

    def delete_namespace(self) -> None:
        """Delete the Jobs, then the namespace, of which it does not wait for the end.

        Since Kubernetes 1.33 a namespace deletes its pods before its Jobs. A Job with ``backoffLimitPerIndex`` keeps a
        failed pod until it has created another one, which that namespace refuses, so that neither would be deleted.
        """
        self.run("delete", "jobs", "--all", "--wait=false")
        self.run("delete", "namespace", self.namespace, "--wait=false")

    def suspend(self, job: str, *, suspended: bool) -> None:
        self.run("patch", "job", job, "--patch", json.dumps({"spec": {"suspend": suspended}}))

    def logs(self, job: str) -> list[str]:
        """Return the log of each pod of a Job, also of those that have ended."""
        pods = self.get("pods", f"--selector=batch.kubernetes.io/job-name={job}")["items"]
        return [self.run("logs", pod["metadata"]["name"]) for pod in pods]

    def wait(self, what: str, seconds: float, found: Callable[[], Any]) -> Any:
        """Return the first true result of ``found``; raise TrialError if there is none within this time."""
        deadline = time.monotonic() + seconds
        while not (result := found()):
            if time.monotonic() > deadline:
                raise TrialError(f"{what}: not within {seconds:.0f} s")
            time.sleep(self.poll_s)
        return result

    def job_end(self, job: str, seconds: float) -> tuple[str, str]:
        """Wait until a Job has completed or failed, and return "Complete" or "Failed" with the reason."""
        end: tuple[str, str] = self.wait(f"the end of job/{job}", seconds, lambda: end_of(self.get("job", job)))
        return end

    def complete(self, job: str, seconds: float) -> None:
        """Wait until a Job has completed; raise TrialError if it fails, with its last lines."""
        state, reason = self.job_end(job, seconds)
        if state != "Complete":
            last = [line for log in self.logs(job) for line in log.strip().splitlines()[-2:]]
            raise TrialError(f"job/{job} failed: {reason}" + "".join(f"\n    {line}" for line in last))


def end_of(job: Object) -> tuple[str, str] | None:
    """Return how a Job ended, "Complete" or "Failed", and why; None if it has not."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return condition["type"], f"{condition.get('reason', '')}: {condition.get('message', '')}".strip(": ")
    return None


def last_result(logs: list[str], key: str) -> Object:
    """Return the last line of the logs that is a JSON object with this key; raise TrialError if there is none."""
    for line in reversed([line for log in logs for line in log.splitlines()]):
        try:
            found = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(found, dict) and key in found:
            return found
    raise TrialError(f"no pod printed a result with {key}")


def _is_deleted(pod: Object) -> bool:
    return "deletionTimestamp" in pod["metadata"]
