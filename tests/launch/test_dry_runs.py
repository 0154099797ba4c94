"""The requests that TorchX would submit to Kubernetes (Volcano), Slurm and AWS Batch."""

import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml
from botocore.session import get_session
from botocore.validate import ParamValidator

from mlet_dist.cli.main import parse
from mlet_dist.cli.options import without_launch_options
from mlet_dist.cluster.nodes import job_id
from tests.helpers.kubernetes_schemas import check
from tests.helpers.torchx_cli import COMPONENTS, run_torchx

pytestmark = pytest.mark.e2e

RESOURCES = ["-h", "h100x8", "--image", "mlet-dist:0.1.0", "--mounts", "type=volume,src=mlet-storage,dst=/storage"]
PLACES = ["--config", "/opt/mlet/configs/demo.yaml", "--data", "/storage/data", "--run", "/storage/runs/it is"]
SETTINGS = ["--", "train.epochs=2", "optimizer.name=adagrad", "train.checkpoint_dir=/storage/$x"]
TRAIN = [f"{COMPONENTS}:train", *PLACES, *RESOURCES, "--env", "NCCL_DEBUG=INFO,NCCL_SOCKET_IFNAME=eth0"]


def request(environment: dict[str, str], scheduler: str, *arguments: object) -> str:
    output = run_torchx(environment, "run", "--dryrun", "-s", scheduler, "--workspace=", *arguments)[0]
    return output.partition("=== SCHEDULER REQUEST ===\n")[2]


def words_in_bash(script: str, **variables: str) -> list[str]:
    """Return the words after `python -m mlet_dist` in the last command of a node's script, as bash splits them."""
    assert script.startswith("exec python -m mlet_dist ")
    script = script.replace("exec python -m mlet_dist", "printf '%s\\n'", 1)
    done = subprocess.run(["bash", "-c", script], env=variables, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def parsed(words: list[str]) -> Any:
    """Parse the words as mlet does, and check that the settings of the component arrived."""
    found = parse(words)
    assert found.overrides == [
        "data.path=/storage/data",
        "run.dir=/storage/runs/it is",
        *SETTINGS[1:],
    ]
    assert (found.once, found.nproc, found.wait) == (True, 8, 600)
    return found


def same_job(commands: list[list[str]]) -> bool:
    """Return whether nodes with these commands derive the same id of their job."""
    return len({job_id(without_launch_options(words), 8, "2") for words in commands}) == 1


def test_kubernetes(torchx_environment: dict[str, str]) -> None:
    arguments = [*TRAIN, "-j", "2x8", "--port", 29500, "--export", "/storage/export", *SETTINGS]
    job = yaml.safe_load(request(torchx_environment, "kubernetes", *arguments))
    check(job)
    assert job["spec"]["queue"] == "mlet"
    assert job["spec"]["maxRetry"] == 3
    containers = [task["template"]["spec"]["containers"][0] for task in job["spec"]["tasks"]]
    assert len(containers) == 2
    commands = []
    for number, container in enumerate(containers):
        assert container["command"][:2] == ["bash", "-c"]
        assert {"name": "NCCL_SOCKET_IFNAME", "value": "eth0"} in container["env"]
        assert container["ports"] == [{"containerPort": 29500, "name": "c10d"}]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
        variables = {each["name"]: each["value"] for each in container["env"]}
        variables |= {"VC_TRAIN_0_HOSTS": "mlet-train-0-0.mlet-train"}  # by Volcano, of the task train-0
        commands.append(words_in_bash(container["command"][2], **variables))
        found = parsed(commands[-1])
        assert (found.nnodes, found.node_rank, found.master_port) == ("2", number, 29500)
        assert found.master_addr == ("localhost" if number == 0 else "mlet-train-0-0.mlet-train")
        assert found.export == "/storage/export"
    assert same_job(commands)
    policies = {(policy["event"], policy["action"]) for policy in job["spec"]["tasks"][0]["policies"]}
    assert policies == {("PodEvicted", "RestartJob"), ("PodFailed", "RestartJob")}


def test_elastic_job_on_kubernetes(torchx_environment: dict[str, str]) -> None:
    job = yaml.safe_load(request(torchx_environment, "kubernetes", *TRAIN, "-j", "1:3x8", "--port", 29500, *SETTINGS))
    check(job)
    assert [task["minAvailable"] for task in job["spec"]["tasks"]] == [1, 0, 0]
    script = job["spec"]["tasks"][2]["template"]["spec"]["containers"][0]["command"][2]
    found = parsed(words_in_bash(script, VC_TRAIN_0_HOSTS="a"))
    assert (found.nnodes, found.node_rank) == ("1:3", 2)


def test_aws_batch(torchx_environment: dict[str, str]) -> None:
    """AWS's own description of its interface accepts the request."""
    text = request(torchx_environment, "aws_batch", *TRAIN, "-j", "2x8", "--port", 29500, *SETTINGS)
    submitted = yaml.safe_load(text)
    interface = get_session().get_service_model("batch").operation_model("RegisterJobDefinition").input_shape
    problems = ParamValidator().validate(submitted["job_def"], interface)
    assert not problems.has_errors(), problems.generate_report()
    properties = submitted["job_def"]["nodeProperties"]
    (nodes,) = properties["nodeRangeProperties"]
    assert (properties["numNodes"], properties["mainNode"], nodes["targetNodes"]) == (2, 0, "0:1")
    commands = [
        words_in_bash(nodes["container"]["command"][2], AWS_BATCH_JOB_NODE_INDEX="0"),
        words_in_bash(
            nodes["container"]["command"][2],
            AWS_BATCH_JOB_NODE_INDEX="1",
            AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS="10.0.0.7",
        ),
    ]
    assert [(parsed(words).node_rank, parsed(words).master_addr) for words in commands] == [
        (0, "localhost"),
        (1, "10.0.0.7"),
    ]
    assert same_job(commands)


def test_slurm(torchx_environment: dict[str, str]) -> None:
    script = request(torchx_environment, "slurm", *TRAIN, "-j", "2x8", *SETTINGS).partition("#!/bin/bash\n")[2]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    headers = re.findall(r"^#SBATCH (--job-name.*)$", script, flags=re.MULTILINE)
    assert [shlex.split(header)[0] for header in headers] == ["--job-name=train-0", "--job-name=train-1"]
    for header in headers:
        assert {"--requeue", "--gpus-per-task=8", "--cpus-per-task=88"} <= set(shlex.split(header))
    assert "TORCHX_MAX_RETRIES=3" in script
    nodes = [words for words in shlex.split(script) if words.startswith("exec python -m mlet_dist ")]
    commands = [words_in_bash(node, SLURM_JOB_NODELIST_HET_GROUP_0="node7") for node in nodes]
    assert [(parsed(words).node_rank, parsed(words).master_addr) for words in commands] == [(0, "node7"), (1, "node7")]
    assert same_job(commands)


def test_other_components(torchx_environment: dict[str, str]) -> None:
    raw = [
        f"{COMPONENTS}:prepare",
        "--format",
        "criteo",
        "--out",
        "/data/it",
        "--options",
        "--memory 8G",
        "--",
        "a b.gz",
    ]
    script = request(torchx_environment, "slurm", *raw)
    assert "test -e /data/it/manifest.json || python -m mlet_dist prepare criteo" in script
    export = [f"{COMPONENTS}:export", "--run", "/runs/x", "--out", "/exports/x", "--data", "/data/it"]
    script = request(torchx_environment, "slurm", *export)
    assert "python -m mlet_dist export /runs/x --out /exports/x; } && python -m mlet_dist verify /exports/x" in script
    sweep = [f"{COMPONENTS}:sweep", "--sweep", "s.yaml", "--out", "/sweeps/x", "--nodes", "3"]
    script = request(torchx_environment, "slurm", *sweep, "--", "workers=8", "settings.data.path=/storage/$x")
    command = "exec python -m mlet_dist sweep s.yaml workers=8 'settings.data.path=/storage/$x' --out /sweeps/x --json"
    assert script.count(f"bash -c {shlex.quote(command)}") == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["-j", "2y8"], "-j 2y8: must be nodes x ranks of each node"),
        (["-j", "4:2x8"], "-j 4:2x8: must be"),
        (["-j", "0x8"], "-j 0x8: must be"),
        (["-h", "cray"], "-h cray: no resource of that name is registered"),
        (
            ["--", "run.overwrite=true"],
            "run.overwrite=true: a scheduler that restarts the nodes would start the run over",
        ),
    ],
)
def test_input_errors_are_one_line(torchx_environment: dict[str, str], wrong: list[str], message: str) -> None:
    arguments = [f"{COMPONENTS}:train", *PLACES, *wrong]
    lines = run_torchx(torchx_environment, "run", "--dryrun", "-s", "local_cwd", *arguments, expect=1)[1]
    assert message in lines
    assert "Traceback" not in lines


def test_builtin_components_are_still_listed(torchx_environment: dict[str, str]) -> None:
    assert "dist.ddp" in run_torchx(torchx_environment, "builtins")[0]
