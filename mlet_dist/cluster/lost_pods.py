"""Lets the Job controller of Kubernetes replace a pod of `k8s/job` after 10 s, however often that pod has been lost.

    python -m mlet_dist.cluster.lost_pods

The controller waits 10·2^k s before it replaces a pod, at most 600 s, where k is the sum of two numbers in annotations
of that pod: how many pods of its index failed before, and how many were lost, such as by an eviction. Removing the
second annotation from a pod that has just started begins that count anew, as `kubectl annotate POD ANNOTATION-` does.
The other one counts against ``backoffLimitPerIndex`` and is left alone.

It runs in an init container, which alone is given a token (`k8s/job/replacement.yaml`), and imports the standard
library only.
"""

import http.client
import json
import os
import signal
import ssl
import sys
import time
from collections.abc import Mapping
from pathlib import Path

ANNOTATION = "batch.kubernetes.io/job-index-ignored-failure-count"
SECRETS = Path("/var/run/secrets/mlet")
_ATTEMPTS, _TIMEOUT_S, _PAUSE_S = 3, 3.0, 1.0


class Refused(Exception):
    """The API server did not do what it was asked; the message says why."""


def begin_anew(environment: Mapping[str, str], secrets: Path = SECRETS, pause_s: float = _PAUSE_S) -> str:
    """Remove the annotation that counts lost pods from the pod of this process, and return a line that says so.

    Args:
        environment: ``LOST_PODS`` is the annotation's value, ``POD_NAME`` and ``POD_NAMESPACE`` name the pod, and
            Kubernetes sets ``KUBERNETES_SERVICE_HOST`` and ``KUBERNETES_SERVICE_PORT``.
        secrets: a directory with ``token`` and ``ca.crt``.
        pause_s: seconds between two of three attempts.

    Returns:
        An empty string if no pod of this index has been lost. A failure is no error, since it costs time only if this
        pod is lost as well: the line then says what follows from it.
    """
    lost = environment.get("LOST_PODS", "")
    if not lost:
        return ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(pause_s)
        try:
            _remove(environment, secrets)
        except (OSError, http.client.HTTPException, KeyError, Refused) as error:
            reason = f"{type(error).__name__}: {error}" if not isinstance(error, Refused) else str(error)
        else:
            return f"pods of this index that were lost before: {lost}; the Job controller does not count them any more"
    return (
        f"pods of this index that were lost before: {lost}; the Job controller goes on counting them, because the "
        f"annotation {ANNOTATION} could not be removed ({reason}). If this pod is lost, too, it is replaced later; "
        "docs/clusters/job.md says what to do"
    )


def _remove(environment: Mapping[str, str], secrets: Path) -> None:
    host, port = environment["KUBERNETES_SERVICE_HOST"], int(environment["KUBERNETES_SERVICE_PORT"])
    path = f"/api/v1/namespaces/{environment['POD_NAMESPACE']}/pods/{environment['POD_NAME']}"
    trusted = ssl.create_default_context(cafile=str(secrets / "ca.crt"))
    connection = http.client.HTTPSConnection(host, port, timeout=_TIMEOUT_S, context=trusted)
    headers = {
        "Authorization": f"Bearer {(secrets / 'token').read_text().strip()}",
        "Content-Type": "application/merge-patch+json",
    }
    try:
        connection.request("PATCH", path, json.dumps({"metadata": {"annotations": {ANNOTATION: None}}}), headers)
        answer = connection.getresponse()
        text = answer.read(100_000).decode(errors="replace")
    finally:
        connection.close()
    if answer.status != http.HTTPStatus.OK:
        raise Refused(f"{answer.status} {answer.reason}: {_message(text)}")


def _message(text: str) -> str:
    """Return the message of the API server's answer, in one line."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    message = found.get("message") if isinstance(found, dict) else None
    return " ".join(str(message or text).split())[:300]


def main() -> None:
    """Print the line of ``begin_anew``; the exit code is 0 whatever happened: training does not depend on it."""
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))  # the first process of a container has no default handler
    if line := begin_anew(os.environ):
        print(f"mlet: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
