"""TorchX components: `torchx run launch/components.py:train …`. docs/clusters shows them on each scheduler.

This file depends on torchx.specs only. TorchX executes it inside a module of its own and reads the annotations as
text. It must therefore neither contain `from __future__ import annotations` nor define names that TorchX uses. TorchX
shows the part of a docstring above `Args:` as the help of the component.
"""

import re
import shlex
from typing import Dict, List, Optional  # noqa: UP035

from torchx import specs
from torchx.specs.finder import ComponentValidationException

_MLET = ("python", "-m", "mlet_dist")
_STARTS_OVER = re.compile(r"run\.overwrite=\s*(true|yes|on|1)\s*|train\.resume=never", re.IGNORECASE)


def train(
    *settings: str,
    config: str,
    data: str,
    run: str,
    export: Optional[str] = None,  # noqa: UP045
    checkpoints: Optional[str] = None,  # noqa: UP045
    j: str = "1x1",
    h: str = "cpu",
    image: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    max_retries: int = 3,
    max_restarts: int = 3,
    port: int = 0,
    wait: int = 600,
    name: str = "mlet-train",
) -> specs.AppDef:
    """Train on several nodes, and then export and verify on the first of them.

    The same command resumes a run that was stopped, and leaves a finished run unchanged.

    Args:
        settings: settings of `mlet train`, such as train.epochs=2, after a --
        config: YAML file, at the path that the nodes see
        data: data.path: storage that all nodes share, or a URL
        run: run.dir: storage that all nodes share
        export: directory for the plain TorchRec tables; without it nothing is exported
        checkpoints: train.checkpoint_dir, if not in the run: storage that all nodes share, or a URL
        j: nodes x ranks of each node, such as 2x8; 1:4x8 for one to four nodes that may leave and join
        h: named resource of a node, see launch/resources.py
        image: container image with mlet_dist; schedulers without containers ignore it
        mounts: mounts as for dist.ddp, e.g. type=volume,src=CLAIM,dst=/data
        env: environment variables of the nodes, e.g. NCCL_DEBUG=INFO
        max_retries: how often the scheduler restarts all nodes
        max_restarts: how often in a row a node restarts its ranks by itself; MIN:NODESxRANKS ignores it
        port: port on which the first node listens; 0 derives one from the command
        wait: seconds to wait for all nodes to join
        name: name of the job
    """
    nodes, ranks, min_nodes = _parse_j(j)
    if any(_STARTS_OVER.fullmatch(setting) for setting in settings) and max_retries > 0:
        raise ComponentValidationException(
            f"{' '.join(filter(_STARTS_OVER.fullmatch, settings))}: a scheduler that restarts the nodes would start "
            "the run over each time; choose another --run, or --max_retries 0"
        )
    overrides = [f"data.path={data}", f"run.dir={run}", *settings]
    if checkpoints is not None:
        overrides.insert(2, f"train.checkpoint_dir={checkpoints}")
    count = f"{min_nodes}:{nodes}" if min_nodes < nodes else f"{nodes}"
    options = ["--nproc", f"{ranks}", "--nnodes", count, "--wait", f"{wait}"]
    if max_restarts and min_nodes == nodes:  # torch elastic restarts the ranks of other jobs
        options += ["--max-restarts", f"{max_restarts}"]
    if port:
        options += ["--master-port", f"{port}"]
    if export is not None:
        options += ["--export", export]
    script = f"exec {_shell('train', config, *overrides, '--json', '--once', *options)} {_NODE_OPTIONS}"
    role = _role("train", script, image, h, mounts, env, max_retries)
    role.num_replicas, role.min_replicas = nodes, min_nodes if min_nodes < nodes else None
    if port:
        role.port_map = {"c10d": port}
    return specs.AppDef(name=name, roles=[role])


def export(
    run: str,
    out: str,
    data: str,
    h: str = "cpu",
    image: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    max_retries: int = 1,
    name: str = "mlet-export",
) -> specs.AppDef:
    """Collapse a finished run into plain TorchRec tables and compare their predictions with the run's, row by row.

    Args:
        run: directory of the run
        out: directory for the tables
        data: data set of the run
        h: named resource, see launch/resources.py
        image: container image with mlet_dist
        mounts: mounts as for dist.ddp, e.g. type=volume,src=CLAIM,dst=/data
        env: environment variables
        max_retries: how often the scheduler restarts the job
        name: name of the job
    """
    role = _role("export", _export_once(run, out, data), image, h, mounts, env, max_retries)
    return specs.AppDef(name=name, roles=[role])


def sweep(
    *keys: str,
    sweep: str,
    out: str,
    nodes: int = 1,
    h: str = "cpu",
    image: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    max_retries: int = 3,
    name: str = "mlet-sweep",
) -> specs.AppDef:
    """Tune and train the arms of a sweep on several nodes, which share the work.

    The same command goes on with a sweep that was stopped, and leaves a finished one unchanged.

    Args:
        keys: keys that replace those of the file, such as workers=8 or settings.data.path=/data, after a --
        sweep: YAML file of the sweep, at the path that the nodes see
        out: directory of the results: storage that all nodes share, as the runs
        nodes: number of nodes; each works on `workers` arms at a time
        h: named resource of a node, see launch/resources.py
        image: container image with mlet_dist
        mounts: mounts as for dist.ddp, e.g. type=volume,src=CLAIM,dst=/data
        env: environment variables
        max_retries: how often the scheduler restarts the nodes
        name: name of the job
    """
    script = "exec " + _shell("sweep", sweep, *keys, "--out", out, "--json")
    role = _role("sweep", script, image, h, mounts, env, max_retries)
    role.num_replicas = nodes
    return specs.AppDef(name=name, roles=[role])


def prepare(
    *raw: str,
    format: str,
    out: str,
    options: str = "",
    h: str = "cpu_large",
    image: str = "",
    mounts: Optional[List[str]] = None,  # noqa: UP006, UP045
    env: Optional[Dict[str, str]] = None,  # noqa: UP006, UP045
    max_retries: int = 3,
    name: str = "mlet-prepare",
) -> specs.AppDef:
    """Prepare a data set from raw files; the same command resumes an interrupted preparation.

    Args:
        raw: raw files in time order, paths or URLs, directories or patterns, after a --
        format: criteo, avazu or table
        out: directory for the data set
        options: other options of `mlet prepare`, in one argument: "--split paper --memory 64G"
        h: named resource, see launch/resources.py
        image: container image with mlet_dist
        mounts: mounts as for dist.ddp, e.g. type=volume,src=CLAIM,dst=/data
        env: environment variables
        max_retries: how often the scheduler restarts the job
        name: name of the job
    """
    script = _shell("prepare", format, *raw, "--out", out, "--json", *shlex.split(options))
    role = _role(
        "prepare", _unless_exists(f"{out.rstrip('/')}/manifest.json", script), image, h, mounts, env, max_retries
    )
    return specs.AppDef(name=name, roles=[role])


# The rank of this node and the address of the first one, which some schedulers do not set on the first node itself.
_NODE_OPTIONS = f'--node-rank {specs.macros.replica_id} --master-addr "$${{{specs.macros.rank0_env}:-localhost}}"'


def _export_once(run: str, out: str, data: str) -> str:
    export_script = _unless_exists(f"{out.rstrip('/')}/manifest.json", _shell("export", run, "--out", out))
    return f"{export_script} && {_shell('verify', out, '--run', run, '--data', data, '--json')}"


def _unless_exists(file: str, script: str) -> str:
    """Skip the script in a retry if an earlier attempt has finished; the file is renamed into place when complete."""
    return f"{{ test -e {_literal(file)} || {script}; }}"


def _shell(*arguments: str) -> str:
    return " ".join([*_MLET, *map(_literal, arguments)])


def _literal(text: str) -> str:
    """Quote an argument for bash, and escape what TorchX would take for a macro."""
    return shlex.quote(text).replace("$", "$$")


def _parse_j(j: str) -> tuple[int, int, int]:
    """Return the number of nodes, of ranks on each, and the smallest number of nodes."""
    match = re.fullmatch(r"(?:(\d+):)?(\d+)x(\d+)", j)
    nodes, ranks = (int(match[2]), int(match[3])) if match else (0, 0)
    min_nodes = int(match[1] or nodes) if match else 0
    if not match or not 1 <= min_nodes <= nodes or not ranks:
        raise ComponentValidationException(
            f"-j {j}: must be nodes x ranks of each node, as in 2x8, or with a smallest number of nodes, as in 1:4x8"
        )
    return nodes, ranks, min_nodes


def _role(
    name: str,
    script: str,
    image: str,
    h: str,
    mounts: Optional[List[str]],  # noqa: UP006, UP045
    env: Optional[Dict[str, str]],  # noqa: UP006, UP045
    max_retries: int,
) -> specs.Role:
    try:
        resource = specs.resource(h=h)
    except KeyError:
        raise ComponentValidationException(
            f"-h {h}: no resource of that name is registered; those of launch/resources.py are "
            "registered when mlet_dist is installed with its extra `launch`"
        ) from None
    return specs.Role(
        name=name,
        image=image,
        entrypoint="bash",
        args=["-c", script],
        env=dict(env or {}),
        resource=resource,
        mounts=specs.parse_mounts(mounts) if mounts else [],
        max_retries=max_retries,
    )
