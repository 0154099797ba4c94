"""Train on any Kubernetes cluster while pods and ranks are killed, export, verify, and report what failed.

    python -m tests.kubernetes_trial.run_trial --image REGISTRY/mlet-dist-cpu:TAG

The cluster is that of kubectl's current context (KUBECONFIG). It needs two pods of 0.5 cores and 3 GiB at a time, a
default StorageClass, and the image, which on kind `kind load docker-image` puts there. All objects are in a namespace
that is made for the trial and deleted with it.

Two jobs of k8s/cpu train alike: one undisturbed, one whose ranks and pods are killed. Both must end with the same
weights.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

from tests.kubernetes_trial.kubectl import Kubectl, Object, TrialError, end_of, last_result
from tests.kubernetes_trial.trial_jobs import TrialJobs

_JOB_S, _PULL_S, _KILL_S = 1800, 900, 300
_ENDED = sys.maxsize

# Runs in a container that has no ps: kill the first process that torch elastic started as a rank.
_KILL_A_RANK = """
import os, pathlib
for process in pathlib.Path("/proc").glob("[0-9]*"):
    try:
        is_rank = b"\\0LOCAL_RANK=" in b"\\0" + (process / "environ").read_bytes()
    except OSError:
        continue
    if is_rank and int(process.name) not in (1, os.getpid()):
        os.kill(int(process.name), 9)
        break
else:
    raise SystemExit("no rank runs in this pod")
"""


@dataclass
class Report:
    """What each step found, and how long it took."""

    lines: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def step(self, name: str, do: Callable[[], str | None]) -> bool:
        """Do a step, note its result, and return whether it succeeded."""
        started = time.monotonic()
        try:
            found, ok = do() or "", True
        except TrialError as error:
            found, ok = str(error), False
            self.failed.append(name)
        line = (
            f"{'ok    ' if ok else 'FAILED'} {time.monotonic() - started:5.0f} s  {name}{': ' if found else ''}{found}"
        )
        self.lines.append(line)
        print(line, flush=True)
        return ok


class Trial:
    """The steps of the trial, in order; a step that others need ends it if it fails."""

    def __init__(self, kubectl: Kubectl, jobs: TrialJobs, report: Report) -> None:
        self.kubectl, self.jobs, self.report = kubectl, jobs, report

    def run(self) -> None:
        step = self.report.step
        if not step("data: a Job makes the data set", self._data):
            return
        step("input error: a wrong setting fails the Job at once", self._input_error)
        if not step("undisturbed: a Job of two nodes completes", lambda: self._complete("quiet")):
            return
        if not step("killed: a Job of two nodes trains", self._start_killed):
            return
        for name, kill in (
            ("a rank is killed (SIGKILL); no pod ends", self._kill_a_rank),
            ("a pod is deleted", lambda pod: self._delete(pod)),
            ("a pod is deleted by force", lambda pod: self._delete(pod, "--grace-period=0", "--force")),
            ("a pod is evicted, as kubectl drain does", self.kubectl.evict),
            ("the Job is suspended and resumed", self._suspend),
        ):
            if not step(f"killed: {name}", lambda kill=kill: self._survive(kill)):  # type: ignore[misc]
                break
        if step("killed: the Job completes", lambda: self.kubectl.complete(self._killed, _JOB_S)):
            step("killed: the weights are those of the undisturbed Job", self._same_weights)
            step("export: a Job without training exports and verifies", self._export)

    def _data(self) -> None:
        self.kubectl.complete(self.jobs.storage_and_data(), _PULL_S)

    def _input_error(self) -> str:
        job, _ = self.jobs.train("wrong", "data.batch_size=oops")
        state, reason = self.kubectl.job_end(job, _PULL_S)
        if state != "Failed" or not reason.startswith("PodFailurePolicy"):
            raise TrialError(f"expected Failed by PodFailurePolicy, found {state} ({reason})")
        return reason

    def _complete(self, name: str) -> None:
        self.kubectl.complete(self.jobs.train(name)[0], _JOB_S)

    def _start_killed(self) -> None:
        self._killed, self._export_job = self.jobs.train("killed")
        self._next_checkpoint(0, _PULL_S)

    def _checkpoints(self) -> int:
        """Return the step of the newest complete checkpoint, 0 if there is none or no pod answers."""
        script = (
            "import pathlib; print(max([int(''.join(filter(str.isdigit, each.parent.name)) or 0) for each in "
            "pathlib.Path('/storage/runs/killed/checkpoints').glob('*/manifest.json')], default=0))"
        )
        for pod in self.kubectl.pods(self._killed):
            try:
                return int(self.kubectl.run("exec", pod["metadata"]["name"], "--", "python", "-c", script))
            except (TrialError, ValueError):
                continue
        return 0

    def _next_checkpoint(self, before: int, seconds: float) -> int:
        """Wait for a checkpoint of a step after ``before``, or the end of training, and return its step."""

        def found() -> int:
            if self._has_ended():
                return _ENDED
            step = self._checkpoints()
            return step if step > before else 0

        newest: int = self.kubectl.wait(f"a checkpoint after step {before}", seconds, found)
        return newest

    def _survive(self, kill: Callable[[str], None]) -> str:
        """Kill something, wait until both pods run, and then for a checkpoint that was not there before."""
        self.kubectl.wait("two pods that run", _KILL_S, lambda: self._has_ended() or self._two_pods())
        if not (pods := self._two_pods()):
            raise TrialError("the Job has completed; it needs more epochs")
        victim, started = pods[1]["metadata"], time.monotonic()
        kill(str(victim["name"]))
        if kill != self._kill_a_rank:  # a checkpoint may be saved before the pod ends
            self.kubectl.wait(
                "two pods that run", _KILL_S, lambda: self._has_ended() or self._two_pods(without=victim["uid"])
            )
        before = self._checkpoints()
        after = self._next_checkpoint(before, _KILL_S)
        newest = "the end" if after == _ENDED else f"step {after}"
        return f"from step {before} to {newest} in {time.monotonic() - started:.0f} s"

    def _has_ended(self) -> bool:
        """Return whether the Job has completed; raise TrialError if it has failed."""
        end = end_of(self.kubectl.get("job", self._killed))
        if end and end[0] == "Failed":
            raise TrialError(f"the Job failed: {end[1]}")
        return end is not None

    def _two_pods(self, without: str = "") -> list[Object]:
        """Return the pods if two run, of which none has this uid; else none."""
        pods = self.kubectl.pods(self._killed)
        return pods if len(pods) == 2 and without not in [each["metadata"]["uid"] for each in pods] else []

    def _kill_a_rank(self, pod: str) -> None:
        before = {each["metadata"]["uid"] for each in self.kubectl.pods(self._killed)}
        self.kubectl.run("exec", pod, "--", "python", "-c", _KILL_A_RANK)
        time.sleep(10 * self.kubectl.poll_s)
        if {each["metadata"]["uid"] for each in self.kubectl.pods(self._killed)} != before:
            raise TrialError("a pod ended; the ranks should have restarted in their pods")

    def _delete(self, pod: str, *options: str) -> None:
        self.kubectl.run("delete", "pod", pod, "--wait=false", *options)

    def _suspend(self, _: str) -> None:
        self.kubectl.suspend(self._killed, suspended=True)
        self.kubectl.wait("the end of all pods", _KILL_S, lambda: not self.kubectl.pods(self._killed, ending=True))
        self.kubectl.suspend(self._killed, suspended=False)

    def _same_weights(self) -> str:
        logs = [self.kubectl.logs(job) for job in ("mlet-train-cpu-quiet", self._killed)]
        quiet, killed = (str(last_result(each, "weights_sha256")["weights_sha256"]) for each in logs)
        if quiet != killed:
            raise TrialError(f"{killed[:12]}, undisturbed {quiet[:12]}")
        return killed[:12]

    def _export(self) -> str:
        self.kubectl.suspend(self._export_job, suspended=False)
        self.kubectl.complete(self._export_job, _PULL_S)
        verified = last_result(self.kubectl.logs(self._export_job), "export")["export"]
        if not verified["ok"]:
            raise TrialError(f"verify found differences: {verified}")
        return "verified"


def main(arguments: list[str] | None = None) -> int:
    """Run the trial; return 0 if all steps succeeded, 1 if one failed, 2 if there is no cluster."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", required=True, help="the image of the target `cpu` of the Dockerfile")
    parser.add_argument("--keep", action="store_true", help="keep the namespace, to look at what is left")
    parser.add_argument("--kubectl", default="kubectl", help="(default: %(default)s)")
    parser.add_argument("--poll", type=float, default=2.0, metavar="SECONDS", help="(default: %(default)s)")
    args = parser.parse_args(arguments)
    kubectl = Kubectl(f"mlet-trial-{uuid4().hex[:8]}", args.poll, args.kubectl)
    try:
        version = kubectl.version()
    except TrialError as error:
        print(f"cluster-test: no cluster answers, nothing was tested: {error}", file=sys.stderr)
        print("cluster-test: set KUBECONFIG, or make a cluster: kind create cluster", file=sys.stderr)
        return 2
    print(f"Kubernetes {version}, image {args.image}, namespace {kubectl.namespace}", flush=True)
    report = Report()
    if report.step("namespace: created", lambda: kubectl.run("create", "namespace", kubectl.namespace).strip()):
        try:
            with tempfile.TemporaryDirectory() as folder:
                Trial(kubectl, TrialJobs(kubectl, args.image, Path(folder)), report).run()
        finally:
            if args.keep:
                print(f"kept: kubectl delete jobs --all --namespace {kubectl.namespace}, then")
                print(f"      kubectl delete namespace {kubectl.namespace}")
            else:
                report.step("namespace: deleted", kubectl.delete_namespace)
    print(f"\n{len(report.lines) - len(report.failed)} of {len(report.lines)} steps succeeded")
    for name in report.failed:
        print(f"failed: {name}")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
