"""Takes the place of kubectl in tests of the trial: a cluster of JSON in the file that FAKE_CLUSTER names.

    FAKE_CLUSTER=state.json python -m tests.helpers.fake_kubectl --namespace N get job J --output=json

It renders kustomizations with the real kubectl, and keeps their Jobs. A Job whose claim exists ends when it has been
asked for often enough; the state's `faults` say what goes wrong.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

State = dict[str, Any]
_UNTIL_END, _AT_MOST = 3, 40  # questions about a Job before it ends, and about one that waits to be killed


class Refused(Exception):
    """What kubectl would print to stderr."""


def answer(state: State, words: list[str]) -> str:
    """Change the state as the command does, and return what kubectl would print."""
    command, *rest = [word for word in words if not word.startswith("--") or word == "--"]
    match command, rest:
        case "version", _:
            if "no cluster" in state["faults"]:
                raise Refused(
                    "The connection to the server localhost:8080 was refused - did you specify the right host or port?"
                )
            return json.dumps({"clientVersion": {}, "serverVersion": {"gitVersion": "v1.36.0"}})
        case "create", ["namespace", name]:
            state["namespaces"].append(name)
            return f"namespace/{name} created"
        case "delete", ["jobs"]:
            assert "--all" in words
            state["deleted_jobs"], state["jobs"], state["pods"] = state["jobs"], {}, {}
            return ""
        case "delete", ["namespace", name]:
            if not state["jobs"]:  # a Job whose pods the namespace deletes keeps both for ever
                state["namespaces"].remove(name)
            return f"namespace/{name} deleted"
        case "apply", [folder]:
            return _apply(state, folder)
        case "patch", ["job", name, patch]:
            if state["jobs"][name]["spec"].get("suspend") and "train" in name:  # resumed, with other pods
                state["kills"] += 1
                state["pods"][name] = [_pod(state, pod["metadata"]["name"]) for pod in state["pods"][name]]
            state["jobs"][name]["spec"] |= json.loads(patch)["spec"]
            return ""
        case "create", []:
            (path,) = [word.removeprefix("--raw=") for word in words if word.startswith("--raw=")]
            assert json.load(sys.stdin)["kind"] == "Eviction"
            return answer(state, ["delete", "pod", path.split("/")[-2]])
        case "get", ["job", name]:
            return json.dumps(state["jobs"][name] | {"status": _status(state, name)})
        case "get", ["pods"]:
            (job,) = [word.partition("job-name=")[2] for word in words if word.startswith("--selector=")]
            suspended = state["jobs"][job]["spec"].get("suspend", False)
            return json.dumps({"items": [] if suspended else state["pods"].get(job, [])})
        case "delete", ["pod", name]:
            for pods in state["pods"].values():
                for pod in pods:
                    if pod["metadata"]["name"] == name:
                        _replace(state, pod)
            return f'pod "{name}" deleted'
        case "exec", [name, "--", "python", "-c", script]:
            return _exec(state, name, script)
        case "logs", [name]:
            return _log(state, name)
    raise Refused(f"unknown command: {words}")


def _apply(state: State, folder: str) -> str:
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, check=True)
    for thing in yaml.safe_load_all(done.stdout):
        assert thing["metadata"]["namespace"] in state["namespaces"]
        name = thing["metadata"]["name"]
        if thing["kind"] == "PersistentVolumeClaim":
            state["claims"].append(name)
        if thing["kind"] == "Job":
            state["jobs"][name] = thing
            volumes = thing["spec"]["template"]["spec"]["volumes"]
            claims = {each["persistentVolumeClaim"]["claimName"] for each in volumes if "persistentVolumeClaim" in each}
            if claims <= set(state["claims"]):
                state["pods"][name] = [
                    _pod(state, f"{name}-{index}") for index in range(thing["spec"].get("completions", 1))
                ]
    return ""


def _pod(state: State, name: str) -> State:
    state["uids"] += 1
    return {"metadata": {"name": name, "uid": str(state["uids"])}, "status": {"phase": "Running"}}


def _replace(state: State, pod: State) -> None:
    pod |= _pod(state, pod["metadata"]["name"])
    state["kills"] += 1


def _status(state: State, name: str) -> State:
    state["asked"][name] = state["asked"].get(name, 0) + 1
    waits_for_kills = "killed" in name and "train" in name and state["kills"] < 5 and state["asked"][name] < _AT_MOST
    if name not in state["pods"] or state["jobs"][name]["spec"].get("suspend") or state["asked"][name] < _UNTIL_END:
        return {}
    if "wrong" in name:
        message = "Container train for pod x/y failed with exit code 2 matching FailJob rule at index 0"
        return {"conditions": [{"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": message}]}
    if f"{name} fails" in state["faults"]:
        return {"conditions": [{"type": "Failed", "status": "True", "reason": "MaxFailedIndexesExceeded"}]}
    return {} if waits_for_kills else {"conditions": [{"type": "Complete", "status": "True"}]}


def _exec(state: State, name: str, script: str) -> str:
    if "LOCAL_RANK" in script:
        state["kills"] += 1
        if "the pod ends with its rank" in state["faults"]:
            for pods in state["pods"].values():
                for pod in pods:
                    if pod["metadata"]["name"] == name:
                        pod |= _pod(state, name)
        return ""
    if "training stops" not in state["faults"] or state["kills"] == 0:
        state["step"] += 50
    return f"{state['step'] // 100 * 100}\n"


def _log(state: State, name: str) -> str:
    weights = "b" * 64 if "other weights" in state["faults"] and "killed" in name else "a" * 64
    if "export" in name:
        return json.dumps({"weights_sha256": weights, "export": {"ok": "verify differs" not in state["faults"]}})
    return "epoch 1\n" + (json.dumps({"weights_sha256": weights}) + "\n" if name.endswith("-0") else "")


def main() -> int:
    """Answer one command."""
    file = Path(os.environ["FAKE_CLUSTER"])
    state = json.loads(file.read_text())
    words = [word for word in sys.argv[1:] if word != "--namespace"][1:]
    state["commands"].append(words)
    try:
        print(answer(state, words))
        code = 0
    except Refused as refused:
        print(refused, file=sys.stderr)
        code = 1
    file.write_text(json.dumps(state))
    return code


if __name__ == "__main__":
    sys.exit(main())
